"""Words of a command line that shells complete, and that no command checks by that.

`scripts/completions` writes from them, from the choices of options and from the texts of all
commands what shells complete. So a press of TAB starts no Python.
"""

from __future__ import annotations

from collections.abc import Sequence

import click


class PathWord(click.ParamType[str]):
    """A path.

    click has a type for paths, which looks whether the path is there. At a mount whose daemon hangs
    this would hang, too.
    """

    name = "path"

    def __init__(self, *, is_directory: bool = False) -> None:
        self.is_directory = is_directory


class ListedWords(click.ParamType[str]):
    """Words between commas, of which some are known; one that ends in "=" takes any value."""

    name = "words"

    def __init__(self, words: Sequence[str]) -> None:
        self.words = words


ANY_PATH = PathWord()
"""A file, a device or a directory."""
A_DIRECTORY = PathWord(is_directory=True)
