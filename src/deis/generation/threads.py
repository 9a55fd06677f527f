"""The same small work on many items by a few threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

_MOST = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], wait: bool = False) -> list[Result]:
    """Return work(item) of each item, in order.

    Each thread has a stretch of the items: threads that take turns at single ones wait for each other. There are as many as
    processors, or where the work is to `wait` for a disk, eight.
    """
    threads = min(len(items), _MOST if wait else min(_MOST, os.cpu_count() or 1))
    if threads < 2:
        return [work(item) for item in items]
    ends = [len(items) * k // threads for k in range(threads + 1)]
    stretches = [items[start:stop] for start, stop in pairwise(ends)]
    with ThreadPoolExecutor(threads) as pool:
        made = pool.map(lambda stretch: [work(item) for item in stretch], stretches)
        return [result for results in made for result in results]
