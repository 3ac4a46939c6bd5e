"""What programs ask while a mount has no data plane is answered by the next one.

The kernel keeps it for each CPU apart, and with rings does not hand it over by itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kit.killing import mount_kept
from kit.mounts import NATIVE_ONLY, Mounted, PoolMaker
from kit.processes import is_running, stop, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.slow, *NATIVE_ONLY]

MORE_THAN_ENTRIES = 40
"""A ring has 32 at most."""

CALLERS = """
import os, sys, threading
directory, cpu, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.sched_setaffinity(0, {cpu})
answered = []
def ask(number):
    try:
        os.stat(f"{directory}/none-{cpu}-{number}")
    except FileNotFoundError:
        answered.append(number)
threads = [threading.Thread(target=ask, args=(number,)) for number in range(count)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(len(answered) != count)
"""


def waiting_threads(callers: subprocess.Popen[bytes]) -> int:
    """How many threads of a process wait for a file system in user space."""
    tasks = Path(f"/proc/{callers.pid}/task").iterdir()
    return sum("request_wait_answer" in (task / "stack").read_text() for task in tasks)


def ask_on_each_cpu(mounted: Mounted) -> list[subprocess.Popen[bytes]]:
    words = [sys.executable, "-c", CALLERS, str(mounted.mountpoint)]
    return [
        subprocess.Popen([*words, str(cpu), str(MORE_THAN_ENTRIES)])
        for cpu in sorted(os.sched_getaffinity(0))
    ]


def test_what_is_asked_on_any_cpu_while_no_data_plane_lives_is_answered(pools: PoolMaker) -> None:
    mounted = mount_kept(pools, pools.create("fs0", "64M", "--mode", "fs"))
    daemon, plane = mounted.pid, mounted.data_plane_pid
    # It can start no other one until all have asked.
    stop(daemon)
    try:
        os.kill(plane, signal.SIGKILL)
        wait_until(lambda: not is_running(plane), "the data plane has died")
        callers = ask_on_each_cpu(mounted)
        for each in callers:
            wait_until(lambda each=each: waiting_threads(each) == MORE_THAN_ENTRIES, "all wait")
    finally:
        os.kill(daemon, signal.SIGCONT)
    assert [each.wait(timeout=60) for each in callers] == [0] * len(callers)
    assert mounted.info()["kept"]["data_plane"]["times"] == 1
    assert mounted.data_plane_pid != plane
