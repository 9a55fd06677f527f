"""Writing files so that no reader ever sees half of one, and reading JSON that may be damaged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .arguments import kind, shown


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside `path`. What is written there replaces `path` at the end; on an error `path` is unchanged."""
    path = _path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path={os.fspath(path)!r} lies in a folder that is not there; create it first")
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | os.PathLike[str]) -> bytes:
    """Return the contents of a file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    path = _path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path={os.fspath(path)!r} is no file; give the name of one that save() wrote")
    return path.read_bytes()


def _path(path: Any) -> Path:
    kind("path", path, (str, os.PathLike), "the name of a file,")
    return Path(path)


def parse(data: bytes) -> object:
    """Return the contents of JSON in which no name occurs twice and all numbers are finite.

    Raises
    ------
    ValueError
        If it is not such JSON.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is truncated or not JSON ({error})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"a name stands twice among {shown(names)}")
    return dict(pairs)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number that a plan may hold")


def digest(content: str) -> str:
    """Return the checksum of a text."""
    return hashlib.sha256(content.encode()).hexdigest()
