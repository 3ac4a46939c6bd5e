"""A one-node Ceph for the part `cache`, from the kit of the tests."""

import contextlib
import os
import sys
from collections.abc import Iterator

from benchmark import host
from benchmark.cells import MIB
from benchmark.errors import SubjectUnavailable

KIT = host.PROJECT / "tests"
IMAGE = "pmemfs-bench"


@contextlib.contextmanager
def image(size_bytes: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """An image that is written to its end: how pmemfs names it, and fio's words for it."""
    if not (KIT / "kit/ceph_node.py").exists():
        raise SubjectUnavailable("the one-node Ceph is part of the tests, which are not here")
    if os.geteuid() != 0:
        raise SubjectUnavailable("a one-node Ceph needs root")
    sys.path.append(str(KIT))
    from kit.ceph_node import missing_programs, shared_node

    if missing := missing_programs():
        raise SubjectUnavailable(f"{', '.join(missing)}: run scripts/install-origins --tests")
    with contextlib.ExitStack() as stack:
        try:
            node = stack.enter_context(shared_node())
            stack.callback(node.rbd, "rm", "--no-progress", f"rbd/{IMAGE}")
            node.rbd("create", "--size", f"{size_bytes // MIB}M", f"rbd/{IMAGE}")
            node.rbd("bench", "--io-type", "write", "--io-size", "1M", "--io-total",
                     f"{size_bytes // MIB}M", f"rbd/{IMAGE}")  # fmt: skip
        except AssertionError as problem:
            raise SubjectUnavailable(f"a one-node Ceph could not be started: {problem}") from None
        # fio's engine is told of the cluster by the environment only
        before = os.environ.get("CEPH_CONF")
        os.environ["CEPH_CONF"] = str(node.conf)
        stack.callback(_restore, before)
        words = ("--ioengine=rbd", "--clientname=admin", "--pool=rbd", f"--rbdname={IMAGE}")
        yield f"rbd:rbd/{IMAGE}?conf={node.conf}", words


def _restore(before: str | None) -> None:
    if before is None:
        os.environ.pop("CEPH_CONF", None)
    else:
        os.environ["CEPH_CONF"] = before
