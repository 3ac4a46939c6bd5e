"""Keys of a mount: made, listed, unlocked, locked, changed and removed from the command line."""

from __future__ import annotations

import base64
import itertools
import json
import os
import subprocess
import unicodedata
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from kit.commands import BIN, pmemfs, pmemfs_here, pmemfs_ok, refused
from kit.fs_mounts import create_fs
from kit.keys import add_key, encrypted, keys_of, new_key_file, states, told, typed
from kit.mounts import Mounted, PoolMaker
from kit.processes import wait_until
from pmemfs.cli.find import Report, ask
from pmemfs.errors import PmemfsError
from pmemfs.logs import log_file
from pmemfs.media.keyreport import Added, KeyReport, KeyWay
from pmemfs.mountinfo import mount_at

pytestmark = [pytest.mark.mount]


@pytest.fixture
def mounted(pools: PoolMaker) -> Mounted:
    return pools.mount(create_fs(pools, "fs0", "32M"))


def again(pools: PoolMaker, mounted: Mounted, *options: object) -> Mounted:
    pools.umount(mounted)
    return pools.mount(mounted.pool, *options)


def ways_of(mounted: Mounted, name: str = "work") -> list[tuple[int, str]]:
    (key,) = (key for key in keys_of(mounted) if key["name"] == name)
    return [(way["number"], way["kind"]) for way in key["ways"]]


def test_a_key_is_unlocked_when_it_is_made_and_locked_after_an_unmount(
    engine: object, pools: PoolMaker
) -> None:
    mounted = pools.mount(create_fs(pools, "fs0", "32M"))
    path = add_key(mounted)
    assert states(mounted) == {"work": True}
    directory = encrypted(mounted)
    mounted = again(pools, mounted)
    assert states(mounted) == {"work": False}
    assert "work, locked" in pmemfs_here("info", mounted.mountpoint)
    assert pmemfs_ok("unlock", directory, "--key-file", path) == "the key 'work' is unlocked\n"
    assert states(mounted) == {"work": True}
    assert "unlocked already" in pmemfs_ok("unlock", directory)
    assert pmemfs_ok("lock", directory) == "the key 'work' is locked\n"
    assert states(mounted) == {"work": False}
    assert pmemfs_ok("lock", directory) == "the key 'work' is locked already\n"
    pmemfs_ok("unlock", mounted.mountpoint, "--key", "work", "--key-file", path)
    assert [key["is_unlocked"] for key in mounted.info()["keys"]] == [True]


def test_a_passphrase_comes_through_a_pipe_and_a_wrong_one_is_one_sentence(
    pools: PoolMaker, mounted: Mounted
) -> None:
    assert told(["a passphrase"], "key", "add", mounted.mountpoint, "--name", "work").code == 0
    directory = encrypted(mounted)
    pmemfs_here("lock", directory)
    refused(told(["another"], "unlock", directory), 1, "'work'", "the passphrase is wrong")
    said = told(["another"], "unlock", directory, "--json")
    error = json.loads(said.err)
    assert (said.out, error["error"], error["errno"]) == ("", "WrongKey", "EKEYREJECTED")
    refused(told([""], "unlock", directory), 2, "this passphrase", "it is empty")
    refused(told([], "unlock", directory), 2, "this passphrase", "it is empty")
    assert states(mounted) == {"work": False}
    assert told(["a passphrase"], "unlock", directory).code == 0
    assert states(mounted) == {"work": True}
    assert "passphrase" not in log_file(str(mounted.pool)).read_text()


