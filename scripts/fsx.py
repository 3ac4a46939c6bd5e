"""Entry of ``scripts/fsx``: the tests' random I/O, for as long as one likes."""

import random
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import click

from kit.fs_fsx import Run
from kit.fs_mounts import FsMount
from kit.mounts import Engine, PoolMaker

ENGINES = {
    "uring": Engine("native", "uring"),
    "fd": Engine("native", "fd"),
    "python": Engine("python"),
}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--seconds", default=60.0, show_default=True, help="How long.")
@click.option("--seed", type=int, help="The first case's seed, to see one again.")
@click.option("--engine", type=click.Choice([*ENGINES]), help="Mount a new pool with this one.")
@click.option("--steps", default=1000, show_default=True, help="Steps of each case.")
@click.option("--restarts", default=0.002, show_default=True,
              help="With --engine: which share of steps is a remount or a kill -9.")  # fmt: skip
@click.option("--size", default="64M", show_default=True, help="With --engine: of the pool.")
@click.option("--encrypted", is_flag=True, help="With --engine: in an encrypted directory.")
def main(
    directory: Path, seconds: float, seed: int | None, engine: str | None, steps: int,
    restarts: float, size: str, encrypted: bool,
) -> None:  # fmt: skip
    """Random I/O on files in DIRECTORY, compared with their content in memory.

    Without --engine the files are made in DIRECTORY itself, which may be on any file system. With
    it a pool of mode fs is made there, mounted, killed and mounted again, and checked in the end;
    everything is taken away afterwards. The first difference ends it: exit code 1, and the
    shortest list of steps that has it.
    """
    first = random.randrange(1 << 20) if seed is None else seed
    with ExitStack() as stack:
        mount = None
        if engine is not None:
            pools = PoolMaker(directory / f"fsx-{first}", engine=ENGINES[engine])
            pools.directory.mkdir()
            stack.callback(pools.clean_up)
            mount = stack.enter_context(FsMount.made(pools, size, is_encrypted=encrypted))
        run = Run(mount.directory, mount.restart, mount.renew) if mount else Run(directory)
        try:
            explore(run, first, seconds, steps, restarts if mount else 0)
            if mount:
                mount.check()
        except AssertionError as error:
            click.echo(f"fsx: {error}", err=True)
            sys.exit(1)


def explore(run: Run, first: int, seconds: float, steps: int, restarts: float) -> None:
    """Case after case; a line now and then."""
    end = time.monotonic() + seconds
    spoken = 0.0
    seed = first
    while time.monotonic() < end:
        if time.monotonic() - spoken > 10:
            click.echo(f"fsx: {run.step_count} steps, seed {seed}")
            spoken = time.monotonic()
        run.explore(seed, steps, restarts)
        seed += 1
    click.echo(f"fsx: {run.step_count} steps, seeds {first} to {seed - 1}, no difference")
    if run.refused:
        click.echo(f"fsx: not there: {', '.join(sorted(run.refused))}")


if __name__ == "__main__":
    main()
