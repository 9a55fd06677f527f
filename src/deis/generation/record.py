"""What is known of a shard: its checksum, and what it was made with. Each has a file of its own, which only its maker writes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..arguments import shown
from ..files import parse
from .formats import Label
from .publish import publish

VERSION = 1
"""Of records and manifests, and of how samples follow from the seed: shards of two versions do not go together."""


@dataclass(frozen=True)
class Record:
    """What is known of a shard.

    Attributes
    ----------
    name : str
        Its name in the folder.
    samples : int
        How many it holds.
    sha256 : str
        Its checksum; of a folder, that of the text which `sha256sum *` prints in it.
    bytes : int
        Its size; of a folder, that of its files together.
    batch : int
        The number of samples of each call of the network, on which the last bits of samples depend.
    by : str
        The framework and the device that made it.
    seconds : float
        How long that took.
    labels : tuple of int or str, optional
        Those of its samples.
    version : int
        The version of the library's shards; see `VERSION`.
    """

    name: str
    samples: int
    sha256: str
    bytes: int
    batch: int
    by: str
    seconds: float
    labels: tuple[Label, ...] | None = None
    version: int = VERSION

    def save(self, path: Path) -> None:
        """Write it, whole or not at all, over one of the same shard."""
        publish((json.dumps(asdict(self)) + "\n").encode(), path, replace=True)


def load_record(path: Path) -> Record:
    """Return the record in a file.

    Raises
    ------
    ValueError
        If it is none, or was written by another version.
    """
    try:
        found = parse(path.read_bytes())
        known = {field.name for field in fields(Record)}
        if not isinstance(found, dict):
            raise ValueError("it holds no record")
        check_version(found.get("version"))
        if set(found) != known:
            raise ValueError(f"it must hold {sorted(known)}, and holds {shown(sorted(found))}")
    except ValueError as error:
        raise ValueError(f"the record {str(path)!r} is not usable: {error}") from None
    return Record(**found | {"labels": None if found["labels"] is None else tuple(found["labels"])})


def check_version(version: object) -> None:
    """Refuse what another version of the library has written.

    Raises
    ------
    ValueError
        If it is another version.
    """
    if version != VERSION:
        age = "an older" if isinstance(version, int) and version < VERSION else "another"
        raise ValueError(
            f"it was written by {age} version of the library, {shown(version)}, and this is {VERSION}: their samples differ; "
            "go on with that version, or begin in another folder"
        )
