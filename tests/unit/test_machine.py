"""The machine: what is found on made-up ones, good, poor and silent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pmemfs.cli.doctor import apply
from pmemfs.observe.finding import Finding, Setting, State, read_process
from pmemfs.observe.machine import can_mount, examine

ROOT_STATUS = (
    "Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t0\nCapEff:\t000001ffffffffff\nNoNewPrivs:\t0\n"
)
USER_STATUS = "Uid:\t1000\t1000\t1000\t1000\nGid:\t1000\t1000\t1000\t1000\nGroups:\t24 100\n" \
              "CapEff:\t0000000000000000\nNoNewPrivs:\t0\n"  # fmt: skip

IDLE = "sys/devices/system/cpu/cpuidle"
PARAMETERS = "sys/module/fuse/parameters"
SHMEM = "sys/kernel/mm/transparent_hugepage/shmem_enabled"

GOOD = {
    "proc/sys/kernel/osrelease": "6.18.44-fc-v595\n",
    "proc/sys/kernel/io_uring_disabled": "0\n",
    "proc/sys/net/core/wmem_max": "4194304\n",
    "proc/filesystems": "nodev\tsysfs\n\tfuseblk\nnodev\tfuse\nnodev\tfusectl\n",
    "proc/cpuinfo": "flags\t\t: fpu vme hypervisor lahf_lm\n",
    "proc/meminfo": "MemTotal: 100 kB\nMemAvailable:   2048 kB\n",
    "proc/self/status": ROOT_STATUS,
    "proc/self/limits": "Limit  Soft Limit  Hard Limit  Units\n"
    "Max open files            20000                20000                files     \n"
    "Max locked memory         8388608              unlimited            bytes     \n",
    "proc/self/mountinfo": "25 24 0:23 / /dev/shm rw - tmpfs tmpfs rw,huge=within_size\n"
    "26 24 0:24 / /sys/fs/fuse/connections rw - fusectl fusectl rw\n"
    "27 24 0:25 / /mnt/pmem rw - xfs /dev/pmem0 rw,dax=always\n",
    f"{PARAMETERS}/enable_uring": "Y\n",
    f"{PARAMETERS}/max_user_bgreq": "7866\n",
    f"{PARAMETERS}/max_user_congthresh": "7866\n",
    "sys/devices/system/cpu/online": "0-1\n",
    "sys/devices/system/cpu/possible": "0-1,4\n",
    "sys/module/haltpoll/parameters/guest_halt_poll_ns": "200000\n",
    f"{IDLE}/current_driver": "haltpoll\n",
    f"{IDLE}/current_governor": "haltpoll\n",
    SHMEM: "always within_size [advise] never deny force\n",
    "dev/fuse": "",
    "dev/pmem0": "",
    "dev/dax1.0": "",
    "dev/daxctl": "",
    "dev/shm/.keep": "",
    "usr/bin/fusermount3": "",
    "usr/lib/x86_64-linux-gnu/libfuse3.so.3": "",
    "usr/lib/x86_64-linux-gnu/libfuse3.so.3.14.0": "",
    "etc/fuse.conf": "# a comment\n user_allow_other\n",
}


class Machine:
    """A made-up machine that can be changed before it is looked at."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write(**GOOD)
        (root / "dev/fuse").chmod(0o666)
        (root / "usr/bin/fusermount3").chmod(0o4755)

    def write(self, **files: str) -> None:
        for name, text in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def remove(self, *names: str) -> None:
        for name in names:
            (self.root / name).unlink()

    def findings(self) -> list[Finding]:
        return examine(self.root)

    def finding(self, name: str) -> Finding:
        return next(f for f in self.findings() if f.name == name)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """One that has everything, looked at by root."""
    return Machine(tmp_path)


