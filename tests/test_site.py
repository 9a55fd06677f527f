"""The documentation: its pages, links, pictures and formulas, and that pages made by a script are what the script makes."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import deis
from benchmarks import anime64, calibration, cut, default, figures, guide, methods, round_trip, scale

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SITE = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
SHOWN = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + PAGES
LINK = re.compile(r"(!?)\[[^\]]*\]\((?!https?:)([^)\s]+)\)")
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\w$\\])\$([^$\s](?:[^$\n]*[^$\s])?)\$(?![\w$])", re.DOTALL)
BY_COMMANDS = {"compare.png", "errors.png"}
"""The figures of `deis compare`."""
FENCE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    """Return a page without its code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as MkDocs and others make them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_every_page_is_in_the_navigation_once() -> None:
    named = re.findall(r": ([\w-]+\.md)$", SITE, re.MULTILINE)
    assert sorted(named) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    for _, target in LINK.findall(text_of(page)):
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), f"{page.name} links to {target}, and there is no such file"
        assert not anchor or anchor in anchors(there), f"{page.name} links to {target}, and there is no such heading"


@pytest.mark.parametrize("page", SHOWN, ids=lambda page: page.name)
def test_a_page_with_pictures_names_the_command_that_makes_each(page: Path) -> None:
    """A figure of benchmarks.figures by its name or, on a page of many, by that of the script; another by any command."""
    text = page.read_text(encoding="utf-8")
    for picture, target in LINK.findall(text_of(page)):
        if picture and Path(target).name.startswith("lab"):
            assert "`python -m benchmarks.lab`" in text, target
        elif picture and "figures/" in target and Path(target).name not in BY_COMMANDS:
            assert f"benchmarks.figures {Path(target).stem}`" in text or "`python -m benchmarks.figures`" in text, target
        elif picture and Path(target).name in BY_COMMANDS:
            assert f"docs/figures/{Path(target).name}" in (DOCS / "compare.md").read_text(encoding="utf-8"), target
        elif picture:
            assert re.search(r"`(python\s-m\sbenchmarks|deis )", text), target


def test_every_figure_is_drawn_by_a_function_and_shown_on_a_page() -> None:
    drawn = {f"{name}.png" for name in figures.DRAWN | guide.DRAWN}
    others = re.compile(r"(compare|errors|lab)(-.*)?\.png")  # of commands, and of benchmarks of their own
    assert drawn == {path.name for path in (DOCS / "figures").glob("*.png") if not others.fullmatch(path.name)}
    shown = "".join(page.read_text(encoding="utf-8") for page in SHOWN)
    assert {name for name in drawn if f"figures/{name}" not in shown} == set()


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [page for page in PAGES if FORMULA.search(text_of(page))], ids=lambda page: page.name)
def test_formulas_can_be_typeset(page: Path) -> None:
    converter = pytest.importorskip("latex2mathml.converter")
    found = [block or inline for block, inline in FORMULA.findall(text_of(page))]
    for formula in found:
        assert "\\" not in converter.convert(formula.strip()), f"{formula} has a command that is not typeset"


def test_there_are_formulas() -> None:
    assert len(FORMULA.findall(text_of(DOCS / "sde-to-plan.md"))) > 30


def test_every_public_name_is_in_the_reference() -> None:
    documented = {name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)}
    assert {f"deis.{name}" for name in deis.__all__} - documented == set()


MADE: dict[str, tuple[ModuleType, Callable[[], None]]] = {
    "default.md": (default, lambda: default.report(list(default.BUDGETS))),
    "methods.md": (methods, methods.page),
    "anime64.md": (anime64, anime64.report),
    "calibration.md": (calibration, calibration.report),
    "cut.md": (cut, cut.report),
    "encode.md": (round_trip, round_trip.page),
    "scale.md": (scale, scale.report),
}


@pytest.mark.parametrize("name", MADE)
def test_a_page_is_what_its_script_makes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    script, report = MADE[name]
    report()
    assert (DOCS / name).read_text(encoding="utf-8") == capsys.readouterr().out, f"python -m {script.__name__} report > docs/{name}"
