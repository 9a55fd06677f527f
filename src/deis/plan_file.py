"""The file format of plans: JSON with a version and a checksum, read whole or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

from .arguments import shown
from .files import digest, parse, read

Content = TypeVar("Content")
FORMAT = "deis.plan"
VERSION = 3
TABLES = {"t": 1, "alpha": 1, "sigma": 1, "keep_x": 1, "keep_p": 2, "keep_z": 1, "next_x": 1, "next_p": 2, "guess": 1}
"""The columns of numbers, and the number of dimensions of each."""
FLAGS = ("accepts", "calls")


def document_of(content: str) -> dict[str, Any]:
    """Return the contents of the file of a plan, given as canonical JSON."""
    return {"format": FORMAT, "version": VERSION, "sha256": digest(content), "plan": json.loads(content)}


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


def read_content(document: object, names: set[str]) -> tuple[dict[str, Any], object]:
    """Return the fields of a plan from a document, checked against the expected names, and their checksum.

    Raises
    ------
    ValueError
        If the document is not a plan or of another version, or its fields have other names or types.
    """
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT!r}")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        later = type(version) is int and version > VERSION
        raise ValueError(
            f"its version is {shown(version)} and this library reads {VERSION}" + ("; upgrade deis-samplers" if later else "")
        )
    content = document.get("plan")
    if not isinstance(content, dict) or set(document) != {"format", "version", "sha256", "plan"}:
        raise ValueError(f"it must hold format, version, sha256 and plan, and holds {shown(sorted(map(str, document)))}")
    if set(content) != names:
        unknown = sorted(map(str, set(content) - names))
        raise ValueError(f"its plan lacks {sorted(names - set(content))} and has the unknown fields {shown(unknown)}")
    for name, ndim in TABLES.items():
        if not _is_table(content[name], ndim):
            raise ValueError(f"its {name} is not a table of numbers of {ndim} dimension(s)")
    for name in FLAGS:
        if not (isinstance(content[name], list) and all(type(flag) is bool for flag in content[name])):
            raise ValueError(f"its {name} is not a list of true and false")
    return content, document["sha256"]


def _is_table(value: Any, ndim: int) -> bool:
    if not isinstance(value, list):
        return False
    if ndim == 1:
        return all(type(number) is float for number in value)
    return all(_is_table(row, ndim - 1) and len(row) == len(value[0]) for row in value)