def test_a_terminal_asks_twice_for_what_is_new_and_shows_nothing_of_it(mounted: Mounted) -> None:
    add = ("key", "add", mounted.mountpoint, "--name", "work", "--passphrase")
    other = typed(["hidden one", "hidden two"], *add)
    assert (other.code, keys_of(mounted)) == (2, [])
    assert "another one the second time" in other.out
    made = typed(["hidden one", "hidden one"], *add)
    assert made.code == 0
    directory = encrypted(mounted)
    pmemfs_here("lock", directory)
    wrong = typed(["hidden two"], "unlock", directory)
    assert (wrong.code, "is wrong" in wrong.out) == (1, True)
    right = typed(["hidden one"], "unlock", directory)
    assert (right.code, "Passphrase for the key 'work'" in right.out) == (0, True)
    assert not any("hidden" in said.out for said in (other, made, wrong, right))


def test_a_passphrase_that_was_changed_unlocks_no_more_and_the_new_one_does(
    pools: PoolMaker, mounted: Mounted
) -> None:
    told(["the old one"], "key", "add", mounted.mountpoint, "--name", "work")
    directory = encrypted(mounted)
    mounted = again(pools, mounted)
    change = ("key", "change", mounted.mountpoint, "--name", "work")
    refused(told(["no", "the new one"], *change), 1, "the passphrase is wrong")
    assert told(["the old one", "the new one"], *change).code == 0
    # Whoever says it again is told that the old one is wrong, for so it is now.
    refused(told(["the old one", "the new one"], *change), 1, "the passphrase is wrong")
    refused(told(["no", "the new one"], *change), 1, "the passphrase is wrong")
    refused(told(["the new one", "the new one"], *change), 2, "nothing was changed", "of before")
    assert states(mounted) == {"work": False}
    assert ways_of(mounted) == [(1, "passphrase")]
    refused(told(["the old one"], "unlock", directory), 1, "the passphrase is wrong")
    assert told(["the new one"], "unlock", directory).code == 0


def asked(mounted: Mounted, method: str, shape: type[Report], **params: object) -> Report:
    mount = mount_at(str(mounted.mountpoint))
    assert mount is not None
    return ask(mount, method, shape, **params)


def test_an_answer_to_a_change_that_was_lost_is_given_to_who_asks_again_and_to_nobody_else(
    mounted: Mounted,
) -> None:
    told(["old"], "key", "add", mounted.mountpoint, "--name", "work")

    def ask_change(old: str, salt: str) -> object:
        texts = {"secret": old, "new_secret": "new"}
        given = {name: base64.b64encode(text.encode()).decode() for name, text in texts.items()}
        kinds = {"kind": "passphrase", "new_kind": "passphrase"}
        return asked(mounted, "key-change", KeyReport, name="work", salt=salt, **given, **kinds)

    first, other = "01" * 16, "02" * 16
    once = ask_change("old", first)
    assert ask_change("old", first) == once
    for old in ("old", "no"):
        with pytest.raises(PmemfsError, match="the passphrase is wrong"):
            ask_change(old, other)
    with pytest.raises(PmemfsError, match="hexadecimal"):
        ask_change("new", "0102")


def test_an_addition_and_a_removal_whose_answers_were_lost_are_found_to_be_made(
    mounted: Mounted,
) -> None:
    secret = {"secret": base64.b64encode(bytes(32)).decode(), "kind": "key file"}

    def add(salt: str) -> Added:
        return asked(mounted, "key-add", Added, name="work", salt=salt, **secret)

    first, other = "01" * 16, "02" * 16
    made = add(first)
    assert (made.is_new_way, len(made.key.ways)) == (True, 1)
    assert add(first) == made
    assert add(other) == made._replace(is_new_way=False)
    told(["a passphrase"], "key", "add", mounted.mountpoint, "--name", "work")

    def remove(ways: tuple[KeyWay, ...], *, is_forced: bool = False) -> KeyReport:
        return asked(
            mounted, "key-remove", KeyReport, name="work", key_id=made.key.key_id,
            ways=[way._asdict() for way in ways], is_forced=is_forced,
        )  # fmt: skip

    chosen = asked(mounted, "key-ways", KeyReport, name="work", **secret).ways
    assert chosen == made.key.ways
    once = remove(chosen)
    assert [way.kind for way in once.ways] == ["passphrase"]
    assert remove(chosen) == once
    # What has got the number since then is another way.
    assert add(first).key.ways[0].number == chosen[0].number
    assert len(remove(chosen).ways) == 2
    left = remove(chosen).ways
    with pytest.raises(PmemfsError, match="in no other way"):
        remove(left)
    assert remove(left, is_forced=True).ways == ()
    # Also by a daemon that knows nothing of it.
    pmemfs_ok("upgrade", mounted.mountpoint)
    again = remove(left, is_forced=True)
    assert (again.name, again.is_unlocked, again.ways) == ("work", True, ())


