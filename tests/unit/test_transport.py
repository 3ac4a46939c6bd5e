"""The transport: which one, why, and what a kernel's release does and does not say."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.errors import TransportUnavailable
from pmemfs.mount.transport import (
    KNOWN_BAD,
    Offer,
    Wanted,
    choose_transport,
    known_problem,
    parse_release,
    read_offer,
)

GOOD = Offer("6.18.44-fc-v595", True, True, 0, True)
ENABLE = "echo Y > /sys/module/fuse/parameters/enable_uring"

OBSTACLES = [
    (replace(GOOD, has_fuse=False, uring_parameter=None), "modprobe fuse"),
    (replace(GOOD, uring_parameter=False), ENABLE),
    (replace(GOOD, uring_parameter=None), "built without CONFIG_FUSE_IO_URING"),
    (replace(GOOD, io_uring_disabled=2), "disabled for all processes"),
    (replace(GOOD, io_uring_disabled=1, is_root=False), "disabled for ordinary users"),
    (replace(GOOD, kernel_release="6.1.0-18-amd64", uring_parameter=None), "(6.1.0-18-amd64)"),
    (replace(GOOD, kernel_release="weird", uring_parameter=None), "no parameter enable_uring"),
]

offers = st.builds(
    Offer,
    kernel_release=st.sampled_from(["6.18.44", "6.18.5", "6.1.0", "7.1.4", "7.0", "weird", ""])
    | st.text(),
    has_fuse=st.booleans(),
    uring_parameter=st.sampled_from([None, False, True]),
    io_uring_disabled=st.integers(0, 2),
    is_root=st.booleans(),
    in_io_uring_group=st.booleans(),
)


def fake_root(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("6.18.44-fc-v595", (6, 18, 44)),
        ("6.1.0-18-amd64", (6, 1, 0)),
        ("6.18.39+rpt-rpi-v8", (6, 18, 39)),
        ("7.1-rc2", (7, 1, 0)),
        ("5.15.153.1-microsoft-standard-WSL2", (5, 15, 153)),
        ("6.14", (6, 14, 0)),
        ("6", None),
        ("weird", None),
        ("v6.18.44", None),
        ("", None),
        ("٦.١٨.٤٤", None),
        ("6." + "9" * 5000, None),
    ],
)
def test_a_release_is_the_numbers_it_begins_with(
    text: str, release: tuple[int, int, int] | None
) -> None:
    assert parse_release(text) == release


@given(st.text())
def test_any_release_is_read_or_not_believed(text: str) -> None:
    if parse_release(text) is None:
        assert known_problem(text)


@pytest.mark.parametrize("release", ["6.18.39", "6.18.44-fc-v595", "7.1.4", "7.2.0-rc1", "8.0"])
def test_a_kernel_that_has_the_fixes_is_not_held_to_be_bad(release: str) -> None:
    assert known_problem(release) is None


@pytest.mark.parametrize(
    "release", ["6.14.0", "6.17.0-5-generic", "6.18", "6.18.38", "6.19.1", "7.0.9", "7.1.3", "7.1"]
)
def test_a_kernel_without_the_fixes_is_known_bad_and_the_sentence_names_a_source(
    release: str,
) -> None:
    problem = known_problem(release)
    assert problem is not None
    assert f"({release})" in problem
    assert "CVE-2026-64261" in problem


def test_the_list_of_bad_kernels_is_in_order_and_does_not_overlap() -> None:
    ends = [end for bad in KNOWN_BAD for end in (bad.first, bad.fixed)]
    assert ends == sorted(ends)


def test_auto_takes_uring_where_it_is_offered_enabled_and_sound() -> None:
    choice = choose_transport("auto", GOOD)
    assert choice.transport == "uring"
    assert choice.sentence.startswith("transport uring; ")


@pytest.mark.parametrize(("offer", "words"), OBSTACLES)
def test_auto_takes_fd_and_says_what_keeps_it_from_uring(offer: Offer, words: str) -> None:
    choice = choose_transport("auto", offer)
    assert choice.transport == "fd"
    assert choice.sentence.startswith("transport fd; ")
    assert words in choice.sentence


@pytest.mark.parametrize(("offer", "words"), OBSTACLES)
def test_uring_that_was_asked_for_and_can_not_be_is_refused(offer: Offer, words: str) -> None:
    with pytest.raises(TransportUnavailable, match=r"^transport uring can't be used: ") as caught:
        choose_transport("uring", offer)
    assert words in str(caught.value)
    assert caught.value.errno == errno.ENOTSUP
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("release", ["6.17.0-5-generic", "6.18.38", "weird", "5.14.0-570.el9"])
def test_auto_trusts_no_kernel_that_is_bad_or_unknown_but_who_names_uring_gets_it(
    release: str,
) -> None:
    offer = replace(GOOD, kernel_release=release)
    assert choose_transport("auto", offer).transport == "fd"
    asked = choose_transport("uring", offer)
    assert asked.transport == "uring"
    assert release in asked.sentence


def test_nobody_is_told_to_enable_uring_on_a_kernel_that_is_known_bad() -> None:
    offer = replace(GOOD, kernel_release="6.18.38", uring_parameter=False)
    assert "known bad" in choose_transport("auto", offer).sentence
    assert ENABLE not in choose_transport("auto", offer).sentence


@pytest.mark.parametrize(
    ("changes", "transport"),
    [
        ({"is_root": True}, "uring"),
        ({"is_root": False, "in_io_uring_group": True}, "uring"),
        ({"is_root": False}, "fd"),
    ],
)
def test_a_restricted_io_uring_is_for_root_and_its_group(
    changes: dict[str, bool], transport: str
) -> None:
    offer = replace(GOOD, io_uring_disabled=1, **changes)  # type: ignore[arg-type]
    assert choose_transport("auto", offer).transport == transport


@given(offers, st.sampled_from(["auto", "fd", "uring"]))
def test_a_choice_is_one_line_and_never_another_transport_than_was_asked_for(
    offer: Offer, wanted: Wanted
) -> None:
    try:
        choice = choose_transport(wanted, offer)
    except TransportUnavailable:
        assert wanted == "uring"
        return
    assert wanted in ("auto", choice.transport)
    if offer.kernel_release.isprintable():
        assert len(choice.sentence.splitlines()) == 1


def test_an_offer_is_read_from_proc_and_sys(tmp_path: Path) -> None:
    root = fake_root(
        tmp_path,
        {
            "proc/sys/kernel/osrelease": "6.18.44-fc-v595\n",
            "proc/filesystems": "nodev\tsysfs\n\tfuseblk\nnodev\tfuse\n",
            "proc/self/status": "Name:\tx\nUid:\t7\t1000\t7\t7\nGid:\t9\t9\t9\t9\nGroups:\t4 24 \n",
            "proc/sys/kernel/io_uring_disabled": "1\n",
            "proc/sys/kernel/io_uring_group": "24\n",
            "sys/module/fuse/parameters/enable_uring": "Y\n",
        },
    )
    assert read_offer(root) == Offer("6.18.44-fc-v595", True, True, 1, False, True)
    (root / "proc/self/status").write_text("Uid:\t1000\t0\t0\t0\nGid:\t9\t9\t9\t9\nGroups:\t\n")
    (root / "sys/module/fuse/parameters/enable_uring").write_text("N\n")
    assert read_offer(root) == Offer("6.18.44-fc-v595", True, False, 1, True, False)


def test_a_machine_that_says_nothing_offers_nothing(tmp_path: Path) -> None:
    assert read_offer(tmp_path) == Offer("", False, None, 0, False)
    root = fake_root(
        tmp_path,
        {
            "proc/filesystems": "\tfuseblk\n",
            "proc/self/status": "Uid:\n",
            "proc/sys/kernel/io_uring_disabled": "garbage",
        },
    )
    assert read_offer(root) == Offer("", False, None, 0, False)
    assert choose_transport("auto", read_offer(root)).transport == "fd"


def test_this_machine_can_be_read() -> None:
    offer = read_offer()
    assert parse_release(offer.kernel_release)
    assert choose_transport("auto", offer).sentence
