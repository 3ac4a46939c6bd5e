"""A file without a name: it appears whole, replaces in one step, or leaves nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kit.users import NOBODY, acting_as
from pmemfs.client.unnamed import UnnamedFile


def made(path: Path, content: bytes = b"new") -> UnnamedFile:
    file = UnnamedFile(str(path), 0o777)
    os.write(file.fd, content)
    return file


def test_it_appears_when_it_is_complete(tmp_path: Path) -> None:
    old_mask = os.umask(0o027)
    try:
        file = made(tmp_path / "name")
    finally:
        os.umask(old_mask)
    assert os.listdir(tmp_path) == []
    file.appear()
    assert file.fd == -1
    assert os.listdir(tmp_path) == ["name"]
    assert (tmp_path / "name").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "name").stat().st_mode) == 0o750
    file.give_up()
    assert os.listdir(tmp_path) == ["name"]


def test_it_takes_the_place_of_an_old_file_or_is_told_that_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "name").write_bytes(b"old")
    file = made(tmp_path / "name")
    with pytest.raises(FileExistsError):
        file.appear(may_replace=False)
    assert (tmp_path / "name").read_bytes() == b"old"
    file.appear()
    assert (tmp_path / "name").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["name"]


def test_what_is_given_up_leaves_nothing(tmp_path: Path) -> None:
    made(tmp_path / "name").give_up()
    assert os.listdir(tmp_path) == []
    (tmp_path / "name").mkdir()
    file = made(tmp_path / "name")
    with pytest.raises(IsADirectoryError):
        file.appear()
    file.give_up()
    assert os.listdir(tmp_path) == ["name"]
    with pytest.raises(FileNotFoundError):
        UnnamedFile(str(tmp_path / "none" / "name"))


def test_an_error_names_the_file_as_its_user_does(tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    file = made(tmp_path / "name")
    with pytest.raises(IsADirectoryError) as refused:
        file.appear()
    assert str(refused.value) == f"[Errno 21] Is a directory: '{tmp_path / 'name'}'"
    (tmp_path / "name").rmdir()
    file.appear()
    assert (tmp_path / "name").read_bytes() == b"new"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to act as another user")
def test_what_could_not_appear_appears_when_it_is_asked_again(shm: Path) -> None:
    os.chmod(shm, 0o777)
    with acting_as(NOBODY):
        (shm / "name").write_bytes(b"old")
        file = made(shm / "name")
    os.chmod(shm, 0o755)
    with acting_as(NOBODY), pytest.raises(PermissionError) as refused:
        file.appear()
    assert refused.value.filename == str(shm / "name")
    assert (shm / "name").read_bytes() == b"old"
    os.chmod(shm, 0o777)
    with acting_as(NOBODY):
        file.appear()
    assert (shm / "name").read_bytes() == b"new"
    assert os.listdir(shm) == ["name"]