def test_of_two_who_add_the_same_at_once_one_is_told_that_he_has_made_the_key(
    mounted: Mounted,
) -> None:
    def adding() -> subprocess.Popen[str]:
        words = [BIN / "pmemfs", "key", "add", mounted.mountpoint, "--name", "work"]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with adding() as one, adding() as other:
        for process in (one, other):
            # By then it has been told that there is no such key.
            wait_until(partial(reads_input, process.pid), "it waits for a passphrase")
        for process in (one, other):
            assert process.stdin is not None
            process.stdin.write("the same\n")
            process.stdin.close()
        said = sorted(process.stdout.read()[:15] for process in (one, other) if process.stdout)
    assert (one.returncode, other.returncode) == (0, 0)
    assert said == ["made the key 'w", "the passphrase "]
    assert ways_of(mounted) == [(1, "passphrase")]


def reads_input(pid: int) -> bool:
    """Whether a process waits in read(2) of its standard input."""
    return Path(f"/proc/{pid}/syscall").read_text().startswith("0 0x0 ")


def test_a_change_to_what_unlocks_the_key_already_leaves_one_way_of_both(
    pools: PoolMaker, mounted: Mounted
) -> None:
    at = mounted.mountpoint
    for phrase in ("one", "leaked", "other"):
        told([phrase], "key", "add", at, "--name", "work")
    directory = encrypted(mounted)
    change = ("key", "change", at, "--name", "work")
    refused(told(["leakde", "one"], *change), 1, "the passphrase is wrong")
    assert len(ways_of(mounted)) == 3
    assert told(["leaked", "one"], *change).code == 0
    assert ways_of(mounted) == [(2, "passphrase"), (3, "passphrase")]
    pmemfs_ok("lock", directory)
    refused(told(["leaked"], "unlock", directory), 1, "the passphrase is wrong")
    assert told(["one"], "unlock", directory).code == 0
    remove = ("key", "remove", at, "--name", "work", "--passphrase")
    assert "in 1 way now" in told(["one"], *remove).out
    refused(told(["one"], *remove), 1, "the passphrase is wrong")


def test_a_key_whose_last_way_was_removed_takes_a_new_one_and_is_locked_only_by_force(
    pools: PoolMaker, mounted: Mounted
) -> None:
    at, path = mounted.mountpoint, add_key(mounted)
    directory = encrypted(mounted)
    (directory / "file").write_text("content")
    (at / "more").mkdir()
    key_id = keys_of(mounted)[0]["key_id"]
    remove = ("key", "remove", at, "--name", "work", "--force")
    said = pmemfs_ok(*remove)
    assert "'pmemfs key add' takes that back" in said
    refused(pmemfs("lock", directory), 3, "nothing unlocks the key 'work'", "--force")
    refused(pmemfs("encrypt", at / "more", "--key", "work"), 1, "nothing unlocks")
    pmemfs_ok("key", "add", at, "--name", "work", "--key-file", path)
    pmemfs_ok("lock", directory)
    pmemfs_ok("unlock", directory, "--key-file", path)
    assert [(key["name"], key["key_id"]) for key in keys_of(mounted)] == [("work", key_id)]
    # Whoever takes the mount over does not know the name.
    pmemfs_ok(*remove)
    pmemfs_ok("upgrade", at)
    assert [(key["name"], key["key_id"]) for key in keys_of(mounted)] == [("", key_id)]
    refused(pmemfs("lock", directory), 3, key_id)
    pmemfs_ok("key", "add", at, "--name", key_id, "--key-file", path)
    mounted = again(pools, mounted)
    pmemfs_ok("unlock", directory, "--key-file", path)
    assert (directory / "file").read_text() == "content"


