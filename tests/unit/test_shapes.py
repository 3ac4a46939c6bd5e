"""Shapes of arrays over files are read as numpy reads them."""

from __future__ import annotations

import numpy as np
import pytest

from pmemfs.client.mapping import shape_of
from pmemfs.errors import BadMapping


@pytest.mark.parametrize("shape", [3, np.int64(3), (3,), [3], np.array([3])])
def test_a_shape_is_whatever_numpy_takes_for_one(shape: object) -> None:
    assert shape_of(shape, "file") == np.empty(shape).shape == (3,)  # type: ignore[call-overload,arg-type]


@pytest.mark.parametrize("shape", [3.5, (3.5,), "3", ("3",), None])
def test_what_is_no_whole_number_is_no_dimension(shape: object) -> None:
    with pytest.raises(TypeError):
        shape_of(shape, "file")  # type: ignore[arg-type]


def test_a_dimension_below_zero_is_refused() -> None:
    with pytest.raises(BadMapping, match="below zero"):
        shape_of((-1, 10), "file")