def test_on_a_good_machine_nothing_is_to_be_improved(machine: Machine) -> None:
    findings = machine.findings()
    assert {f.name: f.state for f in findings if f.state is not State.OK} == {}
    assert [f.command for f in findings if f.command] == []
    assert can_mount(findings)
    assert machine.finding("persistent memory").found == (
        "/dev/dax1.0, /dev/pmem0, /mnt/pmem (DAX)"
    )
    assert machine.finding("libfuse").found == "3.14.0"
    assert machine.finding("cpus").found == "2 online of 3 possible"
    assert "2MiB of memory available" in machine.finding("room").found


def test_a_name_is_used_once_and_a_finding_is_json(machine: Machine) -> None:
    findings = machine.findings()
    assert len({f.name for f in findings}) == len(findings)
    machine.write(**{f"{PARAMETERS}/enable_uring": "N\n"})
    as_json = json.loads(json.dumps(machine.finding("enable_uring").as_json()))
    assert as_json["state"] == "could be faster"
    assert as_json["setting"] == f"echo Y > /{PARAMETERS}/enable_uring"


def test_a_machine_that_says_nothing_gives_findings_and_can_not_mount(tmp_path: Path) -> None:
    findings = examine(tmp_path)
    assert not can_mount(findings)
    assert {f.name for f in findings if f.is_needed} == {"fuse", "/dev/fuse", "right to mount"}
    assert all(f.setting is None for f in findings)


def test_a_mount_whose_stores_are_held_up_is_named_with_what_would_help(machine: Machine) -> None:
    mounts = (machine.root / "proc/self/mountinfo").read_text()
    limit = "sys/class/bdi/0:41/strict_limit"
    machine.write(**{
        "proc/self/mountinfo": f"{mounts}28 24 0:41 / /home/a/mnt rw - fuse.pmemfs /dev/shm/a rw\n",
        limit: "1\n",
    })  # fmt: skip
    finding = machine.finding("dirty pages")
    assert (finding.state, finding.command) == (State.COULD_BE_FASTER, f"echo 0 > /{limit}")
    assert "/home/a/mnt" in finding.found
    machine.write(**{limit: "0\n"})
    assert machine.finding("dirty pages").state is State.OK


def test_nonsense_everywhere_gives_findings(machine: Machine) -> None:
    for name in GOOD:
        if name.startswith(("proc/sys", "proc/self/limits", "proc/self/status", "sys/", "proc/me")):
            machine.write(**{name: "\0 non: sense \xff\n"})
    unknown = {f.name for f in machine.findings() if f.state is State.UNKNOWN}
    assert unknown >= {"kernel", "max_user_bgreq", "socket size", "open files", "cpus"}
    process = read_process(machine.root)
    assert (process.uid, process.may_mount) == (65534, False)


