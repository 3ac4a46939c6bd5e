"""Rules of this house that a reviewer would have to remember otherwise."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up: a part may import itself and what is before it.
PARTS = ("version", "errors", "units", "ranges", "tally", "text", "unsaid", "clock", "pfn",
         "mountinfo", "reach", "media", "medium", "transform", "pool", "memmap", "bio", "origin",
         "volume", "dataplane", "mount", "engine", "fuse", "logs", "control", "pins", "observe",
         "client", "compare", "cli")  # fmt: skip

FUNCTION_LINES = 60
C_LINES = 5
"""Of C in a string of Cython's."""

TESTS = sorted(ROOT.glob("tests/**/*.py"))
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


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_imports_a_daemon(path: Path) -> None:
    assert not [name for name in imported(path) if part_of(name) == "daemons"]


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_tests_share_through_the_kit(path: Path) -> None:
    names = [name.partition(".")[0] for name in imported(path)]
    assert "conftest" not in names, "helpers live in tests/kit; conftest has fixtures"
    assert not [name for name in names if name.startswith("test_")], "they live in tests/kit"
    assert "sys.path" not in path.read_text().replace('"sys.path"', ""), "pyproject.toml says it"


def test_counting_pages_in_python_is_the_python_engines_alone() -> None:
    found = {
        module_of(path)
        for path in MODULES
        if any(name.endswith((".open_memmap", ".CountingMemmap")) for name in imported(path))
    }
    schemes = {"pmemfs.memmap.pmem", "pmemfs.memmap.on_demand"}
    # The second one is a cache without a mount, which has no data plane.
    (user,) = found - schemes - {"pmemfs.volume.cache.offline"}
    assert user.startswith("pmemfs.fuse."), "what opens the python engine's mount"


def test_every_folder_of_modules_is_installed() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    folders = {
        path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("pmemfs/**/__init__.py")
    }
    assert listed == {name.replace("/", ".") for name in folders} | {"pmemfs.daemons"}


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


def import_circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules each of which imports the one before it, the first the last; [] if there are none.

    An import for an annotation alone counts: whoever reads one of the two has to read the other.
    """
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def modules_imported(path: Path, modules: Collection[str]) -> set[str]:
    """Those of these modules that a module imports, whatever it imports of them."""
    # What is imported is a module, or something in one.
    found = {name if name in modules else name.rpartition(".")[0] for name in imported(path)}
    return found & set(modules) - {module_of(path)}


def test_no_modules_import_each_other() -> None:
    modules = {module_of(path): path for path in MODULES}
    imports = {name: modules_imported(path, modules) for name, path in modules.items()}
    assert sum(map(len, imports.values())) > len(modules)
    assert import_circle(imports) == []


def test_a_circle_of_annotations_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    part = tmp_path / "pmemfs" / "medium"
    part.mkdir(parents=True)
    texts = {
        "one": "from pmemfs.medium.two import B",
        "two": "if TYPE_CHECKING:\n    from pmemfs.medium import three",
        "three": "def f():\n    from pmemfs.medium.one import A",
    }
    for name, text in texts.items():
        (part / f"{name}.py").write_text(text)
    modules = {f"pmemfs.medium.{name}": part / f"{name}.py" for name in texts}
    imports = {name: modules_imported(path, modules) for name, path in modules.items()}
    assert set(import_circle(imports)) == set(modules)
    imports["pmemfs.medium.three"] = set()
    assert import_circle(imports) == []


NAMES_FOR_ANYTHING = {"files", "content", "raw", "data", "utils", "helpers", "common", "misc"}
"""A module of such a name says nothing of its subject."""


def bad_names(modules: Collection[str]) -> list[str]:
    """Modules that are named after anything, or as the plural of their neighbour."""
    return [
        name
        for name in sorted(modules)
        if name.rpartition(".")[2] in NAMES_FOR_ANYTHING
        or (name.endswith("s") and name[:-1] in modules)
    ]


def test_a_module_is_named_after_its_subject() -> None:
    modules = {module_of(path) for path in MODULES}
    assert bad_names(modules) == []
    assert bad_names({"a.table", "a.tables", "b.tables", "a.files"}) == ["a.files", "a.tables"]


def doubled(paths: Collection[Path]) -> dict[tuple[str | None, str], list[str]]:
    """Names that several modules or public classes of one part have, and where they have them."""
    things = defaultdict(list)
    for path in paths:
        module = module_of(path)
        part, name = part_of(module), module.rpartition(".")[2]
        if path.name != "__init__.py":
            things[part, name].append(module)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                things[part, node.name].append(module)
    return {name: where for name, where in things.items() if len(where) > 1}


def test_one_name_in_one_part_is_one_thing() -> None:
    assert doubled(MODULES) == {}


def test_what_has_the_name_of_another_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    names = ["medium/space", "medium/deep/space", "fuse/space", "medium/other"]
    paths = [tmp_path / "pmemfs" / f"{name}.py" for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("class Space: ...\nclass _Own: ...")
    assert doubled(paths).keys() == {("medium", "space"), ("medium", "Space")}


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


@pytest.mark.parametrize("path", sorted(ROOT.glob("pmemfs/**/*.p[yx][xdi]")), ids=name_of)
def test_c_stands_in_headers_that_an_editor_understands(path: Path) -> None:
    blocks = re.findall(
        r'^cdef extern from \*.*\n    """\n((?:.*\n)*?)    """', path.read_text(), re.M
    )
    assert [block for block in blocks if block.count("\n") > C_LINES] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("pmemfs/**/*.p[yx][xi]")), ids=name_of)
def test_no_signature_of_native_code_has_a_typed_memoryview(path: Path) -> None:
    found = re.findall(r"\w+\[::1\] \w+", path.read_text())
    assert found == [], "each module that has one compiles 25,000 lines more"


@pytest.mark.parametrize("path", sorted(ROOT.glob("pmemfs/dataplane/*.py")), ids=name_of)
def test_the_data_plane_takes_buffers_tables_and_counts_but_no_pool(path: Path) -> None:
    assert [name for name in imported(path) if part_of(name) == "pool"] == []
