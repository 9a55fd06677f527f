"""Which rows of a plan can be evaluated side by side, in one batched call: those whose states do not wait for each other."""

from __future__ import annotations

from collections.abc import Sequence

from .machine import Row

Rows = frozenset[int]
"""The indices of the rows whose evaluations something depends on."""


def waits(rows: Sequence[Row]) -> tuple[list[Rows], list[Rows]]:
    """Return the evaluations that the state of each row depends on directly, and those that its prediction depends on.

    Any weight other than 0 is a dependence; weights that cancel each other are not detected. The prediction of a row that calls is
    an evaluation of its own, whatever its state depends on. The prediction of a row without a call is a multiple of its state.
    """
    states, predictions, base = [Rows()], list[Rows](), Rows()
    for i, row in enumerate(rows):
        predictions.append(Rows([i]) if row.calls else states[i] if row.guess != 0 else Rows())
        newest_first = predictions[::-1]
        base = _used([row.keep_x, *row.keep_p], [base, *newest_first])
        states.append(_used([row.next_x, *row.next_p], [base, *newest_first]))
    return states[:-1], predictions


def _used(weights: Sequence[float], terms: Sequence[Rows]) -> Rows:
    """Return what a sum depends on."""
    return Rows().union(*(term for weight, term in zip(weights, terms, strict=False) if weight != 0))


def group_rows(rows: Sequence[Row]) -> tuple[range, ...]:
    """Return the rows in groups, each as long as possible, such that no state depends on an evaluation in its own group.

    A row that adds noise ends its group, so that noise is drawn in the order of the rows. Rows without a call join the group
    before them.
    """
    states, _ = waits(rows)
    starts = [0]
    for i in range(1, len(rows)):
        if rows[i - 1].keep_z or (rows[i].calls and any(j >= starts[-1] for j in states[i])):
            starts.append(i)
    return tuple(range(a, b) for a, b in zip(starts, [*starts[1:], len(rows)], strict=True))
