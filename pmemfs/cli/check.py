"""`pmemfs check`: verify a pool that is not mounted. Writes nothing; answers like fsck(8)."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from pmemfs.check import check_pool, has_errors
from pmemfs.cli.output import json_option, print_facts, print_json
from pmemfs.errors import PmemfsError
from pmemfs.medium.mapped import MappedMedium

_EXIT_CLEAN = 0
_EXIT_ERRORS_LEFT = 4
_EXIT_CANNOT_CHECK = 8


@click.command()
@click.argument("pool")
@json_option
def check(pool: str, as_json: bool) -> int:
    """Verify everything that is stored on POOL, which must not be mounted.

    Exit codes: 0 nothing wrong, 4 errors were found (and left as they are), 8 it could not be
    checked, 2 bad usage.
    """
    try:
        medium = MappedMedium.open(pool, read_only=True)
        try:
            findings = check_pool(medium)
        finally:
            medium.close()
    except PmemfsError as error:
        print(f"pmemfs: {error}", file=sys.stderr)
        return _EXIT_CANNOT_CHECK
    failed = has_errors(findings)
    if as_json:
        print_json({"pool": pool, "ok": not failed, "findings": [asdict(f) for f in findings]})
    else:
        print_facts((f.what, f"{'ERROR: ' if f.is_error else ''}{f.sentence}") for f in findings)
        print(f"{pool}: {'errors were found' if failed else 'no errors'}")
    return _EXIT_ERRORS_LEFT if failed else _EXIT_CLEAN
