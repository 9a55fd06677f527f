"""Kill `deis generate` with SIGKILL, again and again, and compare what it leaves in the end with a run that nobody killed.

The network is loaded once, and every run is a fork of this process: a run then takes a second, and not ten.
"""

import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from deis.cli import main
from deis.generation.job import load

NUM, SHARD = 6, 2
HELD = load(None, "torch", None, "float32", {})  # which the runs find in memory
CALLS = {"open", "write", "fsync", "link", "rename", "replace", "mkdir", "unlink", "rmdir"}
CALLERS = ("publish.py", "pathlib", "tempfile.py", "shutil.py")


def start(out: Path, kind: str, step: int | None = None) -> int:
    """Start a run, which kills itself before the call of this number that touches a file, from 1; return its process id."""
    child = os.fork()
    if child:
        return child
    seen = 0

    def hook(frame: FrameType, event: str, called: Any) -> None:
        nonlocal seen
        if event == "c_call" and called.__name__ in CALLS and any(name in frame.f_code.co_filename for name in CALLERS):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    if step is not None:
        threading.setprofile(hook)
        sys.setprofile(hook)
    try:
        numbers = ["--num", str(NUM), "--shard", str(SHARD), "--nfe", "2"]
        main(["generate", *numbers, "--format", kind, "--out", str(out)], standalone_mode=False)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)
    os._exit(0)


def ended(child: int) -> bool:
    """Wait for a run; tell whether it came to its end, and not to that of a kill."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def killed_at_every_step(out: Path, kind: str) -> int:
    """Kill runs before their first call that touches a file, their second, ..., until one comes to its end; return the kills."""
    step = 1
    while not ended(start(out, kind, step)):
        check_whole(out, kind)
        step += 1
    return step - 1


def two_at_once(out: Path, kind: str) -> int:
    """Let two runs work on one folder, and kill one or the other at random moments; return the kills."""
    rng, kills = random.Random(kind), 0
    while kills < 6:
        pair = [start(out, kind), start(out, kind)]
        time.sleep(rng.uniform(0, 0.8))
        for child in rng.sample(pair, rng.randint(1, 2)):
            os.kill(child, signal.SIGKILL)
        kills += sum(not ended(child) for child in pair)
        check_whole(out, kind)
    pair = [start(out, kind), start(out, kind)]
    assert [ended(child) for child in pair] == [True, True]
    return kills


def check_whole(out: Path, kind: str) -> None:
    """Check that what a kill has left is whole or not there: every shard that has its name, and the manifest."""
    shards = {path.name for path in out.glob("0*")} if out.exists() else set()
    expected = contents(out.parent / "whole" / kind)
    found = contents(out) if shards else {}
    for shard in shards:
        assert {name for name in found if name.startswith(shard)} == {name for name in expected if name.startswith(shard)}
        assert all(found[name] == expected[name] for name in found if name.startswith(shard)), shard
    if (out / "manifest.json").exists():
        json.loads((out / "manifest.json").read_text())


def contents(out: Path) -> dict[str, str]:
    """Return the checksum of every file but the records, which tell of seconds."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.parent.name != "records"]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for kind, kill in (("npz", killed_at_every_step), ("png", killed_at_every_step), ("webdataset", two_at_once)):
        assert ended(start(folder / "whole" / kind, kind))
        kills = kill(folder / kind, kind)
        assert contents(folder / kind) == contents(folder / "whole" / kind), kind
        assert len(contents(folder / kind)) == 1 + (NUM if kind == "png" else NUM // SHARD), kind
        print(kind, kills)