@pytest.mark.parametrize(
    ("files", "name", "state", "words", "command"),
    [
        ({"proc/sys/kernel/osrelease": "weird\n"}, "kernel", "unknown", "weird", None),
        ({"proc/sys/kernel/osrelease": "6.17.0-5-generic\n"}, "kernel", "could be faster",
         "CVE-2026-64261", None),
        ({"proc/sys/kernel/osrelease": "6.17.0-5-generic\n"}, "transport", "could be faster",
         "known bad", None),
        ({f"{PARAMETERS}/enable_uring": "N\n"}, "enable_uring", "could be faster", "can't be used",
         f"echo Y > /{PARAMETERS}/enable_uring"),
        ({f"{PARAMETERS}/enable_uring": "N\n"}, "transport", "could be faster", "enable_uring",
         None),
        ({f"{PARAMETERS}/enable_uring": "N\n", "proc/sys/kernel/osrelease": "6.18.5\n"},
         "enable_uring", "ok", "off is right", None),
        ({"proc/sys/kernel/io_uring_disabled": "2\n"}, "io_uring", "could be faster", "is 2",
         "sysctl -w kernel.io_uring_disabled=0"),
        ({f"{PARAMETERS}/max_user_bgreq": "100\n"}, "max_user_bgreq", "could be faster",
         "may have 100 ", f"echo 1024 > /{PARAMETERS}/max_user_bgreq"),
        ({"proc/sys/net/core/wmem_max": "212992\n"}, "socket size", "could be faster", "128KiB",
         "sysctl -w net.core.wmem_max=1048576"),
        ({"proc/self/limits": "Max open files   10   4096   files\n"}, "open files",
         "could be faster", "3 CPUs", "ulimit -n 76"),
        ({f"{IDLE}/current_driver": "none\n", f"{IDLE}/current_governor": "menu\n"}, "cpu idle",
         "could be faster", "exit to its host", "modprobe cpuidle_haltpoll force=1"),
        ({f"{IDLE}/current_governor": "menu\n"}, "cpu idle", "could be faster", "governor menu",
         f"echo haltpoll > /{IDLE}/current_governor"),
        ({f"{IDLE}/current_driver": "intel_idle\n", "proc/cpuinfo": "flags : fpu\n"}, "cpu idle",
         "ok", "intel_idle", None),
        ({"proc/self/mountinfo": ""}, "fusectl", "could be faster", "12 ",
         "mount -t fusectl fusectl /sys/fs/fuse/connections"),
        ({"proc/self/mountinfo": ""}, "huge pages", "could be faster", "huge=never",
         "mount -o remount,huge=within_size /dev/shm"),
        ({"proc/self/mountinfo": "1 2 0:3 / /dev/shm rw - tmpfs none rw,huge=advise\n"},
         "huge pages", "could be faster", "slowly", "mount -o remount,huge=within_size /dev/shm"),
        ({SHMEM: "always within_size advise never [deny] force\n"}, "huge pages",
         "could be faster", "deny", f"echo never > /{SHMEM}"),
        ({SHMEM: "always within_size advise never deny [force]\n", "proc/self/mountinfo": ""},
         "huge pages", "ok", "force", None),
        ({"proc/meminfo": "MemAvailable: 0 kB\n"}, "room", "missing", "no pool fits", None),
        ({"proc/filesystems": "\tfuseblk\n"}, "fuse", "missing", "can be mounted",
         "modprobe fuse"),
    ],
)  # fmt: skip
def test_what_is_poor_is_found_with_the_command_that_improves_it(
    machine: Machine, files: dict[str, str], name: str, state: str, words: str, command: str | None
) -> None:
    machine.write(**files)
    finding = machine.finding(name)
    assert finding.state == state
    assert words in f"{finding.found} {finding.therefore}"
    assert finding.command == command


def test_without_persistent_memory_pools_can_still_be_mounted(machine: Machine) -> None:
    machine.remove("dev/pmem0", "dev/dax1.0")
    machine.write(**{"proc/self/mountinfo": ""})
    assert machine.finding("persistent memory").state == State.MISSING
    assert can_mount(machine.findings())


def test_root_of_a_container_that_may_not_mount_is_told_so(machine: Machine) -> None:
    machine.write(
        **{"proc/self/status": ROOT_STATUS.replace("000001ffffffffff", "00000000a80425fb")}
    )
    assert "CAP_SYS_ADMIN" in machine.finding("right to mount").found
    assert not can_mount(machine.findings())


def test_an_ordinary_user_can_mount_with_fusermount3(machine: Machine) -> None:
    machine.write(**{"proc/self/status": USER_STATUS})
    assert can_mount(machine.findings())
    assert "set-user-ID" in machine.finding("right to mount").found


@pytest.mark.parametrize(
    ("mode", "command"),
    [(0o755, "chmod u+s /usr/bin/fusermount3"), (None, "apt-get install fuse3")],
)
def test_an_ordinary_user_needs_fusermount3_with_its_bit(
    machine: Machine, mode: int | None, command: str
) -> None:
    machine.write(**{"proc/self/status": USER_STATUS})
    if mode is None:
        machine.remove("usr/bin/fusermount3")
    else:
        (machine.root / "usr/bin/fusermount3").chmod(mode)
    assert machine.finding("right to mount").command == command
    assert not can_mount(machine.findings())
    machine.write(**{"proc/self/status": ROOT_STATUS})
    assert can_mount(machine.findings()), "root mounts by itself"


