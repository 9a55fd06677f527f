"""A plan in print, laid out like a Butcher tableau: times to the left, weights to the right."""

from __future__ import annotations

from collections.abc import Sequence

from .machine import Row

_MOST = 12
"""Rows to print; of more the middle is left out."""


def describe(rows: Sequence[Row], end: float, title: str, about: str) -> str:
    """Return the rows of a plan that ends at the time `end` as a table, below its title and where it comes from."""
    stochastic = any(row.keep_z for row in rows)
    staged = any(not row.accepts or row.next_x != 1 or any(row.next_p) for row in rows)
    head = f"{'t':>10} | {'keep_x':>9} | {'keep_p, newest first':<{11 * len(rows[0].keep_p) - 1}}"
    head += f" | {'keep_z':>9}" if stochastic else ""
    lines = [title, *([about] if about else []), head + (f" || {'next_x':>9} | next_p" if staged else "")]
    printed = [_line(row, stochastic, staged) for row in rows]
    if len(rows) > _MOST:
        printed[_MOST // 2 : -(_MOST // 2)] = [f"{'...':>10} |"]
    return "\n".join([*lines, *printed, f"{end:10.6g} |"])


def _line(row: Row, stochastic: bool, staged: bool) -> str:
    line = f"{row.t:10.6g} | {_numbers(row.keep_x, row.keep_p)}"
    line += f" | {row.keep_z:9.5f}" if stochastic else ""
    line += f" || {_numbers(row.next_x, row.next_p)}" if staged else ""
    return line + ("" if row.calls else f"  (no call: p = {row.guess:.5f} x)")


def _numbers(c_x: float, c_p: Sequence[float]) -> str:
    return f"{c_x:9.5f} | " + " ".join(f"{c:10.6f}" if c else f"{'.':>10}" for c in c_p)
