"""What a user named is written, and nothing else in the file system changes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tinylm.system import files
from tinylm.system.files import check_directory, is_inside, manifest_names, replaced_directory, write_file

MODES = (0o600, 0o644, 0o664, 0o755)


def ours(directory: Path) -> set[str] | None:
    """The names that the manifest of a test directory lists."""
    return manifest_names(directory / "manifest.json", lambda names: list(names))


def make_directory(place: Path, text: str) -> None:
    with replaced_directory(place, ours) as new:
        (new / "a").write_text(text)
        (new / "manifest.json").write_text('{"a": 1}')


def no_temporaries(directory: Path) -> bool:
    return not list(directory.glob(f"{files.TEMPORARY_PREFIX}*"))


@pytest.mark.parametrize("mode", MODES)
def test_a_replaced_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    write_file(path, "new")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", mode)
    assert no_temporaries(tmp_path)


def test_a_new_file_gets_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_a_replaced_file_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    os.chown(path, 1234, 2345)
    write_file(path, "new")
    assert (path.read_text(), path.stat().st_uid, path.stat().st_gid) == ("new", 1234, 2345)


def test_a_symbolic_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for name, target in (("link", "there/file"), ("dangling", "there/new")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "there" / "file").write_text("old")
    for name in ("link", "dangling"):
        write_file(tmp_path / name, "new")
        assert (tmp_path / name).is_symlink()
    assert {path.name: path.read_text() for path in (tmp_path / "there").iterdir()} == {"file": "new", "new": "new"}


def test_a_device_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    write_file(tmp_path / "null", "gone")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert (tmp_path / "null").readlink() == Path("/dev/null")


def test_a_fifo_gets_the_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "fifo", "data")
    assert os.read(reader, 10) == b"data"
    os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


@pytest.mark.parametrize("path", ["/dev/stdout", "out"])
def test_standard_output_in_a_file_gets_the_data(tmp_path: Path, path: str) -> None:
    """`command -o /dev/stdout > out`: a new file in place of `out` would leave what is printed later nowhere."""
    code = f"from tinylm.system.files import *; print(1); write_file(Path({path!r}), 'data\\n'); print(2)"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, cwd=tmp_path, check=True)
    assert (tmp_path / "out").read_text() == "1\ndata\n2\n"


def test_an_error_leaves_the_old_file_and_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert no_temporaries(tmp_path)


def as_nobody(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process whose user may do only what modes permit."""
    code = f"from tinylm.system.files import *; import os; {'os.setuid(65534); ' if os.getuid() == 0 else ''}{code}"
    for parent in [directory, *directory.parents[:3]]:
        if os.getuid() == 0 and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o111)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_file_in_a_directory_without_permission_is_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o666)
    tmp_path.chmod(0o555)
    done = as_nobody(f"write_file(Path({str(path)!r}), 'new')", tmp_path)
    tmp_path.chmod(0o755)
    assert (done.stderr, path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("", "new", 0o666)
    assert no_temporaries(tmp_path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root makes files of two users")
def test_another_user_s_file_is_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o666)
    tmp_path.chmod(0o777)
    inode = path.stat().st_ino
    assert not as_nobody(f"write_file(Path({str(path)!r}), 'new')", tmp_path).stderr
    assert (path.read_text(), path.stat().st_uid, path.stat().st_ino) == ("new", 0, inode)
    assert no_temporaries(tmp_path)


def test_a_file_that_nobody_may_write_is_refused(tmp_path: Path) -> None:
    """Also for root, whom the system would let do it."""
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="no permission to write"):
        write_file(path, "new")
    assert path.read_text() == "old"


def test_a_directory_of_ours_is_replaced_whole(tmp_path: Path) -> None:
    place = tmp_path / "place"
    make_directory(place, "old")
    place.chmod(0o750)
    make_directory(place, "new")
    assert (place / "a").read_text() == "new"
    assert stat.S_IMODE(place.stat().st_mode) == 0o750
    assert no_temporaries(tmp_path)


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
    assert no_temporaries(tmp_path)
    assert no_temporaries(tmp_path / "disk")


def test_a_block_that_fails_leaves_the_directory(tmp_path: Path) -> None:
    place = tmp_path / "place"
    make_directory(place, "old")

    def fail(new: Path) -> None:
        (new / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replaced_directory(place, ours) as new:
        fail(new)
    assert (place / "a").read_text() == "old"
    assert no_temporaries(tmp_path)


def test_a_failed_second_rename_restores_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, rename = tmp_path / "place", Path.rename
    make_directory(place, "old")

    def fails_to_place(self: Path, target: Path) -> Path:
        if target == place and (self / "a").read_text() == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_to_place)
    with pytest.raises(OSError, match="no"):
        make_directory(place, "new")
    assert (place / "a").read_text() == "old"
    assert no_temporaries(tmp_path)


def test_a_file_that_came_during_the_block_is_kept(tmp_path: Path) -> None:
    place = tmp_path / "place"
    make_directory(place, "old")
    with pytest.raises(FileExistsError, match="notes"), replaced_directory(place, ours):
        (place / "notes").write_text("mine")
    assert (place / "notes").read_text() == "mine"
    assert (place / "a").read_text() == "old"


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", "1", '{"b": 1}', "\xff", '{"a": 1}'])
def test_a_manifest_decides_which_files_are_ours(tmp_path: Path, content: str) -> None:
    (tmp_path / "a").write_text("data")
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    if content == '{"a": 1}':
        assert check_directory(tmp_path, ours) == {"a", "manifest.json"}
    else:
        with pytest.raises(FileExistsError, match="it holds a, which"):
            check_directory(tmp_path, ours)


def test_a_path_is_inside_also_through_links(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir(), outside.mkdir()
    for directory in (inside, outside):
        (directory / "file").touch()
    (outside / "to-inside").symlink_to(inside / "file")
    (inside / "to-outside").symlink_to(outside / "file")
    (tmp_path / "other").symlink_to(inside)
    for place in (inside, tmp_path / "other"):
        assert is_inside(inside / "file", place)
        assert is_inside(tmp_path / "other" / "file", place)
        assert is_inside(outside / "to-inside", place)
        assert is_inside(inside / "to-outside", place)
        assert not is_inside(outside / "file", place)
