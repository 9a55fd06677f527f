"""The manifest of a folder of samples: what they are samples of, and the checksum of each shard."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..arguments import shown
from ..files import digest, parse
from .formats import size_on_disk
from .job import Job, is_made, missing
from .publish import is_part, publish
from .record import VERSION, Record, check_version, load_record

NAME = "manifest.json"
FORMAT = "deis.samples"
_PLAIN = ("num", "seed", "guidance", "backend", "dtype", "format", "shard", "batch")
_ABOUT = {"plan", "model", "labels", *_PLAIN}


def about(job: Job) -> dict[str, Any]:
    """Return all that the samples depend on, and how they are written."""
    model = {"name": job.model if isinstance(job.model, str) else None, "options": dict(job.load_options), "sha256": job.weights}
    labels = None if job.labels is None else digest(json.dumps(job.labels))
    return {"plan": job.plan.document(), "model": model, "labels": labels, **{name: getattr(job, name) for name in _PLAIN}}


def begin(job: Job) -> None:
    """Make the folder and its manifest, or check the one that is there.

    Raises
    ------
    FileExistsError
        If the folder has no manifest and is not empty.
    ValueError
        If the manifest is that of other samples, the message names the differences; or a shard is not what its record says.
    """
    manifest = job.out / NAME
    if not manifest.exists():
        found = sorted(path.name for path in job.out.iterdir() if not is_part(path)) if job.out.exists() else []
        if found and not manifest.exists():  # another process may have begun in this moment
            raise FileExistsError(f"{str(job.out)!r} has no {NAME}, and holds {shown(found)}; give a folder that is new or empty")
        job.out.mkdir(parents=True, exist_ok=True)
        publish(_text(about(job), None), manifest)
    (job.out / "records").mkdir(exist_ok=True)
    differences = _differences(read_manifest(job.out)["samples"], about(job))
    if differences:
        raise ValueError(f"{str(job.out)!r} holds other samples: {'; '.join(differences)}. Give another folder")
    _check_shards(job)


def _text(samples: dict[str, Any], records: list[Record] | None) -> bytes:
    """Return a manifest, the same for the same shards, however long they took."""
    shards = None if records is None else [_entry(record) for record in records]
    document = {"format": FORMAT, "version": VERSION, "samples": samples, "shards": shards}
    return (json.dumps(document, indent=1) + "\n").encode()


def _entry(record: Record) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if name not in ("seconds", "labels", "version")}


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Return the manifest of a folder: "samples", what they are, and "shards", None as long as some are missing.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is damaged, or of another version.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {NAME}; give a folder that deis generate wrote")
    try:
        found = parse(path.read_bytes())
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        check_version(found.get("version"))
        if not set(found.get("samples") or ()) == _ABOUT:
            raise ValueError(f"its samples must say {', '.join(sorted(_ABOUT))}")
    except ValueError as error:
        raise ValueError(f"the manifest {str(path)!r} is not usable: {error}") from None
    return found


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return in words what differs between two manifests; the name of the model may, if it has the same weights."""
    found = []
    for name in here:
        pair = [_told(name, each[name]) for each in (there, here)]
        if pair[0] != pair[1]:
            found.append(f"{name} is {pair[0]} there and {pair[1]} here")
    return found


def _told(name: str, value: Any) -> str:
    if name == "plan":
        content = value["plan"]
        return f"{content['method']!r} in {sum(content['calls'])} evaluations ({value['sha256'][:12]})"
    if name == "model":
        return f"{value['sha256'][:12] or 'a function'} {value['options'] or ''}".strip()
    return value[:12] if name == "labels" and value is not None else shown(value)


def _check_shards(job: Job) -> None:
    """Check what can be checked without reading the shards: their records, and their sizes."""
    wrong = []
    for k in job.shards:
        if is_made(job, k):
            record, found = load_record(job.record_path(k)), size_on_disk(job.path(k))
            if found != record.bytes:
                wrong.append(f"{record.name} has {found} bytes of {record.bytes}")
    if wrong:
        raise ValueError(
            f"{str(job.out)!r} holds shards that are not what was written: {shown(wrong)}; they were left as they are: move them "
            "away and run again, which makes them again"
        )


def records(job: Job) -> list[Record]:
    """Return the records of the finished shards, in order."""
    return [load_record(job.record_path(k)) for k in job.shards if is_made(job, k)]


def finish(job: Job) -> list[Record]:
    """Return the records of the finished shards, and write them into the manifest if they are all."""
    found = records(job)
    if not missing(job):
        publish(_text(read_manifest(job.out)["samples"], found), job.out / NAME, replace=True)
    return found
