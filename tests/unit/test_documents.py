"""What the documents say of the code is so: files, functions, commands and sentences exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import click
import pytest

from kit.documents import DOCUMENTS, ROOT, blocks, name_of, prose
from pmemfs.cli.commands import pmemfs

SOURCES = sorted([*ROOT.glob("pmemfs/**/*.py"), *ROOT.glob("daemons/*.py")])
NATIVE = [path for kind in ("pyx", "pxi", "pxd", "h") for path in ROOT.glob(f"pmemfs/**/*.{kind}")]
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")
GAP = "…"
PARTS = {path.name for path in (ROOT / "pmemfs").iterdir() if path.is_dir()}
SUFFIXES = ("", ".py", ".pyx", ".pxi", ".pxd", ".h")


def strings(path: Path) -> list[str]:
    """Every text in a module, in one line, with a gap where something is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else GAP for p in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"\{[^}]*\}", GAP, node.value))
    return [" ".join(text.split()) for text in found]


@cache
def all_strings() -> tuple[str, ...]:
    """The texts of the program."""
    return tuple(text for path in SOURCES for text in strings(path))


def is_said(sentence: str) -> bool:
    """Whether the program has this sentence; anything may stand where its gaps are."""
    parts = [part.strip() for part in sentence.split(GAP)]
    pattern = re.compile(".*?".join(re.escape(part) for part in parts if part))
    return any(pattern.search(text) for text in all_strings())


def quoted() -> list[str]:
    """The sentences that troubleshooting.md says are the program's."""
    text = (ROOT / "docs/troubleshooting.md").read_text()
    return [line[2:] for line in text.splitlines() if line.startswith("> ")]


def test_there_are_sentences_to_look_for() -> None:
    assert len(quoted()) >= 20
    assert not is_said("this is … that the program never says")


@pytest.mark.parametrize("sentence", quoted())
def test_a_sentence_that_is_quoted_is_the_programs(sentence: str) -> None:
    assert is_said(sentence)


