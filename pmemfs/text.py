"""Text that others chose, made harmless for a terminal and for a log."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text on one line, with everything that has no glyph of its own written as an escape.

    That takes line feeds and terminal escapes, characters that change the direction of text or
    have no width, and bytes that are not UTF-8 (surrogates). A backslash stays as it is.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
