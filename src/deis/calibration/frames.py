"""Arrays of many times on disk, one safetensors file per time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..arrays import Array
from ..files import replacing

Record = Callable[[int, dict[str, Array]], None]
"""(i, arrays by name): what to do with the arrays of the time numbered i."""


@dataclass(frozen=True)
class Frames(Sequence[Array]):
    """Arrays in the safetensors files of a folder, one file per time, read on demand."""

    folder: Path
    name: str
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: Any) -> Any:
        from safetensors.numpy import load_file

        places = range(self.length)[i]
        return load_file(frame(self.folder, places))[self.name] if isinstance(places, int) else [self[j] for j in places]


def frame(folder: Path, i: int) -> Path:
    return folder / f"teacher-{i:04d}.safetensors"


def writer(folder: Path) -> Record:
    """Return a function that writes the arrays of each time to a folder."""
    try:
        from safetensors.numpy import save_file
    except ImportError:
        raise ImportError("a teacher on disk needs safetensors: pip install safetensors") from None
    folder.mkdir(parents=True, exist_ok=True)

    def record(i: int, arrays: dict[str, Array]) -> None:
        with replacing(frame(folder, i)) as partial:
            save_file(arrays, partial)

    return record
