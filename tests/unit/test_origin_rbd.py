"""What only Ceph does: locks that are taken away, dead clients, a cluster that stands still."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import trio

from kit.ceph_node import CephNode, Image
from kit.processes import stopped
from kit.sources import needs_root
from pmemfs.errors import NeedsPackage, OriginBusy, OriginFenced, OriginGone, UnusableOrigin
from pmemfs.origin import librbd, rbd
from pmemfs.origin.base import Left, Origin
from pmemfs.origin.opening import open_origin
from pmemfs.units import KIB, MIB
from pmemfs.volume.cache.link import LinkState, OriginLink

PAGE = 4 * KIB

pytestmark = [needs_root, pytest.mark.slow]


@pytest.fixture
def image(ceph: CephNode) -> Image:
    spec = f"rbd/{uuid.uuid4().hex[:12]}"
    ceph.rbd("create", "--size", "16M", spec)
    return Image(ceph, spec)


@pytest.fixture
def memory() -> memoryview:
    """Pages that are aligned as those of a pool are."""
    return memoryview(mmap.mmap(-1, MIB))


HOLDING = """
import sys, trio
from pmemfs.origin.opening import open_origin
async def main():
    origin = await open_origin(sys.argv[1])
    await origin.fence()
    print("held", flush=True)
    await trio.sleep(60)
