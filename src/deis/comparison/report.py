"""`deis.write_report`: a comparison as one page that needs nothing else, its figures, and the numbers they were drawn from."""

from __future__ import annotations

import io
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..arguments import kind
from ..extras import needs
from ..files import replacing
from .figures import BLUE, INK, figures, middle, percent, power
from .result import Comparison, code_of
from .shelf import REPORT, claim

PAGE = "index.html"
_MEASURES = {"frechet": "Fréchet", "kid": "KID", "precision": "precision", "recall": "recall"}
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def write_report(comparison: Comparison, out: str | Path) -> Path:
    """Write a comparison into a folder, and return the name of its page.

    `index.html` is one file, without scripts and without anything from elsewhere, that may be mailed; beside it lie its figures as
    PNG and SVG, and in `comparison.json` the numbers that tables and figures show.

    Parameters
    ----------
    comparison : Comparison
        As `deis.compare` returns it.
    out : path
        A folder: a new or empty one, or that of an earlier report of the same comparison, which is replaced.

    Raises
    ------
    ValueError
        Where the folder holds something else, or a comparison of another model, schedule or noise.
    ImportError
        Where matplotlib or jinja2 is missing; it names the extra.
    """
    kind("comparison", comparison, Comparison, "a Comparison, as deis.compare returns,")
    with needs("see", "a report"):
        import jinja2
        import matplotlib  # noqa: F401

    claim(out, comparison.identity)
    out = Path(out)
    drawn = figures(comparison)
    inline = {name: _save(figure, out / name) for name, figure in drawn.items()}
    source = (files(__package__) / "report.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = page.from_string(source).render(_values(comparison, inline))
    with replacing(out / PAGE) as partial:
        partial.write_text(text, encoding="utf-8")
    with replacing(out / REPORT) as partial:
        partial.write_text(json.dumps({"finished": True, **comparison.document()}, indent=1, allow_nan=False) + "\n")
    return out / PAGE


def _save(figure: Any, path: Path) -> str:
    """Write a figure on white as PNG and SVG, and return it as an SVG for a page of any colour."""
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        for suffix, options in ((".png", {"dpi": 200}), (".svg", {"metadata": _NO_METADATA})):
            with replacing(path.with_suffix(suffix)) as partial:
                figure.savefig(partial, format=suffix[1:], facecolor="white", **options)
        bare = io.StringIO()
        figure.savefig(bare, format="svg", facecolor="none", transparent=False, metadata=_NO_METADATA)
    return inlined(bare.getvalue(), path.name)


def inlined(svg: str, name: str) -> str:
    """Return an SVG file as an element of a page: ids of its own, the page's colour of text, and as wide as there is room."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = svg.replace(INK, "currentColor").replace(BLUE, "var(--blue)").replace("xlink:href", "href")
    width, height = (re.search(rf'<svg[^>]* {side}="([\d.]+)pt"', svg) for side in ("width", "height"))
    assert width is not None
    assert height is not None
    head = f'<svg role="img" aria-labelledby="caption-{name}" viewBox="0 0 {width[1]} {height[1]}">'
    return head + svg[svg.index(">") + 1 :]


def _values(found: Comparison, inline: dict[str, str]) -> dict[str, Any]:
    """Return what the template shows."""
    from markupsafe import Markup

    nfe = middle(found)
    advice = found.best(nfe) or found.best()
    present = [name for name in _MEASURES if any(getattr(row, name) is not None for row in found.rows)]
    return {
        "about": found.about,
        "model": found.about.get("model") or "This model",
        "found": found,
        "best": {nfe: row.series for nfe in found.nfes if (row := found.best(nfe)) is not None},
        "figures": {name: Markup(svg) for name, svg in inline.items()},
        "shown": 0 if found.reference_pictures is None else len(found.reference_pictures),
        "middle": nfe,
        "advice": advice,
        "code": None if advice is None else code_of(advice),
        "measures": present,
        "names": _MEASURES,
        "number": number,
        "percent": percent,
        "power": power,
    }


def number(value: float | None, digits: int = 3) -> str:
    """Return a number as tables show it, of so many digits."""
    if value is None:
        return ""
    text = f"{value:#.{digits}g}"
    return text.rstrip(".") if "e" not in text else text