def test_a_process_that_can_gain_no_rights_can_not_mount(machine: Machine) -> None:
    machine.write(**{"proc/self/status": USER_STATUS.replace("NoNewPrivs:\t0", "NoNewPrivs:\t1")})
    assert "no_new_privs" in machine.finding("right to mount").found
    assert not can_mount(machine.findings())


@pytest.mark.parametrize("status", [USER_STATUS, ROOT_STATUS])
def test_a_fuse_device_for_root_alone_stops_ordinary_users_only(
    machine: Machine, status: str
) -> None:
    (machine.root / "dev/fuse").chmod(0o600)
    machine.write(**{"proc/self/status": status})
    assert "chmod 666 /dev/fuse" in f"{machine.finding('/dev/fuse')}"
    assert can_mount(machine.findings()) == (status == ROOT_STATUS)


def test_a_limit_of_users_is_found_whoever_looks(machine: Machine) -> None:
    machine.write(
        **{"proc/self/status": USER_STATUS, "proc/self/limits": "Max locked memory 65536 65536 b\n"}
    )
    assert machine.finding("locked memory").command == "ulimit -l 8192"
    machine.write(**{"proc/self/status": ROOT_STATUS, "proc/sys/net/core/wmem_max": "212992\n"})
    assert machine.finding("locked memory").state == State.OK
    assert machine.finding("socket size").state == State.COULD_BE_FASTER


def test_only_what_is_safe_and_ends_with_the_boot_is_a_setting(machine: Machine) -> None:
    machine.write(
        **{
            f"{PARAMETERS}/enable_uring": "N\n",
            f"{PARAMETERS}/max_user_bgreq": "12\n",
            f"{PARAMETERS}/max_user_congthresh": "9\n",
            "proc/sys/net/core/wmem_max": "212992\n",
            "proc/sys/kernel/io_uring_disabled": "2\n",
            "proc/self/mountinfo": "",
            f"{IDLE}/current_driver": "none\n",
        }
    )
    settings = [f.setting for f in machine.findings() if f.setting]
    assert {setting.path for setting in settings} == {
        f"{PARAMETERS}/enable_uring",
        f"{PARAMETERS}/max_user_bgreq",
        f"{PARAMETERS}/max_user_congthresh",
        "proc/sys/net/core/wmem_max",
    }
    changes = [apply(setting, machine.root) for setting in settings]
    assert all(change.error is None for change in changes)
    assert not [f for f in machine.findings() if f.setting], "what was fixed is found to be well"


def test_a_change_says_what_was_and_how_to_undo_it(machine: Machine) -> None:
    machine.write(**{"proc/sys/net/core/wmem_max": "212992\n"})
    change = apply(Setting("proc/sys/net/core/wmem_max", "1048576"), machine.root)
    assert change.sentence == (
        "sysctl -w net.core.wmem_max=1048576: it was 212992 and is 1048576; "
        "to undo: sysctl -w net.core.wmem_max=212992"
    )


def test_a_change_that_fails_says_why_and_makes_no_file(machine: Machine) -> None:
    change = apply(Setting("sys/nothing", "1"), machine.root)
    assert change.sentence == "echo 1 > /sys/nothing: failed: no such file or directory"
    assert not (machine.root / "sys/nothing").exists()


def test_looking_changes_nothing(machine: Machine) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        paths = [p for p in machine.root.rglob("*") if p.is_file()]
        return {p: (p.stat().st_mtime_ns, p.stat().st_mode) for p in paths}

    before = state()
    machine.findings()
    assert state() == before


def test_this_machine_can_be_examined() -> None:
    assert [f.name for f in examine() if not (f.found and f.therefore)] == []
