"""Mount options: what is understood is kept, everything else is refused by name."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.clock import AccessTimes
from pmemfs.errors import EXIT_USAGE, BadMountOption
from pmemfs.mount.options import MountOptions, split_words

kernel_words = st.sampled_from(
    ["nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime", "sync", "async"]
)
ids = st.integers(0, (1 << 32) - 2)


@given(
    st.builds(
        MountOptions,
        read_only=st.booleans(),
        allow_other=st.booleans(),
        uid=ids,
        gid=ids,
        mode=st.integers(0, 0o7777),
        populate=st.booleans(),
        huge_pages=st.booleans(),
        cached=st.booleans(),
        nodiratime=st.booleans(),
        keeper=st.booleans(),
        standby=st.booleans(),
        kernel=st.lists(
            kernel_words, max_size=5, unique_by=lambda word: word.removeprefix("no").lstrip("a")
        ).map(tuple),
    )
)
def test_options_survive_being_written_and_read(options: MountOptions) -> None:
    assert MountOptions.parse(options.as_text()) == options


@pytest.mark.parametrize(
    ("text", "noted"),
    [
        ("", AccessTimes.RELATIVE),
        ("strictatime", AccessTimes.STRICT),
        ("noatime", AccessTimes.NEVER),
        ("noatime,strictatime", AccessTimes.STRICT),
        ("strictatime,noatime", AccessTimes.NEVER),
        ("strictatime,relatime", AccessTimes.RELATIVE),
        ("strictatime,nostrictatime,nodiratime", AccessTimes.RELATIVE),
    ],
)
def test_of_options_for_times_of_access_the_later_one_counts(text: str, noted: AccessTimes) -> None:
    options = MountOptions.parse(text)
    assert options.access_times == noted
    assert options.nodiratime == ("nodiratime" in text)
    assert MountOptions.parse(options.as_text()) == options


def test_nothing_said_means_private_and_writable() -> None:
    options = MountOptions.parse("")
    assert options == MountOptions()
    assert (options.read_only, options.allow_other, options.mode) == (False, False, 0o600)
    assert (options.uid, options.gid) == (os.getuid(), os.getgid())


def test_the_columns_of_fstab_change_nothing() -> None:
    words = "defaults,rw,noauto,user,nofail,_netdev,x-systemd.automount,comment=a b,relatime,,"
    words += "X-mount.mkdir=755,owner,group,users,auto"
    assert MountOptions.parse(words) == MountOptions()


def test_what_proc_mounts_shows_of_every_fuse_mount_changes_nothing() -> None:
    words = "rw,user_id=7,group_id=7,default_permissions,rootmode=40000,fd=3,max_read=4096"
    assert MountOptions.parse(f"{words},blksize=4096") == MountOptions()


def test_a_context_may_have_commas_in_quotation_marks() -> None:
    context = 'context="system_u:object_r:tmp_t:s0:c127,c456"'
    options = MountOptions.parse(f"noexec,{context},ro")
    assert options.kernel == ("noexec", context)
    assert options.read_only
    with pytest.raises(BadMountOption, match="quotation mark"):
        MountOptions.parse('ro,context="a,b')


def test_options_that_nobody_could_keep_are_refused() -> None:
    """The kernel has a page for them, and the shared memory of a mount has no more."""
    most = 'context="' + "c" * 3900 + '"'
    assert MountOptions.parse(most).kernel == (most,)
    for text in ('context="' + "c" * 4000 + '"', f"{most},rootcontext={'é' * 100}"):
        with pytest.raises(BadMountOption, match="room for 4000 bytes"):
            MountOptions.parse(text)
        with pytest.raises(BadMountOption, match="room for 4000 bytes"):
            MountOptions().remounted(split_words(text))


def test_the_last_of_rw_and_ro_wins() -> None:
    assert MountOptions.parse("rw,ro").read_only
    assert not MountOptions.parse("ro,rw").read_only


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("bogus", "does not know it"),
        ("ro=1", "does not know it"),
        ("allow_other=yes", "does not know it"),
        ("uid", "needs a value, as in uid="),
        ("uid=", "is not a number"),
        ("uid=root", "is not a number"),
        ("uid=-1", "is not between 0 and"),
        ("gid=4294967295", "is not between 0 and 4294967294"),
        ("mode=8", "is not an octal number"),
        ("mode=10000", "is not between 0 and 7777"),
        ("hang_timeout=soon", "is not a number of seconds"),
        ("hang_timeout=86401", "is not between 0 and 86400"),
    ],
)
def test_an_option_that_is_not_valid_is_refused_by_name(option: str, why: str) -> None:
    with pytest.raises(BadMountOption, match=why) as caught:
        MountOptions.parse(f"ro,{option},allow_other")
    assert repr(option) in str(caught.value)
    assert (caught.value.errno, caught.value.exit_code) == (errno.EINVAL, EXIT_USAGE)


@given(st.text(max_size=30))
def test_any_text_is_options_or_is_refused(text: str) -> None:
    try:
        options = MountOptions.parse(text)
    except BadMountOption:
        return
    assert MountOptions.parse(options.as_text()) == options


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("noexec,exec", ("exec",)),
        ("exec,noexec", ("noexec",)),
        ("sync,nosuid,async", ("nosuid", "async")),
        ("nodev,nodev", ("nodev",)),
    ],
)
def test_of_two_options_that_contradict_each_other_the_later_counts(
    text: str, kept: tuple[str, ...]
) -> None:
    assert MountOptions.parse(text).kernel == kept


def test_the_memory_for_names_is_a_size_or_none() -> None:
    assert MountOptions.parse("names_memory=8M").names_memory == 8 << 20
    assert MountOptions.parse("names_memory=0").as_text(only_said=True) == "names_memory=0"
    assert MountOptions.parse("").remounted(["names_memory=1G"]).names_memory == 1 << 30
    for bad in ("8X", "-1", "99%", "0x10", "8192P"):
        with pytest.raises(BadMountOption, match=bad):
            MountOptions.parse(f"names_memory={bad}")


def test_memory_that_is_of_no_use_for_names_is_refused() -> None:
    assert MountOptions.parse("names_memory=64K").names_memory == 64 << 10
    with pytest.raises(BadMountOption, match="64KiB at least; with 0 the daemon serves all names"):
        MountOptions.parse("names_memory=63K")
    with pytest.raises(BadMountOption, match="64KiB at least"):
        MountOptions.parse("").remounted(["names_memory=1"])
    python = MountOptions.parse("engine=python,names_memory=0")
    assert python.names_memory == 0
    with pytest.raises(BadMountOption, match="only the native engine"):
        python.remounted(["names_memory=8M"])


@pytest.mark.parametrize("zero", ["0", "00", "0K", "0.0M"])
def test_no_memory_for_names_is_said_as_any_size(zero: str) -> None:
    assert MountOptions.parse(f"names_memory={zero}").names_memory == 0


def test_what_hangs_is_ended_only_where_something_starts_it_again() -> None:
    assert MountOptions.parse("cold_seconds=0").as_text(only_said=True) == "cold_seconds=0"
    assert MountOptions.parse("").remounted(["cold_seconds=7"]).cold_seconds == 7
    options = MountOptions.parse("hang_timeout=20")
    assert options.hang_timeout == 20
    assert MountOptions.parse(options.as_text()) == options
    with pytest.raises(BadMountOption, match="only a keeper"):
        MountOptions.parse("no_keeper,hang_timeout=20")


def test_a_mount_of_the_python_engine_is_not_kept() -> None:
    assert MountOptions.parse("keeper").is_kept
    assert not MountOptions.parse("no_keeper").is_kept
    assert not MountOptions.parse("engine=python").is_kept
    with pytest.raises(BadMountOption, match="ends with its daemon"):
        MountOptions.parse("keeper,engine=python")
