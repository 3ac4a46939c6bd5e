"""`pmemfs copy`: a file into a mount or out of it, straight between a device and pages."""

from __future__ import annotations

import os

import click

from pmemfs.cli.options import reporting
from pmemfs.cli.output import note, print_json, progress_bar, say
from pmemfs.cli.paths import ANY_PATH
from pmemfs.errors import BadUsage
from pmemfs.reach import check_answers
from pmemfs.units import format_size


@click.command()
@click.argument("source", metavar="SRC", type=ANY_PATH)
@click.argument("target", metavar="DST", type=ANY_PATH)
@click.option("--direct", is_flag=True, help="Fail where bytes would go through a buffer.")
@click.option("-n", "--no-clobber", is_flag=True, help="Leave a DST that is there as it is.")
@click.option("-f", "--force", is_flag=True, help="Replace a DST that may not be written to, too.")
@reporting
def copy(
    source: str, target: str, direct: bool, no_clobber: bool, force: bool, as_json: bool
) -> None:
    """Copy a file or a device into a mount, or out of one.

    SRC and DST are files or block devices, and at least one of them is in a mount. If DST is a
    directory, the copy has the name of SRC in it.

    The device that SRC or DST is on reads from the pages of the pool, or writes to them, by direct
    I/O: no byte is copied in between. Where this is not possible, bytes go through a buffer, and
    the report says why: the file system has no O_DIRECT, the pool has no page structures, the mount
    is another user's. With --direct this is a failure. Holes stay holes.

    A new file has the permissions of SRC, without those of the umask, and a file that is replaced
    keeps its owner and permissions. Until the copy is complete and durable, DST is what it was:
    what fails leaves nothing behind. A device, such as the file of a mount of mode block, is
    written in place instead, and keeps what lies behind the size of SRC.

    \b
    pmemfs copy /data/model.safetensors /mnt/
    pmemfs copy --direct --json /mnt/index /backup/index
    """
    # This takes a moment to load, and who asks for help shall not wait.
    from pmemfs.client.filecopy import Manner, copy_file

    for name, path in (("SRC", source), ("DST", target)):
        if not path:
            raise BadUsage(why=f"{name} is empty: give the path of a file")
        check_answers(path)
    manner = Manner(insists_on_pages=direct, may_replace=not no_clobber, is_forced=force)
    with progress_bar(os.path.basename(source)) as show:
        copied = copy_file(source, target, manner, show)
    if copied is None:
        note(f"{target} is there already, and stays as it is")
        if as_json:
            print_json({"source": source, "target": target, "path": None, "why": "it exists",
                        "size_bytes": 0, "copied_bytes": 0, "seconds": 0.0})  # fmt: skip
        return
    if as_json:
        print_json(copied._asdict() | {"why": copied.why or None})
        return
    rate = format_size(int(copied.copied_bytes / max(copied.seconds, 1e-6)))
    how = f"through a buffer, because {copied.why}" if copied.why else "directly"
    amount = format_size(copied.copied_bytes)
    if copied.copied_bytes < copied.size_bytes:
        amount += f" of {format_size(copied.size_bytes)}, the rest holes,"
    say(f"{copied.target}: {amount} copied in {copied.seconds:.2f} s ({rate}/s) {how}")
