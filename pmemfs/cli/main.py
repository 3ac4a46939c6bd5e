"""`pmemfs`: the first moment of the program, before anything is loaded that takes long."""

from __future__ import annotations

import sys

from pmemfs.cli.catalogue import HELP_OPTIONS, VERSION_OPTIONS, first_word, told_at_once
from pmemfs.cli.early import begin, leave_quietly

_NO_DAEMON = frozenset(("--foreground", *HELP_OPTIONS, *VERSION_OPTIONS))
"""With these, `pmemfs mount` becomes the daemon, or only says something."""


def main() -> None:
    """The program."""
    begin()
    words = sys.argv[1:]
    is_remount = any("remount" in word for word in words)
    if first_word(words) != "mount" or not _NO_DAEMON.isdisjoint(words) or is_remount:
        sys.exit(_run(words))
    from pmemfs.control.prepared import discard, prepare

    prepare()
    code = _run(words)
    discard()
    sys.exit(code)


def _run(words: list[str]) -> int:
    told = told_at_once(words)
    if told is not None:
        from pmemfs.cli.output import say
        from pmemfs.cli.running import run_guarded

        lines = told.split("\n")
        return run_guarded(lambda: any(map(say, lines)), None)
    from pmemfs.cli.commands import pmemfs, run

    code = run(pmemfs, words)
    leave_quietly()
    return code


if __name__ == "__main__":
    main()
