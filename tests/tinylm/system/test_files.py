"""Writing changes only the file or directory that the user named, and an error leaves it unchanged."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tinylm.system.files import (
    TEMPORARY_PREFIX,
    check_directory,
    is_inside,
    manifest_names,
    replaced_directory,
    write_file,
)

only_root = pytest.mark.skipif(os.getuid() != 0, reason="only root makes files of two users")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("old")
    return path


@pytest.fixture(autouse=True)
def no_temporaries(tmp_path: Path):
    yield
    assert not list(tmp_path.rglob(f"{TEMPORARY_PREFIX}*"))


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o664, 0o755])
def test_a_replaced_file_keeps_its_mode(old: Path, mode: int) -> None:
    old.chmod(mode)
    write_file(old, "new")
    assert (old.read_text(), stat.S_IMODE(old.stat().st_mode)) == ("new", mode)


def test_a_new_file_gets_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@only_root
def test_a_replaced_file_keeps_its_owner(old: Path) -> None:
    os.chown(old, 1234, 2345)
    write_file(old, "new")
    assert (old.read_text(), old.stat().st_uid, old.stat().st_gid) == ("new", 1234, 2345)


def test_a_symbolic_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name, target in (("link", "there/file"), ("dangling", "there/new")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "there" / "file").write_text("old")
    for name in ("link", "dangling"):
        write_file(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
    assert {path.name: path.read_text() for path in (tmp_path / "there").iterdir()} == {"file": "new", "new": "new"}


def test_data_is_written_into_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "fifo", "data")
    assert os.read(reader, 10) == b"data"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


@pytest.mark.parametrize("path", ["/dev/stdout", "out"])
def test_a_file_that_is_standard_output_is_not_replaced(tmp_path: Path, path: str) -> None:
    """With `command -o /dev/stdout > out`, a new file in place of `out` would lose what the command prints later."""
    code = f"from tinylm.system.files import *; print(1); write_file(Path({path!r}), 'data\\n'); print(2)"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, cwd=tmp_path, check=True)
    assert (tmp_path / "out").read_text() == "1\ndata\n2\n"


def test_an_error_leaves_the_old_file(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_file(old, "new")
    assert old.read_text() == "old"


def write_as_nobody(path: Path) -> str:
    """Write `path` in a process whose user may do only what modes permit. Return its errors."""
    change_user = "os.setuid(65534); " if os.getuid() == 0 else ""
    code = f"from tinylm.system.files import *; import os; {change_user}write_file(Path({str(path)!r}), 'new')"
    for parent in path.parents[:4]:
        if os.getuid() == 0 and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o111)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize("mode", [0o555, pytest.param(0o777, marks=only_root)], ids=["read-only", "another user's"])
def test_a_file_that_cannot_be_replaced_is_written_in_place(old: Path, mode: int) -> None:
    """The user may write the file, but may not put a new file into the directory, or give that file its owner."""
    old.chmod(0o666)
    before = old.stat()
    old.parent.chmod(mode)
    errors = write_as_nobody(old)
    old.parent.chmod(0o755)
    after = old.stat()
    assert (errors, old.read_text()) == ("", "new")
    assert (after.st_mode, after.st_uid, after.st_ino) == (before.st_mode, before.st_uid, before.st_ino)


def test_a_file_that_nobody_may_write_is_refused(old: Path) -> None:
    """This also holds for root."""
    old.chmod(0o444)
    with pytest.raises(PermissionError, match="no permission to write"):
        write_file(old, "new")
    assert old.read_text() == "old"


def ours(directory: Path) -> set[str] | None:
    return manifest_names(directory / "manifest.json", lambda names: list(names))


def make_directory(place: Path, text: str) -> None:
    with replaced_directory(place, ours) as new:
        (new / "a").write_text(text)
        (new / "manifest.json").write_text('{"a": 1}')


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory that `make_directory` wrote."""
    make_directory(tmp_path / "place", "old")
    return tmp_path / "place"


def test_a_directory_is_replaced_and_keeps_its_mode(place: Path) -> None:
    place.chmod(0o750)
    make_directory(place, "new")
    assert (place / "a").read_text() == "new"
    assert stat.S_IMODE(place.stat().st_mode) == 0o750


def test_an_empty_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    make_directory(tmp_path / "place", "new")
    assert (tmp_path / "place" / "a").read_text() == "new"


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "place").symlink_to("disk/text")
    for text in ("old", "new"):
        make_directory(tmp_path / "place", text)
        assert (tmp_path / "disk" / "text" / "a").read_text() == text
    assert (tmp_path / "place").is_symlink()


def test_a_block_that_fails_leaves_the_directory(place: Path) -> None:
    def fail(new: Path) -> None:
        (new / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replaced_directory(place, ours) as new:
        fail(new)
    assert (place / "a").read_text() == "old"


def test_a_failed_second_rename_restores_the_directory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fails_to_place(self: Path, target: Path) -> Path:
        if target == place and (self / "a").read_text() == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_to_place)
    with pytest.raises(OSError, match="no"):
        make_directory(place, "new")
    assert (place / "a").read_text() == "old"


def test_a_file_that_appears_during_the_block_is_kept(place: Path) -> None:
    with pytest.raises(FileExistsError, match="notes"), replaced_directory(place, ours):
        (place / "notes").write_text("mine")
    assert (place / "notes").read_text() == "mine"
    assert (place / "a").read_text() == "old"


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "1", '{"b": 1}', "\xff"])
def test_only_files_in_the_manifest_may_be_removed(place: Path, content: str) -> None:
    assert check_directory(place, ours) == {"a", "manifest.json"}
    (place / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(FileExistsError, match="it holds a, which"):
        check_directory(place, ours)


def test_is_inside_follows_links(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for directory in (inside, outside):
        directory.mkdir()
        (directory / "file").touch()
    (outside / "to-inside").symlink_to(inside / "file")
    (inside / "to-outside").symlink_to(outside / "file")
    (tmp_path / "other").symlink_to(inside)
    for place in (inside, tmp_path / "other"):
        for path in ("in/file", "other/file", "out/to-inside", "in/to-outside"):
            assert is_inside(tmp_path / path, place)
        assert not is_inside(outside / "file", place)
