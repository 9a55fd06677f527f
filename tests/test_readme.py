"""Every Python snippet of the README and the documentation, as it is printed there; and the table of methods in docs/choose.md."""

import re
from pathlib import Path

import pytest

from deis.methods.registry import REGISTRY, Entry

ROOT = Path(__file__).parents[1]
CHOOSE = (ROOT / "docs" / "choose.md").read_text(encoding="utf-8")
SNIPPETS = [
    (path.name, number, snippet)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, snippet in enumerate(
        re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    )
]


@pytest.mark.parametrize(("page", "number", "snippet"), SNIPPETS, ids=[f"{page}-{number}" for page, number, _ in SNIPPETS])
def test_snippet_runs(page: str, number: int, snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, f"{page}, snippet {number}", "exec"), {"__name__": "__main__"})


def test_there_are_snippets() -> None:
    assert {page for page, _, _ in SNIPPETS} >= {"README.md", "add-a-method.md"}
    assert len(SNIPPETS) >= 8


@pytest.mark.parametrize("entry", REGISTRY, ids=lambda entry: entry.name)
def test_the_table_lists_every_registered_name(entry: Entry) -> None:
    cells = (f"`{entry.name}`", entry.form, entry.clock, entry.order_text, entry.evaluations, entry.reference)
    assert f"| {' | '.join(cells)} |\n" in CHOOSE
