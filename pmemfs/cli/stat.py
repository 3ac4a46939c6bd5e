"""`pmemfs stat`: what a mount is doing, in the manner of iostat(1)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Literal

import click

from pmemfs.cli.cache_sample import CacheWatch
from pmemfs.cli.find import ask, require_mount
from pmemfs.cli.options import reporting
from pmemfs.cli.output import print_json, print_json_line, print_table, say
from pmemfs.cli.paths import ANY_PATH
from pmemfs.cli.watching import check_watch, ticks, watch_options
from pmemfs.errors import BadUsage, NoAnswer
from pmemfs.mountinfo import Mount
from pmemfs.observe.stat import (
    Counts,
    Figures,
    Operations,
    Sample,
    difference,
    figures,
    total,
)
from pmemfs.units import MIB, format_size

Since = Literal["mount", "report"]
Column = tuple[str, Callable[[Figures], str]]
"""A heading, and what stands under it."""

_ALWAYS_SHOWN = ("read", "write", "fsync")
_REQUESTS: tuple[Column, ...] = (("REQUESTS", lambda f: str(f.requests)),)
_NATIVE: tuple[Column, ...] = (
    ("NATIVE", lambda f: str(f.native)),
    ("FORWARDED", lambda f: str(f.forwarded)),
    ("FAILED", lambda f: str(f.failed)),
)
_MOVED: tuple[Column, ...] = (("MOVED", lambda f: format_size(f.moved_bytes)),)
_RATES: tuple[Column, ...] = (
    ("REQ/S", lambda f: f"{f.requests_per_second:.1f}"),
    ("MIB/S", lambda f: f"{f.bytes_per_second / MIB:.2f}"),
)
_MEAN: tuple[Column, ...] = (("MEAN us", lambda f: _microseconds(f.mean_ns)),)
_LATENCIES: tuple[Column, ...] = (
    *_MEAN,
    ("P50 us", lambda f: _microseconds(f.p50_ns)),
    ("P99 us", lambda f: _microseconds(f.p99_ns)),
    ("P99.9 us", lambda f: _microseconds(f.p99_9_ns)),
)


class _Address(click.ParamType[tuple[str, int]]):
    """Where to listen: HOST:PORT, or a port of this machine alone."""

    name = "address"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        host, _, port = str(value).rpartition(":")
        if not port.isdecimal() or not 0 < int(port) < 1 << 16:
            self.fail(f"'{value}' is not HOST:PORT, such as 127.0.0.1:9750", param, ctx)
        return host.strip("[]") or "127.0.0.1", int(port)


ADDRESS = _Address()


@click.command()
@click.argument("target", type=ANY_PATH)
@watch_options(", on what came since")
@click.option("--per-cpu", is_flag=True, help="Show each worker of the data plane, too.")
@click.option("--latency", is_flag=True, help="Show percentiles of the latencies, too.")
@click.option(
    "--prometheus", is_flag=True,
    help="Print all counters as Prometheus reads them, for the textfile collector.",
)  # fmt: skip
@click.option(
    "--listen", type=ADDRESS, metavar="HOST:PORT",
    help="Answer Prometheus at http://HOST:PORT/metrics until the mount ends.",
)  # fmt: skip
@reporting
def stat(
    target: str,
    interval_seconds: float | None,
    count: int | None,
    per_cpu: bool,
    latency: bool,
    prometheus: bool,
    listen: tuple[str, int] | None,
    as_json: bool,
) -> None:
    """Show what a mount has answered, how fast, and who did.

    TARGET is a mountpoint or the pool that is mounted there.
    The first report is on all since the mount. native: answered by the data plane;
    forwarded: handed to the control plane; failed: answered natively with an error, also where a
    name was looked for and is not there. other: requests about names, attributes and all else.
    A latency is the time from taking a request from the kernel to answering it; of an
    fsync that needs msync, to asking for that. Of a cache the last line counts blocks: those that
    were there, those that waited for the origin, those that made room for others, and those that
    became clean; and what is dirty now.

    --prometheus prints what node_exporter's textfile collector takes.

    With --json there is all of it, one line for each report of --watch.
    """
    check_watch(interval_seconds, count)
    is_for_prometheus = prometheus or listen is not None
    if is_for_prometheus and (as_json or interval_seconds is not None or per_cpu or latency):
        raise BadUsage(
            why="--prometheus and --listen take no --json, --watch, --per-cpu or --latency"
        )
    mount = require_mount(target)
    if is_for_prometheus:
        _tell_prometheus(mount, listen)
        return
    cache = CacheWatch(mount)
    if interval_seconds is None:
        sample = _ask(mount)
        if as_json:
            print_json(_as_json(sample, "mount") | cache.values(sample))
        else:
            _print(sample, "mount", per_cpu=per_cpu, latency=latency)
            cache.say_it(sample)
        return
    with suppress(KeyboardInterrupt):
        for sample, since in _watch(mount, interval_seconds, count):
            if as_json:
                print_json_line(_as_json(sample, since) | cache.values(sample))
            else:
                _print(sample, since, per_cpu=per_cpu, latency=latency)
                cache.say_it(sample)
                say(flush=True)


def _tell_prometheus(mount: Mount, listen: tuple[str, int] | None) -> None:
    # Imported here, because it takes longer than the rest of the command.
    from pmemfs.cli.metrics import serve, text_of

    if listen is None:
        for line in text_of(mount).splitlines():
            say(line)
        return
    try:
        serve(mount, *listen)
    except OSError as error:
        why = f"can't listen on {listen[0]}:{listen[1]}: {error.strerror}"
        raise BadUsage(why=why) from error


def _ask(mount: Mount) -> Sample:
    return ask(mount, "stat", Sample)


def _watch(
    mount: Mount, interval_seconds: float, count: int | None
) -> Iterator[tuple[Sample, Since]]:
    """All since the mount, then what came in each interval. Raises NoAnswer when the mount ends."""
    before: Sample | None = None
    for _ in ticks(interval_seconds, count):
        now = _ask(mount)
        if before is None:
            before = now
            yield now, "mount"
            continue
        is_same = now.pid == before.pid or 0 != now.identity == before.identity
        if not is_same:
            raise NoAnswer(path=mount.mountpoint, why="it has ended, and another one is there")
        yield difference(now, before), "report"
        before = now


def _figures(sample: Sample, counts: Counts) -> Figures:
    return figures(counts, sample.seconds, is_native=sample.is_native)


def _as_json(sample: Sample, since: Since) -> dict[str, Any]:
    def as_json(operations: Operations) -> dict[str, Any]:
        return {name: asdict(_figures(sample, counts)) for name, counts in operations.items()}

    return {
        "engine": sample.engine,
        "transport": sample.transport,
        "since": since,
        "seconds": sample.seconds,
        "operations": as_json(sample.operations),
        "control_plane": {
            name: {"requests": counts.answered, "moved_bytes": counts.moved_bytes}
            for name, counts in sample.control.items()
        },
        "workers": [
            {
                "number": worker.number,
                "cpu": worker.cpu,
                "sleeps": worker.sleeps,
                "spins": worker.spins,
                "operations": as_json(worker.operations),
            }
            for worker in sample.workers
        ],
    }


def _print(sample: Sample, since: Since, *, per_cpu: bool, latency: bool) -> None:
    say(f"{'since the mount' if since == 'mount' else 'the last'} {sample.seconds:.2f} s")
    operations = [
        (name, _figures(sample, counts))
        for name, counts in sample.operations.items()
        if counts or name in _ALWAYS_SHOWN
    ]
    if not sample.is_native:
        _print_figures("OPERATION", operations, _REQUESTS + _MOVED + _RATES)
        if since == "mount":
            say("latencies are counted by the native engine only")
        return
    _print_figures("OPERATION", operations, _NATIVE + _MOVED + _RATES + _MEAN)
    if any(sample.control.values()):
        say("control plane: " + ", ".join(_moved(*item) for item in sample.control.items()))
    if latency:
        say()
        _print_figures("OPERATION", operations, _LATENCIES)
    if per_cpu:
        say()
        _print_workers(sample, latency=latency)


def _print_workers(sample: Sample, *, latency: bool) -> None:
    """All workers but those that had nothing to do: there is one for each possible CPU."""
    busy = [worker for worker in sample.workers if any(worker.operations.values())]
    workers = [
        (f"{worker.number}: {worker.serves}", _figures(sample, total(worker.operations.values())))
        for worker in busy
    ]
    waiting = [(worker.sleeps, worker.spins) for worker in busy]
    _print_figures("WORKER", workers, _NATIVE + _RATES, ("SLEEPS", "SPINS"), waiting)
    if len(busy) < len(sample.workers):
        say(f"{len(sample.workers) - len(busy)} of {len(sample.workers)} workers had no request")
    if latency:
        say()
        _print_figures("WORKER", workers, _LATENCIES)


def _print_figures(
    heading: str,
    named: Sequence[tuple[str, Figures]],
    columns: Sequence[Column],
    more_headings: Sequence[str] = (),
    more: Iterable[Sequence[int]] = itertools.repeat(()),
) -> None:
    """A row for each of some figures; few enough columns for 80 characters."""
    print_table(
        [heading, *(name for name, _ in columns), *more_headings],
        [
            (name, *(show(of_some) for _, show in columns), *cells)
            for (name, of_some), cells in zip(named, more, strict=False)
        ],
        text_columns=1,
    )


def _moved(name: str, counts: Counts) -> str:
    moved = f" of {format_size(counts.moved_bytes)}" if counts.moved_bytes else ""
    return f"{counts.answered} {name}{moved}"


def _microseconds(ns: float | None) -> str:
    return "-" if ns is None else f"{ns / 1000:.1f}"
