"""A machine to install on: a mount namespace with layers over the directories of the system.

Nothing comes to the machine that runs the tests, and others do not see what is installed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kit.commands import Result
from kit.mounts import PoolMaker
from kit.namespaces import Run, as_ordinary_user
from kit.packages import copied_checkout

SYSTEM = [Path(path).resolve() for path in ("/opt", "/usr/local", "/sbin", "/etc")]
PROGRAM = Path("/usr/local/bin/pmemfs")
HOME = Path("/opt/pmemfs")
_LAYERS = ("lower", "upper", "work")


class Machine:
    """A machine of one's own, as far as installing goes."""

    def __init__(self, pools: PoolMaker, run: Run) -> None:
        self.pools, self.run = pools, run
        self.user = as_ordinary_user(run, pools.directory / "home")
        self._layers = pools.directory / "layers"
        # Where root alone may look, as below /root.
        hidden = pools.directory / "hidden"
        hidden.mkdir(mode=0o700)
        self.checkout = copied_checkout(hidden / "pmemfs")
        for path in SYSTEM:
            lower, upper, work = (self._layers / path.name / name for name in _LAYERS)
            for directory in (upper, work):
                directory.mkdir(parents=True, mode=0o755)
            lower.symlink_to(path)
            if path.name == "sbin":
                # Other tests put the helpers of mount(8) there, and take them away.
                lower.unlink()
                hide = shutil.ignore_patterns("mount.*pmemfs")
                shutil.copytree(path, lower, symlinks=True, ignore=hide)
            options = f"lowerdir={lower},upperdir={upper},workdir={work}"
            done = run("mount", "-t", "overlay", "-o", options, "overlay", path)
            if done.code:
                pytest.skip(f"no layer over {path}: {done.err}")

    def install(self, *words: object) -> Result:
        """Run the script of the checkout."""
        return self.run(self.checkout / "scripts/install", *words)

    def installed(self, *words: object) -> str:
        """Run it; it must succeed. What it said."""
        done = self.install(*words)
        assert done.code == 0, done.err
        return done.err

    def changed(self) -> set[str]:
        """The files and links in system directories that were not there before."""
        paths = [path for path in self._layers.glob("*/upper/**/*") if not path.is_dir()]
        return {str(path.relative_to(self._layers)).replace("/upper/", "/") for path in paths}

    def versions(self) -> set[str]:
        """The versions that are installed beside each other."""
        return {path.name for path in (self._layers / "opt/upper/pmemfs").glob("[0-9]*")}
