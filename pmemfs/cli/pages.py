"""`pmemfs pages`: the page structures of a mount at work."""

from __future__ import annotations

import time

import click

from pmemfs.cli.find import ask, require_mount
from pmemfs.cli.options import Count, reporting
from pmemfs.cli.output import print_facts, print_json, print_table, say
from pmemfs.cli.paths import ANY_PATH
from pmemfs.observe.answers import Pages, json_values
from pmemfs.units import format_size


@click.command()
@click.argument("target", type=ANY_PATH)
@click.option(
    "--hottest",
    type=Count(0, 1000),
    default=10,
    show_default=True,
    metavar="N",
    help="How many of the pages with the most transfers to show.",
)
@reporting
def pages(target: str, hottest: int, as_json: bool) -> None:
    """Count the page structures of a mount, and show the hottest pages.

    TARGET is a mountpoint or the pool that is mounted there. Page structures are counted by state.
    uninitialised: not touched since the mount; dirty: written, and not yet made
    durable, which fsync does, and the daemon every 30 s; clean: not dirty;
    referenced: read or written; in use: held by a transfer or a pin now.
    """
    report = ask(require_mount(target), "pages", Pages, hottest=hottest)
    if as_json:
        print_json(json_values(report))
        return
    size = format_size(report.page_size_bytes)
    print_facts(
        [
            ("page structures", f"{report.scheme}, one for {size}"),
            *((name.replace("_", " "), count) for name, count in report.counts.items()),
        ]
    )
    if report.hottest:
        say()
        now_ns = time.time_ns()
        print_table(
            ["PFN", "INODE", "INDEX", "READS", "WRITES", "REFS", "STATE", "LAST ACCESS"],
            [
                (
                    f"{page.pfn:#x}",
                    page.mapping,
                    page.index,
                    page.reads,
                    page.writes,
                    page.refcount,
                    "dirty" if page.dirty else "clean",
                    f"{(now_ns - page.last_access_ns) / 1e9:.1f} s ago",
                )
                for page in report.hottest
            ],
        )
