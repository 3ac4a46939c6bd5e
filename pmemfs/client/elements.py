"""Types of elements: all of numpy's, and those of machine learning by their names.

The package ml_dtypes adds the latter to numpy, once it is loaded, such as `bfloat16`. It is loaded
when somebody names one of them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from pmemfs.errors import NeedsPackage

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

_OF_ML_DTYPES = re.compile(r"bfloat16|float[468]_e\d\w*|u?int[124]")


def dtype_of(given: DTypeLike) -> np.dtype[Any]:
    """A type of elements, however it is said.

    Raises TypeError for what is none, and NeedsPackage for one of ml_dtypes where that is missing.
    """
    try:
        return np.dtype(given)
    except TypeError:
        if not (isinstance(given, str) and _OF_ML_DTYPES.fullmatch(given)):
            raise
    found = of_ml_dtypes(given, f"the type {given}")
    return np.dtype(given) if found is None else found


def of_ml_dtypes(name: str, what: str) -> np.dtype[Any] | None:
    """A type of ml_dtypes; None if this version of it has no such type.

    Raises NeedsPackage where the package is missing, and `what` is what needs it.
    """
    try:
        import ml_dtypes
    except ImportError:
        remedy = "'pip install ml_dtypes' installs it"
        raise NeedsPackage(what=what, package="ml_dtypes", remedy=remedy) from None
    found = getattr(ml_dtypes, name, None)
    return None if found is None else np.dtype(found)