def test_a_passphrase_is_the_same_with_either_line_end_and_however_it_is_composed(
    mounted: Mounted,
) -> None:
    def piped(raw: bytes, *words: object) -> int:
        command = [BIN / "pmemfs", *map(str, words)]
        return subprocess.run(command, input=raw, capture_output=True, check=False).returncode

    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    assert piped(f"{apart}\r\n".encode(), "key", "add", mounted.mountpoint, "--name", "work") == 0
    directory = encrypted(mounted)
    for text in (f"{composed}\n", f"{composed}\r\n", f"{apart}\n", composed):
        pmemfs_ok("lock", directory)
        assert piped(text.encode(), "unlock", directory) == 0
    pmemfs_ok("lock", directory)
    for text in (f"{composed} \n", f" {composed}\n", f"{composed}\n\n", f"{composed}\r\r\n"):
        assert (piped(text.encode(), "unlock", directory) == 0) == (text == f"{composed}\n\n")
        pmemfs_ok("lock", directory)
    assert piped(b"\xff\xfe\n", "key", "add", mounted.mountpoint, "--name", "raw") == 0


def test_the_command_that_a_new_key_is_told_with_is_one_for_a_shell(mounted: Mounted) -> None:
    path = new_key_file(mounted.pool.parent)
    said = pmemfs_ok("key", "add", mounted.mountpoint, "--name", "a b", "--key-file", path)
    assert "--key 'a b'" in said


def test_a_key_has_several_ways_to_unlock_it_and_each_is_enough(
    pools: PoolMaker, mounted: Mounted, tmp_path: Path
) -> None:
    first = add_key(mounted)
    directory = encrypted(mounted)
    add = ("key", "add", mounted.mountpoint, "--name", "work")
    assert "in 2 ways now" in told(["a passphrase"], *add).out
    second = new_key_file(tmp_path)
    assert "in 3 ways now" in pmemfs_ok(*add, "--key-file", second)
    assert "already, in 3 ways as before" in pmemfs_ok(*add, "--key-file", second)
    assert ways_of(mounted) == [(1, "key file"), (2, "passphrase"), (3, "key file")]
    assert len(keys_of(mounted)) == 1
    for path in (first, second):
        pmemfs_here("lock", directory)
        pmemfs_ok("unlock", directory, "--key-file", path)
    pmemfs_here("lock", directory)
    assert told(["a passphrase"], "unlock", directory).code == 0
    pmemfs_here("lock", directory)
    refused(pmemfs(*add, "--key-file", second), 1, "'work' is locked")
    refused(
        pmemfs("unlock", directory, "--key-file", new_key_file(tmp_path, "other")), 1,
        "the key file is wrong",
    )  # fmt: skip


