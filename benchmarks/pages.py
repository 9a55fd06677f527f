"""What the pages made by these scripts share: tables of measurements, and long tables folded away where they are shown."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folded(title: str) -> Iterator[None]:
    """Fold what is printed inside under a title."""
    print(f'<details markdown="1">\n<summary>{title}</summary>\n')
    yield
    print("\n</details>\n")


def measured(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table of measurements; none where there is no file yet."""
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))
