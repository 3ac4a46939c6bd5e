"""Words of a command line that name a path: the shell completes them, as it does for others.

click has a type for paths, which looks whether the path is there. At a mount whose daemon hangs
this would hang, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def any_path(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """For `shell_complete=` of a word that is a file, a device or a directory."""
    return _left_to_the_shell(incomplete, "file")


def a_directory(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """For `shell_complete=` of a word that is a directory."""
    return _left_to_the_shell(incomplete, "dir")


def _left_to_the_shell(incomplete: str, kind: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type=kind)]
