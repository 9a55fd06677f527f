"""Random numbers by sample: one generator each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..arguments import shown


def streams(rng: Any, batch: int, kind: type[Any], spawn: Callable[[Any], list[Any]]) -> list[Any]:
    """Return one generator a sample, from a sequence of them or spawned from a single one.

    Raises
    ------
    TypeError
        Where rng is neither.
    ValueError
        Where there are not as many as samples.
    """
    if isinstance(rng, kind):
        return spawn(rng)
    if not (isinstance(rng, Sequence) and all(isinstance(generator, kind) for generator in rng)):
        name = f"{kind.__module__}.{kind.__qualname__}"
        raise TypeError(f"rng must be a {name} or a sequence of them, one a sample, for this x_T, and is {shown(rng)}")
    if len(rng) != batch:
        raise ValueError(f"rng must have one generator a sample: there are {len(rng)} for {batch} samples")
    return list(rng)
