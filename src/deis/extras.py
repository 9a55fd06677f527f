"""What to say where a package of an extra is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


def install(extra: str) -> str:
    """Return how an extra is installed; deis is on no package index."""
    return f"pip install '.[{extra}]' in a checkout of deis"


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Let an ImportError within say what needs the missing package, and which extra has it.

    Raises
    ------
    ImportError
        Where an import within fails.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{what} needs the extra {extra!r} ({error}): {install(extra)}", name=error.name) from error