def test_ways_are_removed_by_what_they_are_or_by_number_and_the_last_one_is_kept(
    pools: PoolMaker, mounted: Mounted
) -> None:
    path = add_key(mounted)
    directory = encrypted(mounted)
    told(["one"], "key", "add", mounted.mountpoint, "--name", "work")
    told(["two"], "key", "add", mounted.mountpoint, "--name", "work")
    remove = ("key", "remove", mounted.mountpoint, "--name", "work")
    refused(pmemfs(*remove), 2, "in 3 ways", "--way")
    refused(pmemfs(*remove, "--way", 7), 1, "has no way 7")
    refused(told(["no"], *remove, "--passphrase"), 1, "the passphrase is wrong")
    assert told(["one"], *remove, "--passphrase").code == 0
    assert ways_of(mounted) == [(1, "key file"), (3, "passphrase")]
    pmemfs_ok(*remove, "--way", 3)
    refused(pmemfs(*remove), 3, "in no other way", "lost", "--force")
    refused(pmemfs(*remove, "--key-file", path), 3, "in no other way")
    assert ways_of(mounted) == [(1, "key file")]
    assert "once it is locked" in pmemfs_ok(*remove, "--force")
    (key,) = keys_of(mounted)
    assert (key["name"], key["is_unlocked"], key["ways"]) == ("work", True, [])
    pmemfs_here("lock", directory, "--force")
    assert keys_of(mounted) == []
    refused(pmemfs("unlock", directory), 1, key["key_id"], "can't be read")


def test_keys_of_a_pool_that_is_not_mounted_are_listed_and_nothing_is_written(
    pools: PoolMaker, mounted: Mounted, tmp_path: Path
) -> None:
    nothing = pools.create("fs1", "16M", "--mode", "fs")
    said = pmemfs_ok("key", "list", nothing)
    assert said == f"{nothing} has no keys; 'pmemfs key add' makes one once it is mounted\n"
    for name in ("work", "other"):
        add_key(mounted, name)
    told(["a passphrase"], "key", "add", mounted.mountpoint, "--name", "work")
    unlocked, pool = keys_of(mounted), mounted.pool
    pools.umount(mounted)
    before = pool.read_bytes()
    keys = [{**key, "is_unlocked": False} for key in unlocked]
    assert json.loads(pmemfs_ok("key", "list", pool, "--json")) == keys
    assert "work   locked    2  passphrase" in pmemfs_ok("key", "list", pool)
    assert json.loads(pmemfs_ok("info", pool, "--json"))["keys"] == keys
    assert "work, locked; unlocked by key file, passphrase" in pmemfs_ok("info", pool)
    assert pool.read_bytes() == before
    device = pools.create("device", "16M")
    refused(pmemfs("key", "list", device), 1, "mode block", "mode fs")
    assert json.loads(pmemfs_ok("info", device, "--json"))["keys"] == []
    refused(pmemfs("key", "list", tmp_path), 1, "not a pmemfs mount")


def test_a_damaged_file_system_is_named_where_its_keys_are_wanted(
    pools: PoolMaker, mounted: Mounted
) -> None:
    add_key(mounted)
    pools.umount(mounted)
    with mounted.pool.open("r+b") as file:
        zone = json.loads(pmemfs_ok("info", mounted.pool, "--json"))["pool"]["zones"]["data"]
        file.seek(zone["offset_bytes"])
        file.write(os.urandom(64 << 10))
    refused(pmemfs("key", "list", mounted.pool), 4, "damaged")
    assert json.loads(pmemfs_ok("info", mounted.pool, "--json"))["keys"] is None
    assert "'pmemfs check' says how" in pmemfs_ok("info", mounted.pool)


