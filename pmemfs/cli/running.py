"""The one place where an error becomes a sentence and an exit code. Loads next to nothing."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from errno import ENOKEY

from pmemfs.cli.early import EXIT_INTERRUPTED
from pmemfs.cli.output import begin_line, complain, heard_output, speaking
from pmemfs.errors import (
    EXIT_CANNOT_CHECK,
    EXIT_FAILED,
    EXIT_MOUNT_FAILED,
    Interrupted,
    OutputLost,
    PmemfsError,
    sentence_of,
)

_EXIT_OUTPUT_LOST: dict[str | None, int] = {
    "check": EXIT_CANNOT_CHECK,
    "mount": EXIT_MOUNT_FAILED,
    "umount": EXIT_MOUNT_FAILED,
    "mount.pmemfs": EXIT_MOUNT_FAILED,
}
"""What commands that have exit codes of their own end with where nobody takes what they say."""


def run_guarded(act: Callable[[], int], command: str | None, *, as_json: bool = False) -> int:
    """Run what a command does; its exit code. Nothing that a user does wrong prints a traceback.

    Nobody may have taken what it said, which is a failure too, also where the rest went well.
    """
    # A path need not be text in the user's encoding, and must not stop us from naming it.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with speaking(as_json=as_json):
        try:
            with heard_output():
                return _run(act)
        except OutputLost as lost:
            code = _EXIT_OUTPUT_LOST.get(command, EXIT_FAILED)
            if not lost.has_no_reader:
                complain(str(lost), exit_code=code, error=lost)
            return code


def _run(act: Callable[[], int]) -> int:
    """As `run_guarded`. Raises OutputLost."""
    try:
        return act()
    except KeyboardInterrupt as error:
        begin_line()
        complain("interrupted", exit_code=EXIT_INTERRUPTED, error=error)
        return EXIT_INTERRUPTED
    except OutputLost:
        raise
    except PmemfsError as error:
        if isinstance(error, Interrupted):
            begin_line()
        complain(str(error), exit_code=error.exit_code, error=error)
        return error.exit_code
    except OSError as error:
        # The system's words for it name no key of ours, and no way to go on.
        hint = "; it is encrypted, and 'pmemfs unlock' unlocks it" if error.errno == ENOKEY else ""
        complain(sentence_of(error) + hint, exit_code=EXIT_FAILED, error=error)
        return EXIT_FAILED


def asks_for_json(words: Sequence[str]) -> bool:
    """Whether a command line asks for JSON, be it right or wrong."""
    own = words[: words.index("--")] if "--" in words else words
    return "--json" in own
