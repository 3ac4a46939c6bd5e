"""Types of elements are whatever numpy takes, and what ml_dtypes adds to it, by name."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from kit.commands import run_command
from pmemfs.client.elements import dtype_of
from pmemfs.client.mapping import MapRequest, Wanted

NAMES = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "int4", "uint2"]

WITHOUT = """
import sys
sys.modules["ml_dtypes"] = None
from pmemfs.client.mapping import MapRequest, Wanted
from pmemfs.errors import NeedsPackage
for name in sys.argv[1:]:
    try: Wanted.of(MapRequest("file", 3, name))
    except NeedsPackage as error: print(error)
"""


@pytest.mark.parametrize("given", ["f4", "<u2", "float16", np.int8, float, np.dtype("c8")])
def test_what_numpy_takes_is_what_numpy_makes_of_it(given: type) -> None:
    assert dtype_of(given) == np.dtype(given)


@pytest.mark.parametrize("name", NAMES)
def test_a_type_of_machine_learning_is_known_by_its_name(name: str) -> None:
    types = pytest.importorskip("ml_dtypes")
    code = f"from pmemfs.client.elements import dtype_of; print(dtype_of({name!r}).name)"
    done = run_command(sys.executable, "-c", code)
    assert (done.code, done.out) == (0, f"{name}\n"), done.err
    assert Wanted.of(MapRequest("file", 3, name)).dtype == np.dtype(getattr(types, name))


def test_where_the_package_is_missing_it_is_named() -> None:
    done = run_command(sys.executable, "-c", WITHOUT, *NAMES)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        f"the type {name} needs the package ml_dtypes, which is not installed; "
        "'pip install ml_dtypes' installs it"
        for name in NAMES
    ]


@pytest.mark.parametrize("given", ["nothing", "bfloat17", "float8", object.__name__ + "s", 7])
def test_what_is_no_type_is_a_type_error_as_with_numpy(given: str) -> None:
    with pytest.raises(TypeError):
        dtype_of(given)
