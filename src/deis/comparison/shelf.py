"""Folders of comparisons: what is kept of each model and noise, and reports that are not written over others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

from ..files import replacing
from .identity import Identity

REPORT = "comparison.json"
WORK = "work"
_IDENTITY = "identity.json"


def shelf(folder: str | Path, identity: Identity) -> Path:
    """Return the folder within `folder` for what is measured of one model, schedule and noise; it is made where it is not there.

    Of models of the same weights, or of functions in which none were found, that predict different things, each has its own.
    """
    for path in _candidates(Path(folder), identity.key):
        kept = _read(path / _IDENTITY)
        if kept is None:
            path.mkdir(parents=True, exist_ok=True)
            with replacing(path / _IDENTITY) as partial:
                partial.write_text(json.dumps(asdict(identity)))
            return path
        if identity.same(kept):
            return path
    raise AssertionError


def _candidates(folder: Path, key: str) -> Iterator[Path]:
    return (folder / f"{key}-{i}" for i in count(1))


def check_folder(out: str | Path) -> None:
    """Raise ValueError where a folder for a report holds something else than a report."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r} is a file; give the name of a folder")
    if out.is_dir() and any(out.iterdir()) and _document(out) is None:
        there = ", ".join(sorted(path.name for path in out.iterdir())[:3])
        raise ValueError(f"out={str(out)!r} holds files that are no comparison ({there}); give an empty folder, or a new name")


def claim(out: str | Path, identity: Identity) -> None:
    """Make a folder for a report, or take one of the same comparison, so that an interrupted one goes on.

    Raises
    ------
    ValueError
        Where it holds something else, or a comparison of another model, schedule or noise.
    """
    check_folder(out)
    out = Path(out)
    kept = _read(out / REPORT)
    if kept is not None and not identity.same(kept):
        raise ValueError(
            f"out={str(out)!r} holds a comparison of another model, schedule, noise or set of real images; give another folder, or "
            "remove that one"
        )
    if kept is None:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / REPORT) as partial:
            partial.write_text(json.dumps({"finished": False, "identity": asdict(identity)}))


def _document(out: Path) -> dict[str, Any] | None:
    """Return what a report was drawn from, or of one that is not finished whose it is; None where there is no report."""
    try:
        found = json.loads((out / REPORT).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "identity" in found else None


def _read(path: Path) -> Identity | None:
    """Return the identity in a file, alone or in a report."""
    try:
        found = json.loads(path.read_text())
        found = found.get("identity", found)
        return Identity(found["key"], tuple(found["probe"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
