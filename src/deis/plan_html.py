"""A plan as a notebook shows it: a small picture, and the table to unfold."""

from __future__ import annotations

import io
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plots import Table

_MOST = 200
"""Rows of the table; of more the middle is left out."""


def html_of(plan: Table, title: str, about: str) -> str:
    """Return the HTML of a plan below its title and where it comes from; the table alone, unfolded, where matplotlib is missing."""
    try:
        from .plots import plot_small
    except ImportError:
        picture = ""
    else:
        file = io.StringIO()
        plot_small(plan).savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        picture = file.getvalue()
        picture = picture[picture.index("<svg") :]  # a document within a document has no prologue
    unfolded = "" if picture else " open"
    return (
        f"<div><p><b>{escape(title)}</b><br>{escape(about)}</p>{picture}"
        f"<details{unfolded}><summary>The table</summary>{table_of(*_cells(plan))}</details></div>"
    )


def table_of(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return an HTML table."""
    parts = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    parts += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return f"<table>{''.join(parts)}</table>"


def _cells(plan: Table) -> tuple[list[str], list[list[str]]]:
    """Return the names of the columns and the cells of each row, the last with the end's time alone."""
    window = range(plan.keep_p.shape[1])
    head = ["t", "keep_x", *(f"keep_p[{j}]" for j in window), "keep_z", "next_x", *(f"next_p[{j}]" for j in window), "p"]
    columns = [plan.t[:-1], plan.keep_x, *plan.keep_p.T, plan.keep_z, plan.next_x, *plan.next_p.T]
    rows = [[f"{value + 0:.6g}" for value in row] for row in zip(*columns, strict=True)]
    rows = [[*row, "a call" if calls else f"{guess:.6g} x"] for row, calls, guess in zip(rows, plan.calls, plan.guess, strict=True)]
    if len(rows) > _MOST:
        rows[_MOST // 2 : -(_MOST // 2)] = [["..."]]
    return head, [*rows, [f"{plan.t[-1]:.6g}"]]
