"""Damage to a plan file: it is refused, or what is read is the very same plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


def check_fuzzed(data: st.DataObject, plan: Any, load: Callable[[Path], Any], path: Path) -> None:
    """Change, insert or delete one byte of a plan's file, or cut it, as hypothesis draws; a change of white space is none."""
    plan.save(path)
    text = path.read_bytes()
    i, byte = data.draw(st.integers(0, len(text) - 2)), bytes([data.draw(st.integers(0, 255))])
    before, after = text[:i], text[i + 1 :]
    edits = {"cut": before, "replace": before + byte + after, "insert": before + byte + text[i:], "delete": before + after}
    path.write_bytes(edits[data.draw(st.sampled_from(sorted(edits)))])
    try:
        found = load(path)
    except ValueError as error:
        assert path.name in str(error)  # noqa: PT017
    else:
        assert found == plan
