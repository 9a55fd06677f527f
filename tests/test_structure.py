"""The house itself: imports go downwards, every module has its line in the notation page, and functions stay short."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
# From the ground up; a module may import from lower storeys and, without a circle, from its own.
STOREYS = [
    {"arrays", "extras", "foreign", "host"},
    {"arguments", "machine"},
    {"backends", "draws", "files"},
    {"operators"},
    {"alphas", "sde"},
    {"grids", "groups", "plan_checks", "plan_file", "plan_html", "plan_text", "plots", "quadrature"},
    {"plan"},
    {"methods"},
    {"linear", "model", "run"},
    {"cut", "edit", "likelihood", "norm", "reference", "repaint", "seeded"},
    {"calibration", "generation"},
    {"features"},
    {"adapters", "comparison", "evaluation"},
    {"lab", "serving"},
    {"cli"},
    {"__main__"},
]
LONGEST = 40
DICTATED = {("adapters.diffusers", "__init__")}
"""Signatures that diffusers dictates: it reads the configuration's names from them."""


def name_of(path: Path) -> str:
    parts = path.relative_to(SRC / "deis").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted((SRC / "deis").rglob("*.py"))}


def imported(name: str) -> Iterator[str]:
    """Yield the modules of the library that a module imports, anywhere in its code."""
    path = MODULES[name]
    package = path.relative_to(SRC / "deis").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.level == 0:
            continue
        base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        target = ".".join(part for part in base if part)
        for alias in node.names:
            inner = f"{target}.{alias.name}".lstrip(".")
            yield inner if inner in MODULES else target


GRAPH = {name: {other for other in imported(name) if other != name} for name in MODULES if name}


def storey(name: str) -> int:
    (found,) = [i for i, names in enumerate(STOREYS) if name.partition(".")[0] in names]
    return found


@pytest.mark.parametrize("name", GRAPH)
def test_imports_go_downwards(name: str) -> None:
    assert [other for other in GRAPH[name] if storey(other) > storey(name)] == []


def test_there_is_no_circle() -> None:
    assert len(list(TopologicalSorter(GRAPH).static_order())) == len(GRAPH)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the name of each function and its lines without the docstring."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines, first = node.end_lineno - node.lineno + 1, node.body[0]
            if ast.get_docstring(node) is not None:
                assert first.end_lineno is not None
                lines -= first.end_lineno - first.lineno + 1
            yield node.name, lines


@pytest.mark.parametrize("name", MODULES)
def test_no_function_is_long(name: str) -> None:
    long = {function: lines for function, lines in functions(MODULES[name]) if lines > LONGEST}
    assert {function for function in long if (name, function) not in DICTATED} == set(), long


def module_table() -> str:
    """Return the table of modules: each with the first line of its docstring, from the ground up."""
    lines = []
    for name in sorted(GRAPH, key=lambda name: (storey(name), name)):
        docstring = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))
        assert docstring is not None, name
        lines.append(f"| `deis.{name}` | {docstring.splitlines()[0].rstrip('.')} |\n")
    return "".join(lines)


def test_the_notation_page_lists_every_module_in_one_line() -> None:
    assert module_table() in (ROOT / "docs" / "notation.md").read_text(encoding="utf-8"), "\n" + module_table()
