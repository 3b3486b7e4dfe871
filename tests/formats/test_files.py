"""Files: read in one piece or reported in one line; written whole, with the umask's mode."""

import errno
import os
import platform
import stat
from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.formats.files import (
    parse_json,
    path_inside,
    read_json,
    read_text,
    replace,
    replacing,
    sweep,
    sweep_tree,
    temporary_name,
    write_new,
)

DEAD = 2**22 + 1  # above the largest process number of Linux


@pytest.mark.fault(
    "files",
    "a file that is missing, a folder, a dangling link, not UTF-8, cut, empty, nested 100,000 "
    "deep, with a key twice or NaN",
    "one line with the field, the file and what to do",
)
def test_whatever_is_wrong_with_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "bytes").write_bytes(b'{"a": "\xff"}')
    (tmp_path / "twice").write_text('{"a": 1, "a": 2}')
    (tmp_path / "nan").write_text('{"a": NaN}')
    (tmp_path / "cut").write_text('{"a": 1')
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "half").write_text('{"a": "\\ud83d"}')
    expected = {
        "missing": "no such file",
        "folder": "a folder",
        "link": "a link to nothing",
        "bytes/below": "a file stands where a folder",
        "bytes": "byte 7 is not UTF-8",
        "twice": "key 'a' is given twice",
        "nan": "NaN is not a number",
        "cut": "truncated or damaged JSON",
        "empty": "empty",
        "deep": "nested more than",
        "half": "a lone surrogate",
    }
    for name, text in expected.items():
        with pytest.raises(UserError) as caught:
            read_json(tmp_path / name, "--record", "measure it again")
        message = str(caught.value)
        assert message.startswith("--record: ") and text in message, name
        assert name in message and "measure it again" in message
        assert "\n" not in message


def test_pairs_of_surrogates_are_characters() -> None:
    assert parse_json('"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


def test_brackets_in_strings_are_no_nesting() -> None:
    text = '{"a": "' + "[" * 500 + '\\"{{{"}'
    assert parse_json(text) == {"a": "[" * 500 + '"{{{'}


@pytest.mark.fault(
    "files",
    "a file system without hard links (EPERM, ENOTSUP, ENOSYS)",
    "results are created once, under a lock",
)
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
def test_without_hard_links_files_are_created_once_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def link(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "result.json"
    write_new(path, "one")
    write_new(path, "one")
    with pytest.raises(UserError, match="not overwritten"):
        write_new(path, "two")
    assert path.read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.fault(
    "files",
    "umask 022, 002, 077",
    "every artifact has the mode of the umask",
)
@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_of_the_umask(tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        replace(tmp_path / "a", "text")
        write_new(tmp_path / "b", "text")
        with replacing(tmp_path / "c") as temporary:
            temporary.unlink()
            os.close(os.open(temporary, os.O_CREAT, 0o600))  # as safetensors does
    finally:
        os.umask(old)
    for name in "abc":
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask, name


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "a"
    replace(file, "old")
    with pytest.raises(ValueError), replacing(file) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (write_new, replace):
        with pytest.raises(UserError, match="cannot be written") as caught:
            write(tmp_path / "file" / "below", "text")
        assert "\n" not in str(caught.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="not overwritten"):
        write_new(tmp_path / "folder", "text")


@pytest.mark.fault(
    "files",
    "temporary files of killed jobs",
    "swept by the next write and when a run starts",
)
def test_temporary_files_of_ended_processes_are_swept(tmp_path: Path) -> None:
    node = platform.node()
    dead = tmp_path / f".a.json.{node}.{DEAD}.tmp"
    old = tmp_path / ".a.json.elsewhere.12.tmp"
    new = tmp_path / ".b.json.elsewhere.12.tmp"
    mine = temporary_name(tmp_path / "a.json")
    foreign = tmp_path / ".notes.tmp"
    for file in (dead, old, new, mine, foreign):
        file.write_text("")
    os.utime(old, (0, 0))
    assert sweep(tmp_path) == 2
    assert {file for file in tmp_path.iterdir()} == {new, mine, foreign}
    below = tmp_path / "a" / "b" / dead.name
    below.parent.mkdir(parents=True)
    below.write_text("")
    assert sweep_tree(tmp_path) == 1 and not below.exists()
    dead.write_text("")
    write_new(tmp_path / "a.json", "text")
    assert not dead.exists()


@pytest.mark.fault(
    "security",
    "names that are absolute, climb with .. or leave through a link",
    "refused by name",
)
def test_names_stay_inside_their_folder(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("/")
    assert path_inside(tmp_path, "a/b", "file") == tmp_path.resolve() / "a" / "b"
    for name in ("", ".", "..", "a/../../b", "/etc/passwd", "out/etc"):
        with pytest.raises(UserError, match="must be a name inside"):
            path_inside(tmp_path, name, "file")


def test_text_keeps_its_characters(tmp_path: Path) -> None:
    replace(tmp_path / "a", "ä\u2028\n")
    assert read_text(tmp_path / "a", "file") == "ä\u2028\n"