def test_what_is_no_key_no_name_and_no_directory_of_a_mount_is_said_in_a_sentence(
    pools: PoolMaker, mounted: Mounted, tmp_path: Path
) -> None:
    at, path = mounted.mountpoint, new_key_file(tmp_path)
    add = ("key", "add", at, "--key-file", path, "--name")
    refused(pmemfs(*add, ""), 2, "it is empty")
    refused(pmemfs(*add, "n" * 65), 2, "more than 64 bytes")
    refused(pmemfs(*add, "a\tb"), 2, "can't be shown")
    pmemfs_ok(*add, "n" * 64)
    short = tmp_path / "short"
    short.write_bytes(b"x" * 31)
    refused(pmemfs("key", "add", at, "--name", "k", "--key-file", short), 2, "31 bytes")
    refused(pmemfs("key", "add", at, "--name", "k", "--key-file", tmp_path / "none"), 1, "none")
    refused(pmemfs("key", "add", at, "--name", "k", "--key-file", short, "--passphrase"), 2)
    refused(pmemfs("unlock", at), 1, "is not encrypted", "--key")
    refused(pmemfs("lock", at), 1, "is not encrypted")
    refused(pmemfs("lock", at, "--key", "none"), 1, "there is no key 'none'")
    refused(pmemfs("unlock", tmp_path), 1, "another file system")
    refused(pmemfs("encrypt", at, "--key", "none"), 1, "there is no key 'none'")
    (at / "directory").mkdir()
    (at / "directory" / "file").write_text("plain")
    refused(pmemfs("encrypt", at / "directory", "--key", "n" * 64), 1, "it has files")
    refused(pmemfs("encrypt", at / "directory/file", "--key", "n" * 64), 1, "not a directory")
    device = pools.mount(pools.create("device", "16M"))
    refused(pmemfs("key", "list", device.mountpoint), 1, "mode block", "mode fs")


def test_a_read_only_mount_unlocks_keys_and_makes_none(pools: PoolMaker, mounted: Mounted) -> None:
    path = add_key(mounted)
    directory = encrypted(mounted)
    mounted = again(pools, mounted, "-o", "ro")
    pmemfs_ok("unlock", directory, "--key-file", path)
    said = pmemfs("key", "add", mounted.mountpoint, "--name", "more", "--key-file", path)
    refused(said, 1, "can't be stored", "read-only")
    pmemfs_ok("lock", directory)


def fill(directory: Path) -> None:
    """Leave no room, not even for an empty file."""
    numbers = itertools.count()
    # Twice, because what lies ready behind the end of a file comes back after it was closed.
    for length in (1 << 20, 1 << 12, 0) * 2:
        with suppress(OSError):
            while True:
                (directory / f"{length} {next(numbers)}").write_bytes(bytes(length))


def test_a_full_pool_takes_no_new_key_but_changed_ones_and_locks_and_unlocks(
    pools: PoolMaker, tmp_path: Path
) -> None:
    mounted = pools.mount(create_fs(pools, "fs0", "8M"))
    first, second = add_key(mounted), new_key_file(tmp_path)
    at, directory = mounted.mountpoint, encrypted(mounted)
    fill(directory)
    # What the root directory has has room for some more records.
    many = (pmemfs("key", "add", at, "--name", f"k{n}", "--key-file", first) for n in range(64))
    said = next(said for said in many if said.code)
    refused(said, 1, "can't be stored", "no space")
    count = len(states(mounted))
    pmemfs_ok("key", "change", at, "--name", "work", "--key-file", first,
              "--new-key-file", second)  # fmt: skip
    pmemfs_ok("lock", directory)
    pmemfs_ok("unlock", directory, "--key-file", second)
    assert list(states(mounted).values()) == [True] * count


def test_attributes_that_have_keys_are_shown_to_nobody(mounted: Mounted) -> None:
    add_key(mounted)
    at = mounted.mountpoint
    assert os.listxattr(at) == []
    name = f"pmemfs.key.{keys_of(mounted)[0]['key_id']}.1"
    for call in (os.getxattr, os.removexattr):
        with pytest.raises(OSError, match="not supported"):
            call(at, name)
    with pytest.raises(OSError, match="not supported"):
        os.setxattr(at, name, b"value")


def test_no_process_of_a_mount_with_keys_has_its_memory_in_a_core_file(mounted: Mounted) -> None:
    def filters() -> list[int]:
        info = mounted.info()
        pids = [info["pid"], info["data_plane_pid"], info["kept"]["keeper_pid"]]
        return [int(Path(f"/proc/{pid}/coredump_filter").read_text(), 16) for pid in pids]

    assert 0 not in filters()
    add_key(mounted)
    assert filters() == [0, 0, 0]
