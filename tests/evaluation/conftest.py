"""Fixtures of the evaluation tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvquant.fetch.model import fetch_model
from kvquant.models.loading import load_quantized_model
from kvquant.study.config import parse_study
from kvquant.study.schemes import Fp16Scheme, KiviScheme
from tests.evaluation.asking import passkey_study
from tests.support.models import save_tiny


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny model."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> Any:
    """It, loaded with the unquantized cache."""
    return load_quantized_model(tiny_dir, Fp16Scheme(kind="fp16"), device="cpu")


@pytest.fixture(scope="session")
def tiny_kivi(tiny_dir: Path) -> Any:
    """It, loaded with a quantized cache that needs no calibration."""
    scheme = KiviScheme(kind="kivi", bits=4, group=16, residual=16)
    return load_quantized_model(tiny_dir, scheme, device="cpu")


@pytest.fixture(scope="module")
def manifest(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of the saved tiny model, as the study of `passkey_study` names it."""
    out = tmp_path_factory.mktemp("manifest") / "manifest.json"
    study = parse_study(passkey_study(tiny_dir))
    fetch_model("tiny", study.model("tiny"), out)
    return out