def anchors(path: Path) -> set[str]:
    """What links to headings of a document are called."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_a_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    for target, anchor in LINK.findall(prose(path)):
        if "://" not in target:
            leads_to = path.parent / target if target else path
            assert leads_to.exists(), target
            assert not anchor or anchor[1:] in anchors(leads_to), f"{target}{anchor}"


def test_readme_lists_every_document() -> None:
    listed = {target for target, _ in LINK.findall((ROOT / "README.md").read_text())}
    assert {name_of(path) for path in DOCUMENTS} - {"README.md"} <= listed


def code_in(path: Path) -> str:
    """Everything in a document that is set as code, a line each."""
    spans = re.findall(r"`([^`\n]+)`", prose(path))
    return "\n".join([*spans, *(b for word in ("sh", "bash", "text") for b in blocks(path, word))])


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_and_options_in_a_document_exist(path: Path) -> None:
    context = click.Context(pmemfs)
    for name, words in re.findall(
        r"(?:^|[ (])pmemfs ([a-z]+)\b(?! [|\\])([^\n|#;]*)", code_in(path), re.M
    ):
        command = pmemfs.get_command(context, name)
        assert command is not None, f"pmemfs {name}"
        if isinstance(command, click.Group):
            word = words.split()[0]
            command = command.get_command(context, word)
            assert command is not None, f"pmemfs {name} {word}"
        known = {word for param in command.params for word in (*param.opts, *param.secondary_opts)}
        options = set(re.findall(r"(?<!\S)(--?[a-z][\w-]*)", words))
        assert options <= known | {"--help"}, f"pmemfs {name}{words}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_a_choice_of_tests_in_a_document_chooses_some(path: Path) -> None:
    for file, word in re.findall(r"pytest\b[^\n]* (tests/\S+\.py) -k (\w+)", code_in(path)):
        assert re.search(rf"def test_\w*{word}", (ROOT / file).read_text()), f"{file} -k {word}"


def file_of(word: str) -> Path | None:
    """The file that a word of a document names, from the root or from the package."""
    for start in (ROOT, ROOT / "pmemfs"):
        for suffix in SUFFIXES:
            if (found := start / f"{word}{suffix}").exists():
                return found
    return None


def files_named(path: Path) -> set[str]:
    """The files of ours that a document names: `volume/fs/names.py`, `fuse/published`, …"""
    words = re.findall(r"`([\w./-]+?)(?:: [\w.]+)?`", prose(path))
    ours = PARTS | {"pmemfs", "tests", "scripts", "daemons", "docs"}
    return {
        word for word in words
        if "/" in word and word.split("/")[0] in ours and not re.search(r"[A-Z]{4}", word)
    }  # fmt: skip


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_a_file_that_a_document_names_exists(path: Path) -> None:
    assert [word for word in sorted(files_named(path)) if file_of(word) is None] == []


def names_in(path: Path) -> set[str]:
    """What a file defines: functions, classes, and what belongs to a class as `Class.name`."""
    text = path.read_text()
    if path.suffix != ".py":
        found = re.findall(r"^ *(?:cp?def|cdef class)\b[^=\n]*?(\w+)(?:\(|:)", text, re.M)
        return {*found, *re.findall(r"^def (\w+)", text, re.M)}
    names: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return names


def functions_named(path: Path) -> list[tuple[str, str]]:
    """What a document says is in which file: `fuse/wiredoor.py: WireDoor.answer`."""
    return re.findall(r"`([\w./-]+\.\w+): ([\w.]+)`", prose(path))


def test_the_walks_name_functions() -> None:
    assert len(functions_named(ROOT / "docs/architecture.md")) >= 40


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_a_function_that_a_document_names_is_in_that_file(path: Path) -> None:
    for file, name in functions_named(path):
        found = file_of(file)
        assert found is not None, file
        assert name in names_in(found), f"{file}: {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_what_a_document_says_is_in_a_module_is_there(path: Path) -> None:
    """`leaks.LeakSearch`, `presence.look_again`: wherever a module of ours has that name."""
    # `memory.limit_in_bytes` is the kernel's.
    modules = {source.stem for source in SOURCES} - {"memory"}
    for module, name in re.findall(r"`([a-z_]+)\.(\w+)(?:\.\w+)*`", prose(path)):
        if module in modules and f".{name}" not in SUFFIXES and name != "md":
            of_that_name = [source for source in SOURCES if source.stem == module]
            known = set().union(*(re.findall(r"\w+", found.read_text()) for found in of_that_name))
            # A part may have the name of a module: `volume.fs.table`.
            known |= {found.stem for found in (ROOT / "pmemfs" / module).glob("*")}
            assert name in known, f"{module}.{name}"


@cache
def identifiers() -> frozenset[str]:
    """Every word of the code."""
    files = [*SOURCES, *NATIVE, *ROOT.glob("tests/**/*.py")]
    return frozenset(word for path in files for word in re.findall(r"\w+", path.read_text()))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_a_name_of_a_class_or_function_in_a_document_is_in_the_code(path: Path) -> None:
    words = re.findall(r"`([A-Z]\w*[a-z]\w*(?:\.\w+)*|\w+_\w+|_\w+)`", prose(path))
    ours = {part for word in words for part in word.split(".")} - {"None"}
    unknown = {word for word in ours if word not in identifiers()}
    assert unknown <= OF_OTHERS, unknown - OF_OTHERS


OF_OTHERS = frozenset(
    ("user_allow_other", "strict_limit", "max_ratio", "guest_halt_poll_ns", "io_cqring_wait",
     "ep_poll", "no_new_privs", "copy_file_range", "max_background", "sched_yield", "time_based",
     "serialize_overlap", "io_uring_enter", "io_submit", "FUSE_READDIRPLUS_AUTO", "build_ext",
     "__pyx_f_6pmemfs_9dataplane_6native_", "__pyx_v_")
)  # fmt: skip
"""Words of the kernel and of other programs, and how names of ours begin in C."""
