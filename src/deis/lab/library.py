"""The models that the lab may load: the bundled one, and those below the folders that it was started with."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..arguments import kind, shown
from ..linear.pretrained import scalar_only
from ..model.load import load_model
from ..model.pretrained import Pretrained

BUNDLED = "the bundled MNIST model"
_SUFFIXES = {".ckpt", ".onnx", ".pt", ".pth", ".safetensors"}
_MARKS = ("deis.json", "model_index.json")
_DEEPEST, _MOST, _KEPT = 4, 200, 2


class Library:
    """The models by name, loaded when they are asked for; the last two stay loaded.

    Parameters
    ----------
    folders : iterable of path
        A name is the path of a file or folder below one of these, once all links are followed; there are no others, and none is
        ever fetched from elsewhere.

    Raises
    ------
    ValueError
        Where one is no folder.
    """

    def __init__(self, folders: Iterable[str | os.PathLike[str]] = ()) -> None:
        self.folders = tuple(Path(folder).resolve() for folder in folders)
        for folder in self.folders:
            if not folder.is_dir():
                raise ValueError(f"models={str(folder)!r} is no folder; give one that holds models")
        self._loaded: dict[str, Pretrained] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Return the names to choose from: the bundled model, and what looks like a model below the folders, at most 200."""
        found = sorted({str(path) for folder in self.folders for path in _models(folder, _DEEPEST)})
        return [BUNDLED, *found[:_MOST]]

    def path(self, name: str) -> Path | None:
        """Return the path of a name, with all links followed; None for the bundled model.

        Raises
        ------
        TypeError
            Where it is no string.
        ValueError
            Where there is nothing of that name below the folders, or it leads out of them, itself or by a file in it.
        """
        kind("model", name, str, "a path,")
        if name == BUNDLED:
            return None
        try:
            path = Path(name).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):  # not there, a circle of links, a null character
            path = None
        if path is None or not self._owns(path):  # one message, so that nobody learns what lies elsewhere
            places = " or ".join(map(str, self.folders)) or "no folder: start the lab with --models DIR"
            raise ValueError(f"model={shown(name)} is not there, or not below {places}")
        if path.is_dir():
            for file in path.rglob("*"):
                if not self._owns(file.resolve()):
                    raise ValueError(f"model={shown(name)} holds a link that leads out of the lab's folders: {file.name!r}")
        return path

    def _owns(self, path: Path) -> bool:
        return any(path.is_relative_to(folder) for folder in self.folders)

    def load(self, name: str) -> Pretrained:
        """Return the model of a name.

        Raises
        ------
        ValueError
            As `path`; and whatever `deis.load_model` raises.
        """
        path = self.path(name)
        key = BUNDLED if path is None else str(path)
        with self._lock:
            if key not in self._loaded:
                self._loaded[key] = scalar_only(load_model(path))
                while len(self._loaded) > _KEPT:
                    self._loaded.pop(next(iter(self._loaded)))
            return self._loaded[key]


def _models(folder: Path, depth: int) -> Iterator[Path]:
    """Yield what looks like a model in a folder, itself or down to a depth."""
    if any((folder / mark).is_file() for mark in _MARKS):
        yield folder
        return
    for path in folder.iterdir() if os.access(folder, os.R_OK | os.X_OK) else ():
        if path.suffix in _SUFFIXES and path.is_file():
            yield path
        elif depth > 1 and path.is_dir() and not path.is_symlink():
            yield from _models(path, depth - 1)
