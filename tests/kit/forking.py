"""A process that has loaded the program, and forks one for each command that a test gives.

A test talks to it through `kit/forked`. Each child runs the installed script, as a process with the
words, the environment, the directory and the standard files that it would have been started with.
Only Python's start and the modules are shared, so what is said about those is to be proved by a
program that is started afresh.

Loads no pyfuse3, as a native mount does not, and nothing that starts a thread.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

WORDS_BYTES = 16 << 10
"""The room for a command's words in /proc/PID/cmdline, which whoever starts this makes."""
PACKAGES = ("pmemfs.cli", "pmemfs.observe", "pmemfs.pins")


def load() -> None:
    """Load what commands and daemons load."""
    importlib.import_module("pmemfs.daemons.mountd")
    for name in PACKAGES:
        package = importlib.import_module(name)
        for module in pkgutil.iter_modules(package.__path__, f"{name}."):
            importlib.import_module(module.name)
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    gc.collect()
    gc.freeze()


def serve(channel: socket.socket) -> None:
    """Fork for each command; in the child, return as that command."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for fd, _ in poll.poll():
            if fd in running:
                poll.unregister(fd)
                pid, asker = running.pop(fd)
                os.close(fd)
                _, status = os.waitpid(pid, 0)
                with suppress(BrokenPipeError), asker:
                    asker.send(str(os.waitstatus_to_exitcode(status)).encode())
                continue
            _, fds, _, _ = socket.recv_fds(channel, 1, 5)
            if not fds:
                sys.exit(0)
            if not (pid := os.fork()):
                _become(*fds)
                return
            asker = socket.socket(fileno=fds.pop())
            for fd in fds:
                os.close(fd)
            asker.send(str(pid).encode())
            pidfd = os.pidfd_open(pid)
            running[pidfd] = pid, asker
            poll.register(pidfd, select.POLLIN)


def _become(command_fd: int, *fds: int) -> None:
    command = json.loads(os.pread(command_fd, os.fstat(command_fd).st_size, 0))
    take(*fds[:3])
    for limit, values in command["limits"]:
        resource.setrlimit(limit, values)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(command["environment"])
    os.chdir(command["directory"])
    os.umask(command["umask"])
    sys.argv[:] = command["words"]
    _show(sys.argv)


def take(*fds: int) -> None:
    """Have these standard files and no others."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    # What Python has made of those that this process began with knows what kind of files they were.
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        new = os.fdopen(fd, "w" if fd else "r", encoding=old.encoding, errors=old.errors,
                        closefd=False)  # fmt: skip
        if name == "stderr":
            new.reconfigure(line_buffering=True)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


def _show(words: list[str]) -> None:
    """Let others see these words, followed by zeros, and the name that a started script has."""
    shown = b"\0".join(map(os.fsencode, [sys.executable, *words]))[: WORDS_BYTES - 1] + b"\0"
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(stat[45]), int(stat[46])
    ctypes.memmove(start, shown.ljust(end - start, b"\0"), end - start)
    Path("/proc/self/comm").write_text(Path(words[0]).name)


def main() -> None:
    """Serve until the test that started this ends; in a child, be the command."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    load()
    serve(socket.socket(fileno=int(sys.argv[1])))
    run_as_started()


def run_as_started() -> None:
    """Be the script that the words name."""
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, str):
            _end(end.code or 0)
        raise


def _end(code: int) -> NoReturn:
    """As Python's end, which would also take apart all modules, and that takes longer than most
    commands."""
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
