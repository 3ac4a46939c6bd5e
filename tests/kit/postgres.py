"""PostgreSQL with its data on a mount, at work with pgbench, which counts what was committed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from kit.processes import wait_until

_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
_USER = "postgres"
_SCALE = 2
_TOTALS = (
    "select (select sum(abalance) from pgbench_accounts), (select sum(bbalance) from"
    " pgbench_branches), (select sum(tbalance) from pgbench_tellers),"
    " coalesce((select sum(delta) from pgbench_history), 0),"
    " (select count(*) from pgbench_history)"
)


def is_installed() -> bool:
    """Whether it can be run here; root becomes the user that it insists on."""
    return bool(_BINARIES) and os.geteuid() == 0


class Postgres:
    """A server with the tables of pgbench."""

    def __init__(self, place: Path) -> None:
        """`place` is for the data. All directories above let others pass."""
        self.place = place
        # Directories of tests are root's alone, and too deep for the name of a socket.
        self._sockets = Path(tempfile.mkdtemp(prefix="pmemfs-postgres-"))
        self._log = self._sockets / "log"
        self.committed = 0
        place.mkdir(mode=0o700)
        self._log.touch()
        for made in (place, self._sockets, self._log):
            shutil.chown(made, _USER, _USER)
        self._ok("initdb", "-D", place, "-A", "trust", "-U", _USER, "--no-sync", "-N")
        with self._log.open("ab") as log:
            self._server = subprocess.Popen(
                [_BINARIES[-1] / "postgres", "-D", place, "-k", self._sockets,
                 "-c", "listen_addresses=", "-c", "shared_buffers=16MB", "-c", "max_wal_size=64MB",
                 "-c", "checkpoint_timeout=30s"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, **_as_its_user(),
            )  # fmt: skip
        wait_until(lambda: self._run("pg_isready", "-h", self._sockets).returncode == 0, "it runs")
        self._ok("pgbench", "-h", self._sockets, "-i", "-q", "-s", _SCALE, "postgres")

    @property
    def pid(self) -> int:
        """The server."""
        return self._server.pid

    def work(self, transactions: int = 100) -> str:
        """Let 4 clients commit so many transactions each; what went wrong, if something did."""
        words = ["-h", self._sockets, "-n", "-c", 4, "-j", 2, "-t", transactions, "postgres"]
        done = self._run("pgbench", *words)
        said = done.stdout + done.stderr
        counted = re.search(r"actually processed: (\d+)/", said)
        self.committed += int(counted[1]) if counted else 0
        return "" if done.returncode == 0 and "aborted" not in said else said[-600:]

    def end(self) -> str:
        """Stop the server; what is wrong with its data, if something is."""
        query = ["-h", self._sockets, "-At", "-F", " ", "-c", _TOTALS, "postgres"]
        found = self._run("psql", *query)
        self._run("psql", "-h", self._sockets, "-c", "checkpoint", "postgres")
        self._server.send_signal(signal.SIGINT)
        self._server.wait(60)
        if found.returncode or not found.stdout:
            return found.stderr
        *sums, count = map(int, found.stdout.split())
        if len(set(sums)) != 1 or count != self.committed:
            return f"sums {sums}; {count} transactions, and {self.committed} were committed"
        log = [line for line in self._log.read_text().splitlines()
               if re.search("PANIC|FATAL|ERROR|could not", line)]  # fmt: skip
        return "; ".join(line for line in log if "starting up" not in line)

    def kill(self) -> None:
        """End it, whatever it does, and take its files away that are not on the mount."""
        self._server.kill()
        self._server.wait()
        shutil.rmtree(self._sockets, ignore_errors=True)

    def _ok(self, *words: object) -> None:
        done = self._run(*words)
        assert done.returncode == 0, f"{words[0]}: {done.stderr}"

    def _run(self, program: object, *words: object) -> subprocess.CompletedProcess[str]:
        command = [str(_BINARIES[-1] / str(program)), *map(str, words)]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=240, **_as_its_user(),
        )  # fmt: skip


def _as_its_user() -> dict[str, Any]:
    return {"user": _USER, "group": _USER, "extra_groups": [], "cwd": "/"}