trio.run(main)
"""

DYING = """
import os, signal, sys, trio
from pmemfs.origin.base import Left
from pmemfs.origin.opening import open_origin
async def main():
    origin = await open_origin(sys.argv[1], left=Left((), sys.argv[2].encode()))
    if sys.argv[3] == "holds":
        await origin.fence()
    print(origin.left().data.decode(), end="", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
trio.run(main)
"""


def holder(image: Image) -> subprocess.Popen[bytes]:
    """Another process that has the right to write."""
    words = [sys.executable, "-c", HOLDING, image.text]
    other = subprocess.Popen(words, stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    return other


def test_a_client_that_died_is_waited_for_and_the_wait_is_said(image: Image) -> None:
    other = holder(image)
    other.kill()
    other.wait()
    said: list[str] = []

    async def main() -> None:
        origin = await open_origin(image.text)
        await origin.fence(said.append)
        await origin.close()

    trio.run(main)
    (sentence,) = said
    assert sentence.startswith("no answer from client ")
    assert f"which had {image.text} open; waiting up to" in sentence


def test_the_successor_of_dead_processes_waits_for_nobody(
    image: Image, memory: memoryview, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Who waits for a dead one fails.
    monkeypatch.setattr(rbd, "WATCH_SECONDS", 0.0)
    lefts = [b""]
    for how in ("holds", "opens"):
        # The second one dies before it has the lock.
        words = [sys.executable, "-c", DYING, image.text, lefts[-1], how]
        other = subprocess.run(words, stdout=subprocess.PIPE, check=False)
        assert other.returncode == -signal.SIGKILL
        lefts.append(other.stdout)
    dead = [each.split()[0] for each in image.node.rbd("status", image.spec).split("watcher=")[1:]]
    assert len(dead) == 2
    said: list[str] = []

    async def main() -> None:
        origin = await open_origin(image.text, left=Left((), lefts[-1]))
        await origin.fence(said.append)
        # The marks are those that the dead ones have told of.
        assert origin.left().data.split()[0] == lefts[1].split()[0] == lefts[2].split()[0]
        noted = [await origin.mark(), await origin.next_mark()]
        await origin.write(0, [memory[:PAGE]])
        assert await origin.mark() == noted[1] != noted[0]
        again = Left((), origin.left().data)
        await origin.close()
        origin = await open_origin(image.text, left=again)
        await origin.fence(said.append)
        assert await origin.mark() == await origin.next_mark() == noted[1]
        await origin.close()

    trio.run(main)
    assert not said
    shut_out = image.node.ceph("osd", "blocklist", "ls")
    assert any(address in shut_out for address in dead)


def test_a_client_that_lives_keeps_the_image_and_nobody_waits_for_its_death(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rbd, "WATCH_SECONDS", 600.0)
    other = holder(image)
    said: list[str] = []

    async def main() -> None:
        origin = await open_origin(image.text)
        with pytest.raises(OriginBusy, match=f"has it open; 'rbd status {image.spec}' shows"):
            await origin.fence(said.append)
        await origin.close()

    trio.run(main)
    assert not said
    assert other.poll() is None
    other.kill()
    other.wait()


def test_whose_lock_was_broken_never_writes_again(image: Image, memory: memoryview) -> None:
    async def main() -> None:
        origin = await open_origin(image.text)
        await origin.fence()
        await origin.write(0, [memory[:PAGE]])
        (watcher,) = image.node.rbd("status", image.spec).split("watcher=")[1:]
        image.node.ceph("osd", "blocklist", "add", watcher.split()[0])
        # The cluster's decision reaches its OSDs a little later.
        with pytest.raises(OriginFenced, match="belongs to another host now"):
            await write_always(origin)
        link = OriginLink(origin, timeout_seconds=30)
        with pytest.raises(OriginFenced):
            await link.read(0, [memory[:PAGE]])
        assert link.retries == 0
        await origin.close()

    async def write_always(origin: Origin) -> None:
        while True:
            await origin.write(0, [memory[:PAGE]])

    trio.run(main)


# All tests have the cluster in common.
@pytest.mark.alone
def test_a_cluster_that_stands_still_shows_as_away_and_goes_on(
    image: Image, memory: memoryview
) -> None:
    async def main() -> None:
        origin = await open_origin(image.text)
        link = OriginLink(origin, timeout_seconds=0.5)
        await link.write(0, [memory[:PAGE]])
        async with trio.open_nursery() as watching:
            watching.start_soon(link.watch)
            async with trio.open_nursery() as nursery:
                with stopped(image.node.pid("osd.0")):
                    nursery.start_soon(link.write, PAGE, [memory[:PAGE]])
                    with trio.fail_after(60):
                        while link.state is not LinkState.AWAY:  # noqa: ASYNC110
                            await trio.sleep(0.01)
                await trio.to_thread.run_sync(image.node.wait_for_answers)
            assert "has not answered" in link.last_error
            assert link.state is LinkState.PRESENT
            watching.cancel_scope.cancel()
        await origin.close()

    trio.run(main)


def test_where_no_cluster_answers_opening_ends(
    ceph: CephNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rbd, "OPEN_SECONDS", 0.5)
    conf = tmp_path / "ceph.conf"
    conf.write_text("[global]\nmon host = v2:127.0.0.1:1\nauth client required = none\n"
                    "log file = /dev/null\n")  # fmt: skip
    with pytest.raises(OriginGone, match="is away"):
        trio.run(open_origin, f"rbd:rbd/x?conf={conf}")


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("rbd/none", "there is no such image; 'rbd ls rbd' shows"),
        ("nopool/x", "the cluster has no pool 'nopool'"),
        ("rbd/{image}@none", "there is no such image"),
    ],
)
def test_what_is_not_there_is_said(image: Image, spec: str, why: str) -> None:
    spec = spec.format(image=image.spec.partition("/")[2])
    with pytest.raises(UnusableOrigin, match=why):
        trio.run(open_origin, f"rbd:{spec}?conf={image.node.conf}")


def test_a_configuration_that_is_not_there_is_named(ceph: CephNode) -> None:
    with pytest.raises(UnusableOrigin, match="its configuration /none can't be read: no such"):
        trio.run(open_origin, "rbd:rbd/x?conf=/none")


def test_a_snapshot_is_for_reading_and_stays_as_it_was(image: Image, memory: memoryview) -> None:
    async def main() -> None:
        origin = await open_origin(image.text)
        memory[:PAGE] = b"1" * PAGE
        await origin.write(0, [memory[:PAGE]])
        await origin.close()
        image.node.rbd("snap", "create", "--no-progress", f"{image.spec}@then")
        origin = await open_origin(image.text)
        memory[:PAGE] = b"2" * PAGE
        await origin.write(0, [memory[:PAGE]])
        await origin.close()
        text = f"rbd:{image.spec}@then?conf={image.node.conf}"
        origin = await open_origin(text, read_only=True)
        await origin.read(0, [memory[:PAGE]])
        assert memory[:PAGE] == b"1" * PAGE
        assert origin.read_only
        assert not origin.can_fence
        await origin.close()

    trio.run(main)


def test_a_mark_can_be_compared_once_nobody_else_can_write(
    image: Image, memory: memoryview
) -> None:
    async def main() -> None:
        origin = await open_origin(image.text)
        await origin.fence()
        before = await origin.mark()
        memory[:PAGE] = os.urandom(PAGE)
        await origin.write(0, [memory[:PAGE]])
        first = await origin.mark()
        assert first != before
        await origin.write(PAGE, [memory[:PAGE]])
        await origin.discard(0, PAGE)
        await origin.flush()
        # Only the first change of a cache changes the mark.
        assert await origin.mark() == first
        await origin.close()
        second = await open_origin(image.text)
        await second.fence()
        assert await second.mark() == first
        await second.write_zeroes(0, PAGE, may_trim=True)
        assert await second.mark() != first
        await second.close()

    trio.run(main)


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(librbd, "RBD_LIBRARY", "librbd-that-nobody-has.so.1")
    with pytest.raises(NeedsPackage) as caught:
        trio.run(open_origin, "rbd:pool/image")
    assert "librbd1" in str(caught.value)
    assert "scripts/install-origins" in str(caught.value)


def test_a_configuration_without_monitors_or_keyring_is_named(
    ceph: CephNode, tmp_path: Path
) -> None:
    conf = tmp_path / "ceph.conf"
    conf.write_text(
        ceph.conf.read_text().replace("client required = none", "client required = cephx")
    )
    with pytest.raises(
        UnusableOrigin, match=f"{conf} names no monitor, or no keyring of client.me"
    ):
        trio.run(open_origin, f"rbd:rbd/x?id=me&conf={conf}")


def test_a_lock_that_somebody_has_made_by_hand_is_not_waited_for(image: Image) -> None:
    image.node.rbd("lock", "add", image.spec, "mine")

    async def main() -> None:
        origin = await open_origin(image.text)
        with pytest.raises(OriginBusy, match=f"rbd lock rm {image.spec} 'mine' client.* takes it"):
            await origin.fence()
        await origin.close()

    trio.run(main)


def test_an_image_that_nobody_can_be_kept_from_is_said_to_be_one(image: Image) -> None:
    image.node.rbd("feature", "disable", image.spec, "object-map", "exclusive-lock")
    said: list[str] = []

    async def main() -> None:
        origin = await open_origin(image.text)
        await origin.fence(said.append)
        await origin.close()

    trio.run(main)
    assert "lacks the feature exclusive-lock, so nothing keeps another client" in said[0]
