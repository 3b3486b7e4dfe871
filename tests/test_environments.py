"""The environments of envs/ are those of pyproject.toml, and the image gets what it needs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "extras"),
    [("library", []), ("workflow", ["workflow"]), ("peers", ["workflow", "peers", "wandb"])],
)
def test_conda_environments(
    name: str, extras: list[str], root: Path, project: dict[str, Any]
) -> None:
    found = yaml.safe_load((root / f"envs/{name}.yaml").read_text(encoding="utf-8"))
    python, pip, by_pip = found["dependencies"]
    assert (found["name"], pip) == (f"kvquant-{name}", "pip")
    assert python == f"python {project['project']['requires-python']}"
    (line,) = by_pip["pip"]
    asked = re.fullmatch(r"-e \.\.(?:\[(.*)\])?", line)
    assert asked and (asked[1] or "").split(",") == (extras or [""])
    assert set(extras) <= set(project["project"]["optional-dependencies"])


def test_the_workflow_is_one_list(project: dict[str, Any]) -> None:
    """The group of the repository is the extra of the package."""
    assert project["dependency-groups"]["workflow"] == ["kvquant[workflow]"]


def test_the_image_copies_what_it_installs(root: Path, project: dict[str, Any]) -> None:
    text = (root / "envs/Containerfile").read_text(encoding="utf-8")
    first = re.search(r"^COPY (.*) \./$", text, re.MULTILINE)
    assert first and set(first[1].split()) == {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
    }
    ignored = (root / ".dockerignore").read_text(encoding="utf-8").split()
    for kept in (*first[1].split(), "kvquant", "workflow", "config", "Snakefile", "tests"):
        assert kept not in ignored
    assert {".git", ".venv", "resources", "results/*", "!results/published"} <= set(ignored)
    image = re.search(r"docker build -f envs/Containerfile -t (\w+) \.", text)
    snakefile = (root / "workflow/Snakefile").read_text(encoding="utf-8")
    assert image and f'container: "docker-daemon:{image[1]}:latest"' in snakefile
    assert 'ENV PATH="/kvquant/.venv/bin:$PATH"' in text  # jobs there call `python -m kvquant`
    command = re.search(r'CMD \["snakemake", "--profile", "(.*)"\]', text)
    assert command and list((root / command[1]).glob("*.yaml"))
