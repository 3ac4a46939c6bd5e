"""What can go wrong, as classes; each message is one sentence for the person at the terminal."""


class BenchError(Exception):
    """The benchmark cannot go on; the message says why."""


class SubjectUnavailable(BenchError):
    """The subject cannot exist on this machine (no tool, no privilege): it is skipped."""


class SubjectFailed(BenchError):
    """The subject should have worked and did not: it is skipped, and the run exits with 1."""


class FioError(BenchError):
    """fio refused or failed; the message carries what fio itself said."""
