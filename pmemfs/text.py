"""Text that others chose, made harmless for a terminal and for a log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping


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


def counted(count: int, one: str, many: str) -> str:
    """So many of something: `1 miss`, `2 misses`."""
    return f"{count} {one if count == 1 else many}"


def did_you_mean(
    word: str, known: Iterable[str], elsewhere: Mapping[str, str] | None = None
) -> str:
    """The end of a sentence about a word that is not known, with the known one that it is near to.

    `elsewhere` has what others call something known. Empty where nothing is near.
    """
    meant = (elsewhere or {}).get(word.lower())
    if meant is None:
        # Only who has made a mistake waits for this to be loaded.
        from difflib import get_close_matches

        meant = next(iter(get_close_matches(word.lower(), list(known), 1)), None)
    return f"; did you mean '{meant}'?" if meant else ""
