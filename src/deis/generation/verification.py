"""Reading a folder of samples: whether it is whole, and its images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..arrays import AnyArray
from .formats import FORMATS, checksum, is_intact, read_content, shard_name
from .manifest import NAME, read_manifest
from .publish import is_part
from .record import Record, load_record

_SHAPE = ("format", "num", "shard")


@dataclass(frozen=True)
class Verification:
    """What is wrong with a folder of samples; each is told in words, and nothing was changed.

    Attributes
    ----------
    folder : Path
    shards : int
        How many there should be.
    missing : tuple of str
        Those that are not there, or have no record yet; running again makes them.
    damaged : tuple of str
        Those whose checksum is not that of their record or the manifest, and records that cannot be used.
    foreign : tuple of str
        What `deis.generate` did not write.
    unfinished : tuple of str
        What a worker is writing now, or was when it was killed; it is no part of the samples, and does no harm.
    """

    folder: Path
    shards: int
    missing: tuple[str, ...]
    damaged: tuple[str, ...]
    foreign: tuple[str, ...]
    unfinished: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all shards are there and whole, and nothing else is."""
        return not (self.missing or self.damaged or self.foreign)

    def __str__(self) -> str:
        good = self.shards - len(self.missing) - len({text.split()[0] for text in self.damaged})
        lines = [f"{self.folder}: {good} of {self.shards} shards are whole"]
        for kind in ("missing", "damaged", "foreign", "unfinished"):
            lines += [f"{kind}: {text}" for text in getattr(self, kind)]
        return "\n".join(lines)


def verify_samples(folder: str | Path) -> Verification:
    """Check every shard of a folder against its checksum, and look for what does not belong there.

    Raises
    ------
    FileNotFoundError, ValueError
        If the folder has no manifest, or one that cannot be used.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    wanted = _names(*(manifest["samples"][name] for name in _SHAPE))
    sums = {entry["name"]: entry["sha256"] for entry in manifest["shards"] or ()}
    missing: list[str] = []
    damaged: list[str] = []
    for name, record_path in wanted.items():
        wrong = _wrong(folder / name, folder / "records" / record_path, sums.get(name))
        if wrong is not None:
            (missing if wrong.startswith("is missing") else damaged).append(f"{name} {wrong}")
    foreign, unfinished = strangers(folder, *(manifest["samples"][name] for name in _SHAPE))
    return Verification(folder, len(wanted), tuple(missing), tuple(damaged), foreign, unfinished)


def _names(kind: str, num: int, shard: int) -> dict[str, str]:
    """Return the names of all shards, and those of their records."""
    return {shard_name(k, kind): f"{k:05d}.json" for k in range(-(-num // shard))}


def strangers(folder: Path, kind: str, num: int, shard: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what is in a folder and is neither its manifest, nor a shard or its record: foreign things, and unfinished ones."""
    names = _names(kind, num, shard)
    known = {folder / name for name in (*names, NAME, "records")} | {folder / "records" / name for name in names.values()}
    others = [path for part in (folder, folder / "records") for path in part.iterdir() if path not in known]
    told: tuple[list[str], list[str]] = [], []
    for path in sorted(others):
        told[is_part(path)].append(str(path.relative_to(folder)))
    return tuple(told[0]), tuple(told[1])


def _wrong(path: Path, record_path: Path, sha256: str | None) -> str | None:
    """Return in words what is wrong with a shard, or None."""
    if not path.exists():
        return "is missing; run again"
    if not record_path.exists():
        return "is missing its record; run again, which makes the shard again and compares"
    try:
        record = load_record(record_path)
    except ValueError as error:
        return f"cannot be checked: {error}"
    if not is_intact(path, record.sha256):
        return "is not what was written: its checksum differs from that of its record; move it away and run again"
    if sha256 not in (None, record.sha256):
        return "was written after the manifest, and differs from the one that the manifest tells of"
    return None


def read_samples(folder: str | Path) -> Iterator[tuple[Record, AnyArray]]:
    """Yield each shard's record and images, uint8 of shape (n, height, width, channels), in order.

    Raises
    ------
    FileNotFoundError
        If the folder has no manifest, or a shard is missing.
    ValueError
        If a shard is not what its record says.
    """
    folder = Path(folder)
    samples = read_manifest(folder)["samples"]
    names = _names(*(samples[name] for name in _SHAPE))
    absent = [name for name, record in names.items() if not ((folder / name).exists() and (folder / "records" / record).exists())]
    if absent:
        raise FileNotFoundError(f"{str(folder)!r} lacks {len(absent)} of {len(names)} shards; run deis generate again")
    for name, record_path in names.items():
        record, content = load_record(folder / "records" / record_path), read_content(folder / name)
        if checksum(content) != record.sha256:
            raise ValueError(f"{str(folder / name)!r} is not what was written; see deis generate --verify {folder}")
        yield record, FORMATS[samples["format"]].unpack(content)
