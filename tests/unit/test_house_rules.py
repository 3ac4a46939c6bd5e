"""Rules of this house that a reviewer would have to remember otherwise."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up: a part may import itself and what is before it.
PARTS = ("version", "errors", "units", "ranges", "text", "clock", "pfn", "mountinfo", "reach",
         "media", "medium", "pool", "memmap", "bio", "volume", "dataplane", "fuse", "logs",
         "control", "observe", "cli")  # fmt: skip

FUNCTION_LINES = 60

MODULES = sorted([*ROOT.glob("pmemfs/**/*.py"), *ROOT.glob("daemons/**/*.py")])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """The module's dotted name, where it is installed."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "daemons":
        parts.insert(0, "pmemfs")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all that a module imports, wherever in it: also in functions and under
    TYPE_CHECKING."""
    is_package = path.name == "__init__.py"
    package = module_of(path).split(".")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                climb = node.level - is_package
                base = ".".join([*package[: len(package) - climb], *filter(None, [node.module])])
            # `from pmemfs import control` names a part, `from pmemfs.pool import Pool` does too.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str | None:
    """The part that a module of ours belongs to; None for the rest of the world and ourselves."""
    words = module.split(".")
    return words[1] if words[0] == "pmemfs" and len(words) > 1 else None


def upward_imports(path: Path) -> list[str]:
    own = part_of(module_of(path))
    if own is None or own == "daemons":
        return []
    allowed = PARTS[: PARTS.index(own) + 1]
    parts = ((name, part_of(name)) for name in imported(path))
    return [name for name, part in parts if part is not None and part not in allowed]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_only_point_down(path: Path) -> None:
    assert upward_imports(path) == []


def test_every_part_has_its_place() -> None:
    found = {part_of(module_of(path)) for path in MODULES} - {None, "daemons"}
    assert found == set(PARTS)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import pmemfs.cli.main", ["pmemfs.cli.main"]),
        ("def f():\n    from pmemfs import cli", ["pmemfs.cli"]),
        ("if TYPE_CHECKING:\n    from pmemfs.cli.main import run", ["pmemfs.cli.main.run"]),
        ("from . import mapped", ["pmemfs.medium.mapped"]),
        ("from ..cli import main", ["pmemfs.cli.main"]),
    ],
)
def test_an_import_is_found_wherever_it_hides(
    text: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pmemfs" / "medium" / "hiding.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert list(imported(path)) == names
    assert (upward_imports(path) == []) == (names == ["pmemfs.medium.mapped"])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_opens_with_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_function_fits_a_screen(path: Path) -> None:
    functions = (
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    long = {
        node.name: lines
        for node in functions
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES
    }
    assert long == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_output_of_commands_prints(path: Path) -> None:
    called = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    }
    if module_of(path) != "pmemfs.cli.output":
        spoken = {"print", "click.echo", "sys.stdout.write", "sys.stderr.write"} & called
        assert not spoken, "what others named would reach a terminal as it is"
