"""Who follows a recipe of CONTRIBUTING.md and forgets a step is told here.

Everything that there is of a kind (commands, modes, …) has what its recipe says that it has.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import click
import pytest

from kit.documents import DOCUMENTS, ROOT
from kit.pools import SCHEMES
from pmemfs.cli.commands import pmemfs
from pmemfs.cli.create import _WORDS
from pmemfs.dataplane.layouts import MemmapPlace
from pmemfs.engine.sharing import _PLACES
from pmemfs.fuse.handshake import Terms
from pmemfs.fuse.wire import Opcode
from pmemfs.fuse.wiredoor import WireDoor
from pmemfs.media.label import LAYOUT, Mode, Scheme
from pmemfs.media.log import RECORD_HEAD, RecordKind

CONTEXT = click.Context(pmemfs)
WRITTEN = "\n".join(path.read_text() for path in DOCUMENTS)
END_TO_END = "\n".join(path.read_text() for path in ROOT.glob("tests/endtoend/*.py"))
TESTS = "\n".join(path.read_text() for path in ROOT.glob("tests/**/*.py"))


@pytest.mark.parametrize("name", pmemfs.list_commands(CONTEXT))
def test_a_command_has_help_a_document_and_an_end_to_end_test(name: str) -> None:
    command = pmemfs.get_command(CONTEXT, name)
    assert command is not None
    assert command.help
    assert re.search(rf"pmemfs {name}\b", WRITTEN)
    through_kit = {"mount": "pools.mount(", "umount": "pools.umount(", "pages": ".pages("}
    assert re.search(rf'pmemfs\w*\(\s*"{name}"', END_TO_END) or through_kit[name] in END_TO_END


@pytest.mark.parametrize("mode", Mode)
def test_a_mode_has_words_a_document_and_an_end_to_end_test(mode: Mode) -> None:
    assert mode in _WORDS
    assert f"mode `{mode.word}`" in WRITTEN
    is_default = mode is Mode.BLOCK
    assert is_default or f'"--mode", "{mode.word}"' in END_TO_END


@pytest.mark.parametrize("scheme", Scheme)
def test_a_scheme_has_a_place_a_document_and_the_conformance_suites(scheme: Scheme) -> None:
    assert isinstance(_PLACES[scheme], MemmapPlace)
    assert f"`{scheme.word}`" in (ROOT / "README.md").read_text()
    assert scheme in SCHEMES


@pytest.mark.parametrize("member", [*Scheme, *Mode], ids=str)
def test_the_format_names_a_scheme_or_mode(member: Scheme | Mode) -> None:
    of = {Scheme: "scheme", Mode: "mode"}[type(member)]
    (meaning,) = [field.meaning for field in LAYOUT.fields if field.name == of]
    assert f"{member.value} `{member.word}`" in meaning


@pytest.mark.parametrize("kind", RecordKind)
def test_the_format_names_a_kind_of_record(kind: RecordKind) -> None:
    (meaning,) = [field.meaning for field in RECORD_HEAD.fields if field.name == "kind"]
    assert f"{kind.value} {kind.name.lower().replace('_', ' ')}" in meaning


def answered() -> list[Opcode]:
    """The opcodes of the wire door."""
    terms = Terms(max_write=4096, max_background=1, has_files=True, over_uring=False)
    # Its table is made before any handler is called.
    handlers: Any = SimpleNamespace(names=None, attributes=None, files=None)
    return [Opcode(number) for number in sorted(WireDoor(handlers, terms).answered)]


@pytest.mark.parametrize("opcode", answered(), ids=lambda opcode: opcode.name)
def test_an_opcode_that_is_answered_is_sent_by_a_test(opcode: Opcode) -> None:
    assert re.search(rf"\b(?:Op|Opcode)\.{opcode.name}\b", TESTS)
