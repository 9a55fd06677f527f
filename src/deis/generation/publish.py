"""Files and folders that appear whole or not at all, where many processes on many machines write, without a lock."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
import time
from pathlib import Path

from .formats import Content, size
from .threads import in_threads

_PART = re.compile(r"\.part\.(?P<pid>\d+)\.(?P<host>.+)\.[^.]+")
_DAY = 24 * 3600.0
_FULL = (errno.ENOSPC, errno.EDQUOT)


def publish(content: Content, path: Path, replace: bool = False) -> bool:
    """Write a file, or a folder of files, and give it its name when it is whole and on the disk.

    Returns
    -------
    bool
        False where there is something of that name already, which stays as it is unless `replace`.

    Raises
    ------
    OSError
        On a full disk; the part is removed, and the message says what is missing.
    """
    prefix = f".part.{os.getpid()}.{socket.gethostname()}."
    try:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent, ignore_cleanup_errors=True) as part:
            _write(content, Path(part) / path.name)
            settled = _settle(Path(part) / path.name, path, replace)
            _to_disk(path.parent)
            return settled
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(error.errno, _full(path.name, size(content), free)) from error


def _full(name: str, wanted: int, free: int) -> str:
    return (
        f"the disk is full: {name} takes {wanted} bytes and {free} are free, so that at least {max(wanted - free, 1)} are missing; "
        "the part of it is removed. Make room and run again, which goes on from here"
    )


def _write(content: Content, path: Path) -> None:
    if isinstance(content, bytes):
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return
    path.mkdir()
    in_threads(lambda name: _write(content[name], path / name), list(content), wait=True)
    _to_disk(path)


def _settle(part: Path, path: Path, replace: bool) -> bool:
    """Give a part its name; False where something else has it."""
    if replace:
        part.replace(path)
        return True
    try:
        if part.is_dir():
            part.rename(path)  # fails where there is a file, or a folder that is not empty
        else:
            os.link(part, path)  # a rename would replace
    except OSError as error:
        if path.exists():
            return False
        if error.errno not in (errno.EPERM, errno.ENOTSUP):
            raise
        part.rename(path)  # a file system without hard links
    return True


def _to_disk(folder: Path) -> None:
    """Let the names in a folder survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_part(path: Path) -> bool:
    """Tell whether a name is that of something unfinished."""
    return _PART.fullmatch(path.name) is not None


def clean_up(folder: Path) -> None:
    """Remove what killed processes left unfinished: processes of this machine, and those of others after a day."""
    # Nothing is looked for within folders that another process may finish and remove at this moment.
    for path in (*folder.glob(".part.*"), *(folder / "records").glob(".part.*")):
        found = _PART.fullmatch(path.name)
        if found is not None and (_dead(int(found["pid"]), found["host"]) or _age(path) > _DAY):
            shutil.rmtree(path, ignore_errors=True)


def _dead(pid: int, host: str) -> bool:
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it is somebody else's
        return False
    return False


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # its process has finished it
        return 0.0
