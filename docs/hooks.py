"""What MkDocs does not do by itself: formulas as MathML, files of the repository as pages, and notebooks."""

from __future__ import annotations

import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parent.parent
SHELF = "files"
"""The folder of the site that the linked files of the repository stand in."""
LINK = re.compile(r"(\]\()((?:\.\./)+)([^)#\s]+)((?:#[^)\s]*)?\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def linked(markdown: str) -> set[str]:
    """Return the files of the repository, outside docs/, that a page links to."""
    return {match[3] for match in LINK.finditer(markdown)}


def notebook(path: Path) -> str:
    """Return a notebook as Markdown, with its printed outputs and pictures."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts)


def page(name: str) -> str:
    """Return a file of the repository as a page: a notebook with its outputs, Markdown as it is, anything else as code."""
    path = ROOT / name
    if path.suffix == ".ipynb":
        return notebook(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\2", text)  # its own links lead elsewhere
    return f"# {name}\n\n````{path.suffix[1:]}\n{text}\n````\n"


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every file outside docs/ that some page links to."""
    names = {
        name for file in files.documentation_pages() for name in linked(Path(str(file.abs_src_path)).read_text(encoding="utf-8"))
    }
    for name in sorted(names):
        hidden = "---\nsearch:\n  exclude: true\n---\n"
        files.append(File.generated(config, f"{SHELF}/{name}.md", content=hidden + page(name), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead the links out of docs/ to these pages."""
    if page.file.src_uri.startswith(SHELF):
        return markdown
    return LINK.sub(lambda match: f"{match[1]}{posixpath.join(SHELF, match[3])}.md{match[4]}", markdown)


def mathml(formula: str) -> str:
    r"""Return a formula as MathML, of LaTeX between \( and \) or \[ and \]."""
    text = html.unescape(formula).strip()
    return str(convert(text[2:-2].strip(), display="block" if text.startswith(r"\[") else "inline"))


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Typeset the formulas, so that reading them needs no script and no network."""
    return FORMULA.sub(lambda match: f"<{match[1]} class='formula'>{mathml(match[2])}</{match[1]}>", content)
