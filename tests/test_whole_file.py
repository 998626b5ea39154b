"""Text files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from odd_file_systems import FileSystem

from minillm.base.errors import ConfigError
from minillm.base.whole_file import replace, write_asked, write_text


def test_a_file_takes_the_place_of_another_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "text"
    for text in ("a\nä", ""):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["text"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_what_was_there_stays_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(ConfigError, match=r"--svg .*text cannot be written: full"):
        write_asked(path, "after", "--svg")
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["text"]


@pytest.mark.parametrize("renames", ["files", "nothing"])
def test_without_rename_a_file_is_written_again_and_compared(
    renames: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = tmp_path / "text", tmp_path / "folder"
    with FileSystem(renames).standing() as system:
        write_text(path, "before")
        write_text(path, "after")
        (tmp_path / ".tmp-folder").mkdir()
        (tmp_path / ".tmp-folder" / "a").write_text("b" * 3_000_000)
        (tmp_path / ".tmp-folder" / "inner").mkdir()
        (tmp_path / ".tmp-folder" / "inner" / "c").write_text("d")
        replace(tmp_path / ".tmp-folder", folder)
    assert system.refused == (1 if renames == "files" else 3)
    assert path.read_text() == "after" and (folder / "a").read_text() == "b" * 3_000_000
    assert (folder / "inner" / "c").read_text() == "d"
    assert sorted(os.listdir(tmp_path)) == ["folder", "text"]
    monkeypatch.setattr(shutil, "copyfileobj", lambda old, new, size: new.write(b"other"))
    with FileSystem("nothing").standing(), pytest.raises(OSError, match="not what was written"):
        write_text(path, "more")
    with FileSystem("nothing", errno.ENOENT).standing(), pytest.raises(FileNotFoundError):
        write_text(tmp_path / "new", "text")
    assert sorted(os.listdir(tmp_path)) == ["folder", "text"]


def test_a_path_without_a_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="no file name"):
        write_asked(Path("/"), "text", "--svg")
