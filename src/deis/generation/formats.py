"""What a shard is made of: a folder of PNGs, an .npz file or a tar of WebDataset; the same bytes for the same samples, always."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..arrays import AnyArray
from ..extras import needs
from .threads import in_threads

Label = int | str
Labels = Sequence[Label] | None
Content = bytes | Mapping[str, bytes]
"""A file, or the files of a folder by name."""


@dataclass(frozen=True)
class Format:
    """A format of shards.

    Attributes
    ----------
    suffix : str
        How the name of a shard ends.
    pack : callable
        (images of shape (n, height, width, channels) in uint8, their numbers, their labels) -> the content of a shard.
    unpack : callable
        The content of a shard -> the images.
    """

    suffix: str
    pack: Callable[[AnyArray, range, Labels], Content]
    unpack: Callable[[Content], AnyArray]


def _name(i: int) -> str:
    return f"{i:08d}"


def _pngs(images: AnyArray) -> list[bytes]:
    """Return the PNG files of images; a fast network would wait for one thread."""
    return in_threads(_png, list(images))


def _png(image: AnyArray) -> bytes:
    """Return an image of shape (height, width, channels) as a PNG file."""
    with needs("cli", "writing PNG"):
        from PIL import Image
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(file, format="PNG")
    return file.getvalue()


def _pixels(data: bytes) -> AnyArray:
    """Return the image of a PNG file."""
    with needs("cli", "reading PNG"):
        from PIL import Image
    with Image.open(io.BytesIO(data)) as image:
        found: AnyArray = np.asarray(image)
    return found[..., None] if found.ndim == 2 else found


def _folder(images: AnyArray, numbers: range, labels: Labels) -> Content:
    return {f"{_name(i)}.png": png for i, png in zip(numbers, _pngs(images), strict=True)}


def _from_folder(content: Content) -> AnyArray:
    assert not isinstance(content, bytes)
    return np.stack([_pixels(content[name]) for name in sorted(content)])


def _npz(images: AnyArray, numbers: range, labels: Labels) -> Content:
    """Return arr_0, the images, and arr_1, the labels: the names that guided-diffusion's evaluator reads."""
    file = io.BytesIO()
    np.savez(file, images, *([] if labels is None else [np.array(labels)]))
    return file.getvalue()


def _from_npz(content: Content) -> AnyArray:
    assert isinstance(content, bytes)
    with np.load(io.BytesIO(content)) as arrays:
        found: AnyArray = arrays["arr_0"]
    return found


def _tar(images: AnyArray, numbers: range, labels: Labels) -> Content:
    """Return a tar in which sample i is i.png and, where there are labels, i.cls for a class or i.txt for a prompt."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for n, (i, png) in enumerate(zip(numbers, _pngs(images), strict=True)):
            members = {"png": png}
            if labels is not None:
                members["cls" if isinstance(labels[n], int) else "txt"] = str(labels[n]).encode()
            for kind, data in members.items():
                about = tarfile.TarInfo(f"{_name(i)}.{kind}")  # its time and its owner are 0
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    return file.getvalue()


def _from_tar(content: Content) -> AnyArray:
    assert isinstance(content, bytes)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        files = [tar.extractfile(about) for about in tar.getmembers() if about.name.endswith(".png")]
        return np.stack([_pixels(file.read()) for file in files if file is not None])


FORMATS = {
    "png": Format("", _folder, _from_folder),
    "npz": Format(".npz", _npz, _from_npz),
    "webdataset": Format(".tar", _tar, _from_tar),
}
"""By name."""


def read_content(path: Path) -> Content:
    """Return the content of a shard."""
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


def size(content: Content) -> int:
    """Return the number of bytes of a shard."""
    return len(content) if isinstance(content, bytes) else sum(map(len, content.values()))


def checksum(content: Content) -> str:
    """Return the SHA-256 of a file; of a folder, that of the text which `sha256sum *` prints in it."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    lines = [f"{hashlib.sha256(content[name]).hexdigest()}  {name}\n" for name in sorted(content)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_intact(path: Path, sha256: str) -> bool:
    """Tell whether what is there has this checksum; a folder of folders has none."""
    try:
        return checksum(read_content(path)) == sha256
    except IsADirectoryError:
        return False


def size_on_disk(path: Path) -> int:
    """Return the number of bytes of what is there, which costs no reading."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def shard_name(k: int, kind: str) -> str:
    """Return the name of shard k in a format."""
    return f"{k:05d}{FORMATS[kind].suffix}"
