"""The file format of plans: JSON with a version and a checksum, read whole or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from .arguments import shown
from .files import digest, parse, read

Content = TypeVar("Content")
FORMAT = "deis.plan"
VERSION = 3
TABLES = {"t": 1, "alpha": 1, "sigma": 1, "keep_x": 1, "keep_p": 2, "keep_z": 1, "next_x": 1, "next_p": 2, "guess": 1}
"""The columns of numbers, and the number of dimensions of each."""
FLAGS = ("accepts", "calls")


class Kind(NamedTuple):
    """A kind of plan file: its name and version, its tables with their numbers of dimensions, and its columns of true and false."""

    format: str
    version: int
    tables: Mapping[str, int]
    flags: tuple[str, ...]


_PLAN = Kind(FORMAT, VERSION, TABLES, FLAGS)


def document_of(content: str, kind: Kind = _PLAN) -> dict[str, Any]:
    """Return the contents of the file of a plan, given as canonical JSON."""
    return {"format": kind.format, "version": kind.version, "sha256": digest(content), "plan": json.loads(content)}


def read_document(path: str | os.PathLike[str], build: Callable[[object], Content]) -> Content:
    """Return what `build` makes of the JSON in a file.

    Raises
    ------
    ValueError
        If the file is not JSON, or `build` refuses it; the message names the file.
    FileNotFoundError
        If there is no such file.
    """
    data = read(path)
    try:
        return build(parse(data))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is not a usable plan file: {error}") from None


def read_content(document: object, names: set[str], kind: Kind = _PLAN) -> tuple[dict[str, Any], object]:
    """Return the fields of a plan from a document, checked against the expected names, and their checksum.

    Raises
    ------
    ValueError
        If the document is not a plan or of another version, or its fields have other names or types.
    """
    if not isinstance(document, dict) or document.get("format") != kind.format:
        raise ValueError(f"its format is not {kind.format!r}")
    version = document.get("version")
    if type(version) is not int or version != kind.version:
        later = type(version) is int and version > kind.version
        raise ValueError(
            f"its version is {shown(version)} and this library reads {kind.version}" + ("; upgrade deis-samplers" if later else "")
        )
    content = document.get("plan")
    if not isinstance(content, dict) or set(document) != {"format", "version", "sha256", "plan"}:
        raise ValueError(f"it must hold format, version, sha256 and plan, and holds {shown(sorted(map(str, document)))}")
    if set(content) != names:
        unknown = sorted(map(str, set(content) - names))
        raise ValueError(f"its plan lacks {sorted(names - set(content))} and has the unknown fields {shown(unknown)}")
    for name, ndim in kind.tables.items():
        if not _is_table(content[name], ndim):
            raise ValueError(f"its {name} is not a table of numbers of {ndim} dimension(s)")
    for name in kind.flags:
        if not (isinstance(content[name], list) and all(type(flag) is bool for flag in content[name])):
            raise ValueError(f"its {name} is not a list of true and false")
    return content, document["sha256"]


def _is_table(value: Any, ndim: int) -> bool:
    """Return whether lists of lists hold numbers, all lists of a level having the same length."""
    level = [value]
    for _ in range(ndim):
        if not all(isinstance(part, list) and len(part) == len(level[0]) for part in level):
            return False
        level = [part for parts in level for part in parts]
    return all(type(number) is float for number in level)
