"""Text that others chose, on its way to a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmemfs.cli import output
from pmemfs.text import printable

NASTY = {
    "\x1b]0;title\x07": r"\x1b]0;title\x07",
    "two\nlines\r\n": r"two\nlines\r\n",
    "\u202eevil\u2066": r"\u202eevil\u2066",
    "zero\u200bwidth\ufeff": r"zero\u200bwidth\ufeff",
    "line\u2028paragraph\u2029": r"line\u2028paragraph\u2029",
    "\x9b31m": r"\x9b31m",
    "not utf-8: \udcff": r"not utf-8: \udcff",
    "\U000e0041": r"\U000e0041",
}


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_what_has_no_glyph_is_written_as_an_escape(text: str) -> None:
    assert printable(text) == NASTY[text]


@pytest.mark.parametrize("text", ["", "pmem0", "Ünïcode 日本語 émoji 🎉", r"back\slash"])
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


@given(st.text())
def test_any_text_becomes_one_printable_line_and_stays_that(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_every_way_to_speak_is_printable(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    output.say(text)
    output.warn(text)
    output.complain(text, exit_code=1)
    output.print_facts([(text, text)])
    output.print_table([":bomb:"], [[f"[bold]{text}:bomb:"]])
    output.print_json({text: text})
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in (shown.out + shown.err).split("\n"))
    lines = shown.out.split("\n")
    assert lines[1].split() == (f"{NASTY[text]} {NASTY[text]}").split()
    assert lines[2:4] == [":bomb:", f"[bold]{NASTY[text]}:bomb:"]
    assert shown.err == f"pmemfs: warning: {NASTY[text]}\npmemfs: {NASTY[text]}\n"


def test_a_name_of_any_length_stays_in_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(["NAME", "POOL"], [["x" * 20_000, "y" * 20_000]])
    assert len(capsys.readouterr().out.split("\n")) == 3
