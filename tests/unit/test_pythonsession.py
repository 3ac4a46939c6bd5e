"""The python engine's mount."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
import pyfuse3
from pmemfs.fuse.pythonsession import silence_libfuse

libfuse = ctypes.CDLL(pyfuse3.__file__)
if {is_serving}:
    silence_libfuse()
libfuse.fuse_log(3, b"short read on fuse device\\n")
"""


@pytest.mark.parametrize(
    ("is_serving", "said"), [(False, "short read on fuse device\n"), (True, "")]
)
def test_libfuse_says_nothing_by_itself_while_it_serves(is_serving: bool, said: str) -> None:
    program = PROGRAM.format(is_serving=is_serving)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stderr == said
