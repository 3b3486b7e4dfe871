"""Texts of the user's: with a byte order mark or without, from files and pipes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvquant.errors import UserError
from kvquant.formats.user_text import check_there, read_prose


def test_a_mark_before_a_text_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfOne.\r\n\xef\xbb\xbf")
    assert read_prose(tmp_path / "a", "--text") == "One.\r\n\ufeff"


def test_what_is_no_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    check_there(tmp_path / "pipe", "--text")
    (tmp_path / "link").symlink_to("nowhere")
    for name, told in (("no", "no such file"), (".", "a folder"), ("link", "a link to nothing")):
        with pytest.raises(UserError, match=f"--text: .*{told}"):
            check_there(tmp_path / name, "--text")
