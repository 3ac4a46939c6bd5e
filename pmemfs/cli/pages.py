"""`pmemfs pages`: the page structures of a mount at work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple, cast

import click

from pmemfs.cli.extents import find_file
from pmemfs.cli.find import ask, require_mount
from pmemfs.cli.options import Count, OneOf, reporting
from pmemfs.cli.output import (
    is_terminal,
    print_facts,
    print_json,
    print_json_line,
    print_painted,
    print_table,
    say,
    terminal_size,
    wants_colour,
)
from pmemfs.cli.pagemap import By, map_lines, owner_text, shape_of
from pmemfs.cli.paths import ANY_PATH
from pmemfs.cli.watching import check_watch, ticks, watch_options
from pmemfs.errors import BadUsage
from pmemfs.mountinfo import Mount
from pmemfs.observe.answers import (
    FilePages,
    HeldPin,
    PageMap,
    PagePins,
    PageRun,
    Pages,
    PageState,
)
from pmemfs.units import format_size
from pmemfs.unsaid import json_values

_DEFAULT_HOTTEST = 10
_JSON_CELLS = 1024
_PATIENCE_SECONDS = 120
"""For an answer: all pages of terabytes take the daemon some seconds, which it shares."""
_MOST_RUNS = 1 << 20


class Pfn(click.ParamType[int]):
    """A page-frame number, as tables show it or as a decimal number."""

    name = "pfn"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """The number. Raises BadParameter."""
        try:
            pfn = int(str(value), 0)
        except ValueError:
            self.fail(f"'{value}' is not a page-frame number, such as 0x200 or 512", param, ctx)
        if not 0 <= pfn < 1 << 52:
            self.fail(f"'{value}' is not the number of a frame of any pool", param, ctx)
        return pfn


class _Wish(NamedTuple):
    """How a map is wanted."""

    by: By
    colour: str
    interval_seconds: float | None
    report_count: int | None
    picture: str | None


@click.command()
@click.argument("target", type=ANY_PATH, required=False)
@click.option(
    "--hottest",
    type=Count(0, 1000),
    metavar="N",
    help="How many of the pages with the most transfers to show.  [default: 10]",
)
@click.option("--map", "as_map", is_flag=True, help="Draw a map of all pages instead.")
@click.option(
    "--by",
    type=OneOf(
        ["state", "reads", "writes", "owner"],
        elsewhere={
            "read": "reads",
            "write": "writes",
            "file": "owner",
            "states": "state",
            "owners": "owner",
            "inode": "owner",
        },
    ),
    help="What the map shows.  [default: state]",
)
@watch_options("")
@click.option(
    "--color",
    "colour",
    type=OneOf(["auto", "always", "never"]),
    help="Whether the map has colours.  [default: auto, on a terminal]",
)
@click.option(
    "--picture",
    type=ANY_PATH,
    metavar="FILE",
    help="Draw the map into a .svg or .png, which needs matplotlib.",
)
@click.option("--file", type=ANY_PATH, metavar="PATH", help="Show the pages of one file.")
@click.option("--pfn", type=Pfn(), metavar="N", help="Show all that is known of one page.")
@click.option("--pins", is_flag=True, help="Show which processes hold which pages.")
@reporting
def pages(
    target: str | None, hottest: int | None, as_map: bool, by: str | None,
    interval_seconds: float | None, count: int | None, colour: str | None, picture: str | None,
    file: str | None, pfn: int | None, pins: bool, as_json: bool,
) -> None:  # fmt: skip
    """Count the page structures of a mount, and show the hottest pages.

    TARGET is a mountpoint or the pool that is mounted there; with --file it may be left out. Page
    structures are counted by state.
    uninitialised: not touched since the mount; dirty: written, and not yet made
    durable, which fsync does, and the daemon every 30 s; clean: not dirty;
    referenced: read or written; in use: held by a transfer or a pin now.

    A page's owner is the file that it belonged to when it was last read or written.
    """
    _check_views(hottest=hottest is not None, map=as_map, picture=picture is not None,
                 file=file is not None, pfn=pfn is not None, pins=pins)  # fmt: skip
    is_map = as_map or picture is not None
    for option, is_given in (("--by", by), ("--color", colour), ("--watch", interval_seconds)):
        if is_given is not None and not is_map:
            raise BadUsage(why=f"{option} is for a map: give --map, too")
    check_watch(interval_seconds, count)
    if interval_seconds is not None and picture is not None:
        raise BadUsage(why="--watch shows a map again and again, and --picture draws one: give one")
    if file is not None:
        _show_file(target, file, as_json=as_json)
        return
    if target is None:
        raise click.MissingParameter(param=click.get_current_context().command.params[0])
    mount = require_mount(target)
    if is_map:
        wish = _Wish(
            cast(By, by or "state"), colour or "auto", interval_seconds, count, picture,
        )  # fmt: skip
        _show_map(mount, wish, as_json=as_json, as_map=as_map)
    elif pfn is not None:
        _show_page(mount, pfn, as_json=as_json)
    elif pins:
        _show_pins(mount, as_json=as_json)
    else:
        _show_hottest(mount, _DEFAULT_HOTTEST if hottest is None else hottest, as_json=as_json)


def _check_views(**given: bool) -> None:
    """Raise BadUsage for two different things to show. A picture is a map, too."""
    views = [f"--{name}" for name, is_given in given.items() if is_given]
    if len(views) > 1 and set(views) != {"--map", "--picture"}:
        raise BadUsage(why=f"{' and '.join(views)} show different things: give one of them")


def _show_hottest(mount: Mount, hottest: int, *, as_json: bool) -> None:
    report = ask(mount, "pages", Pages, hottest=hottest, timeout_seconds=_PATIENCE_SECONDS)
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
        print_table(
            ["PFN", "OWNER", "INDEX", "READS", "WRITES", "REFS", "STATE", "LAST ACCESS"],
            [
                (
                    f"{page.pfn:#x}",
                    owner_text(page.owner, page.mapping),
                    page.index,
                    page.reads,
                    page.writes,
                    page.refcount,
                    "dirty" if page.dirty else "clean",
                    _ago(page.last_access_ns),
                )
                for page in report.hottest
            ],
        )


def _show_map(mount: Mount, wish: _Wish, *, as_json: bool, as_map: bool) -> None:
    if wish.picture is not None:
        # It loads numpy, and whoever wants a map in a terminal does not wait for that.
        from pmemfs.cli.picture import MOST_CELLS, check_picture, draw

        check_picture(wish.picture)
        report = _ask_map(mount, wish.by, MOST_CELLS)
        draw(report, wish.by, wish.picture, mount.source)
        if not as_map and as_json:
            print_json({"picture": wish.picture})
        if not as_map:
            return
    if wish.interval_seconds is None:
        _print_map(mount, wish, as_json=as_json)
        return
    with suppress(KeyboardInterrupt):
        for _ in ticks(wish.interval_seconds, wish.report_count):
            _print_map(mount, wish, as_json=as_json)
            if not as_json and not is_terminal():
                say(flush=True)


def _print_map(mount: Mount, wish: _Wish, *, as_json: bool) -> None:
    is_watched = wish.interval_seconds is not None
    if as_json:
        value = json_values(_ask_map(mount, wish.by, _JSON_CELLS))
        (print_json_line if is_watched else print_json)(value)
        return
    shape = shape_of(terminal_size(), wish.by)
    report = _ask_map(mount, wish.by, shape.columns * shape.lines)
    print_painted(
        map_lines(report, wish.by, shape.columns),
        in_colour=wants_colour(wish.colour),
        instead=is_watched and is_terminal(),
    )


def _ask_map(mount: Mount, by: By, cell_count: int) -> PageMap:
    # A parameter that asks for nothing is null, so that a daemon may not know it.
    owners = True if by == "owner" else None
    return ask(mount, "page_map", PageMap, cell_count=cell_count, owners=owners,
               timeout_seconds=_PATIENCE_SECONDS)  # fmt: skip


def _show_file(target: str | None, path: str, *, as_json: bool) -> None:
    wanted = require_mount(target) if target is not None else None
    mount, inode = find_file(path)
    if wanted is not None and wanted.device != mount.device:
        raise BadUsage(why=f"{path} is not in the mount of {target}, but in that on "
                           f"{mount.mountpoint}")  # fmt: skip
    report = _ask_file(mount, inode)
    if as_json:
        print_json(json_values(report))
        return
    if report.runs:
        print_table(
            ["OFFSET", "PFN", "SIZE", "STATE", "REFS", "READS", "WRITES", "LAST ACCESS"],
            [
                (
                    run.offset_bytes,
                    f"{run.pfn:#x}",
                    format_size(run.length_bytes),
                    run.state,
                    run.refcount,
                    run.reads,
                    run.writes,
                    _ago(run.last_access_ns),
                )
                for run in report.runs
            ],
        )
    say(_file_summary(report))


def _ask_file(mount: Mount, inode: int) -> FilePages:
    """All pages of a file, as many as we have room for."""
    runs: list[PageRun] = []
    start: int | None = 0
    while start is not None:
        part = ask(mount, "file_pages", FilePages, inode=inode, start_bytes=start,
                   timeout_seconds=_PATIENCE_SECONDS)  # fmt: skip
        runs += part.runs
        start = part.next_bytes if len(runs) < _MOST_RUNS else None
    return part._replace(runs=tuple(runs))


def _file_summary(report: FilePages) -> str:
    bytes_of = {
        state: sum(run.length_bytes for run in report.runs if run.state == state)
        for state in ("clean", "dirty", "uninitialised")
    }
    held = sum(run.length_bytes for run in report.runs if run.refcount)
    parts = [f"{format_size(size)} {state}" for state, size in bytes_of.items() if size]
    parts += [f"{format_size(held)} in use"] if held else []
    told = ", ".join(parts) or "no pages"
    rest = "; more pages follow" if report.next_bytes is not None else ""
    size = format_size(report.page_size_bytes)
    return f"{format_size(report.size_bytes)} in pages of {size}: {told}{rest}"


def _show_page(mount: Mount, pfn: int, *, as_json: bool) -> None:
    page = ask(mount, "page", PageState, pfn=pfn)
    if as_json:
        print_json(json_values(page))
    else:
        print_facts(_page_facts(page))


def _page_facts(page: PageState) -> Iterator[tuple[str, object]]:
    last_pfn = page.first_pfn + page.frame_count - 1
    yield "pfn", f"{page.first_pfn:#x}" + (f" to {last_pfn:#x}" if page.frame_count > 1 else "")
    yield "in the pool", f"{format_size(page.frame_count << 12)} at {page.first_pfn << 12:#x}"
    yield "page structure", f"number {page.page}, {page.scheme}"
    yield "pfn_t", f"{page.pfn_t:#x}: the offset of a page structure"
    yield "state", page.state
    if page.is_free is not None:
        yield "frame", _frame_text(page)
    if page.state == "uninitialised":
        return
    yield "references", page.refcount
    owner = owner_text(page.owner)
    where = f", its bytes from {page.offset_bytes} on" if page.owner else ""
    yield "owner", f"{owner}{where}"
    yield "reads", page.reads
    yield "writes", page.writes
    yield "last access", _ago(page.last_access_ns) if page.referenced else "never"
    yield "write epoch", page.write_epoch
    yield "generation", page.generation


def _frame_text(page: PageState) -> str:
    """Who has a frame of a file system."""
    if page.is_free:
        return "free"
    if page.owner and page.owner.has_left and page.refcount:
        return "held back: it has left its file"
    return "taken, by a file or by the file system"


def _show_pins(mount: Mount, *, as_json: bool) -> None:
    report = ask(mount, "page_pins", PagePins)
    if as_json:
        print_json(json_values(report))
        return
    if report.pins:
        print_table(
            ["PID", "COMMAND", "FILE", "SIZE", "MODE", "SINCE", "STATE"],
            [
                (pin.pid or "-", pin.command, _ranges(pin),
                 format_size(pin.page_count * report.page_size_bytes),
                 "rw" if pin.writable else "r", _ago(pin.since_ns), _pin_state(pin))
                for pin in report.pins
            ],
            spare=["COMMAND"],
        )  # fmt: skip
    pages = sum(pin.page_count for pin in report.pins) + report.other_pages
    count = len(report.pins) + report.other_pins
    size = format_size(pages * report.page_size_bytes)
    more = f", of which {report.other_pins} are not shown" if report.other_pins else ""
    say(f"{'1 pin' if count == 1 else f'{count} pins'} of {size}{more}")


def _ranges(pin: HeldPin) -> str:
    """The files of a pin, and what part of each, unless that is its beginning."""
    names = [
        owner_text(part.owner) + (f" from {part.offset_bytes}" if part.offset_bytes else "")
        for part in pin.files
    ]
    more = [f"{pin.other_files} more"] if pin.other_files else []
    return ", ".join(names + more)


def _pin_state(pin: HeldPin) -> str:
    """What has become of a pin: its client may be gone, or its pages may have left their file."""
    if pin.is_resting:
        return "rests, its process is gone"
    return "stale" if pin.is_stale else "in use"


def _ago(time_ns: int) -> str:
    """How long something is ago; a dash for what never was."""
    return f"{max(0.0, (time.time_ns() - time_ns) / 1e9):.1f} s ago" if time_ns else "-"
