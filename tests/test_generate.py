"""Samples by the ten thousand: killed anywhere they come out the same, and nothing that is there is overwritten."""

import errno
import gc
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deis
from deis.draws import drawn
from deis.features import load_images
from deis.generation import worker as working
from deis.generation.engines import get_engine, in_process
from deis.generation.formats import FORMATS
from deis.generation.job import Job, fingerprint, missing
from deis.generation.manifest import begin, finish
from deis.generation.publish import clean_up
from deis.generation.record import load_record

from .shards import MODEL, PLAN, SHAPE, contents, generate, images, tiny

ROOT = Path(__file__).parents[1]


# --- what is killed -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks")
def test_a_run_that_is_killed_anywhere_ends_with_the_same_bytes(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    command = [sys.executable, "-W", "error", str(ROOT / "tests" / "killed.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    kills = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines() if line.split()[0] in FORMATS}
    assert min(kills.values()) >= 6
    assert kills["npz"] > 20


def test_a_clean_up_does_not_look_into_what_another_process_is_about_to_finish(tmp_path: Path) -> None:
    living, dead = f".part.{os.getpid()}.{socket.gethostname()}.", f".part.{_dead_pid()}.{socket.gethostname()}."
    (tmp_path / "records").mkdir()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            for _ in range(20):
                with tempfile.TemporaryDirectory(prefix=living, dir=tmp_path):
                    pass

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(200):
            for place in (tmp_path, tmp_path / "records"):
                (place / f"{dead}x").mkdir()
            clean_up(tmp_path)
            assert not [path.name for place in (tmp_path, tmp_path / "records") for path in place.glob(f"{dead}*")]
    finally:
        stop.set()
        worker.join()


def _dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_what_the_dead_left_is_removed_and_what_the_living_write_is_not(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    host = socket.gethostname()
    generate(tmp_path)
    owners = (f"{gone.stdout.strip()}.{host}", f"{os.getppid()}.{host}", f"{gone.stdout.strip()}.node-1.a", "7.b")
    dead, living, elsewhere, old = (tmp_path / f".part.{owner}.ab" for owner in owners)
    for part in (dead, living, elsewhere, old):
        part.mkdir()
        (part / "00000.npz").write_bytes(b"half")
    os.utime(old, (time.time() - 25 * 3600,) * 2)
    generate(tmp_path)
    assert [part.exists() for part in (dead, living, elsewhere, old)] == [False, True, True, False]
    found = deis.verify_samples(tmp_path)
    assert found.ok
    assert set(found.unfinished) == {living.name, elsewhere.name}


def test_the_first_of_two_workers_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker finishes shard 0 while this one samples: the same shard once, and one of another batch once."""
    job = Job(tmp_path / "a", PLAN, fingerprint(MODEL, None), 4, tuple(range(4)), model=MODEL, shard=4, batch=4, format="npz")
    begin(job)
    worker, pack = working.make_worker(job), FORMATS["npz"].pack

    def meanwhile(other: Callable[[int], Any]) -> Any:
        def packed(*arguments: Any) -> Any:
            monkeypatch.setitem(FORMATS, "npz", replace(FORMATS["npz"], pack=pack))
            other(0)
            return pack(*arguments)

        return packed

    def is_other(*arguments: Any) -> bytes:
        content = pack(*arguments)
        assert isinstance(content, bytes)
        return content + b"\0"

    monkeypatch.setitem(FORMATS, "npz", replace(FORMATS["npz"], pack=meanwhile(working.make_worker(job))))
    assert worker(0) == replace(load_record(job.record_path(0)), seconds=worker(0).seconds)
    for path in (job.path(0), job.record_path(0)):
        path.unlink()

    def differently(k: int) -> None:
        monkeypatch.setitem(FORMATS, "npz", replace(FORMATS["npz"], pack=is_other))
        working.make_worker(replace(job, batch=2))(k)
        monkeypatch.setitem(FORMATS, "npz", replace(FORMATS["npz"], pack=pack))

    monkeypatch.setitem(FORMATS, "npz", replace(FORMATS["npz"], pack=meanwhile(differently)))
    assert worker(0).batch == 2
    assert [record.batch for record in finish(job)] == [2]
    assert deis.verify_samples(job.out).ok


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links_does_too(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(tmp_path / "a")

    def refused(*paths: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refused)
    generate(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    (tmp_path / "b" / "records" / "00000.json").unlink()
    (tmp_path / "b" / "00000.npz").write_text("mine")
    with pytest.raises(ValueError, match="it was left as it is"):
        generate(tmp_path / "b")
    assert (tmp_path / "b" / "00000.npz").read_text() == "mine"


# --- what is made ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(FORMATS))
def test_the_samples_are_those_of_a_plain_run(tmp_path: Path, kind: str) -> None:
    MODEL.net.batches.clear()  # type: ignore[attr-defined]
    records = generate(tmp_path, format=kind, dtype="float64", seed=3)
    labels = np.arange(10)
    x_T = torch.from_numpy(drawn(range(10), SHAPE, float(PLAN.sigma[0]), 3).astype(np.float64))
    x_0 = deis.sample(PLAN, MODEL.conditional(labels), x_T).numpy()
    expected = np.rint(np.clip(x_0 / 2 + 0.5, 0, 1) * 255)
    np.testing.assert_array_equal(images(tmp_path).transpose(0, 3, 1, 2), expected)
    assert 0 < expected.mean() < 255
    assert [record.samples for record in records] == [4, 4, 2]
    assert [label for record in records for label in record.labels] == labels.tolist()
    assert deis.verify_samples(tmp_path).ok
    assert set(MODEL.net.batches) == {10, 4}  # type: ignore[attr-defined]  # every call of `generate` is of a full batch
    before = contents(tmp_path)
    assert generate(tmp_path, format=kind, dtype="float64", seed=3) == records
    assert contents(tmp_path) == before


def test_a_folder_of_pngs_is_one_of_pictures(tmp_path: Path) -> None:
    generate(tmp_path, format="png")
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == [f"{i:08d}.png" for i in range(10)]
    expected = images(tmp_path).transpose(0, 3, 1, 2) / np.float32(127.5) - 1
    np.testing.assert_allclose(load_images(tmp_path), expected, atol=1e-6)
    record = load_record(tmp_path / "records" / "00000.json")
    total = subprocess.run(
        "sha256sum * | sha256sum", shell=True, cwd=tmp_path / "00000", capture_output=True, text=True, check=True
    )
    assert total.stdout.split()[0] == record.sha256


def test_an_npz_has_the_names_of_guided_diffusion(tmp_path: Path) -> None:
    generate(tmp_path, 6, shard=6, labels=[3, 1, 4, 1, 5, 9])
    with np.load(tmp_path / "00000.npz") as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        assert (arrays["arr_0"].dtype, arrays["arr_0"].shape) == (np.uint8, (6, 4, 5, 3))
        np.testing.assert_array_equal(arrays["arr_1"], [3, 1, 4, 1, 5, 9])


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_tars(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    generate(tmp_path, format="webdataset")
    reader = webdataset.WebDataset(str(tmp_path / "{00000..00002}.tar"), shardshuffle=False)
    found = list(reader.decode("rgb8").to_tuple("__key__", "png", "cls"))
    gc.collect()
    assert [key for key, _, _ in found] == [f"{i:08d}" for i in range(10)]
    assert [label for _, _, label in found] == list(range(10))
    np.testing.assert_array_equal(np.stack([pixels for _, pixels, _ in found]), images(tmp_path))


def test_jax_makes_the_same_samples_and_compiles_once(tmp_path: Path) -> None:
    counted = []

    def net(x: Any, t: Any, labels: Any) -> Any:
        import jax.numpy as jnp

        counted.append(len(x))
        return jnp.tanh(x - jnp.asarray(MODEL.net.shift.numpy())[labels])  # type: ignore[attr-defined]

    labels = [7, 1, 8, 2, 8, 1, 8, 2, 8, 4]
    generate(tmp_path / "torch", labels=labels)
    generate(tmp_path / "one", 4, labels=labels[:4], model=replace(MODEL, net=net), backend="jax")
    of_one_shard = len(counted)
    generate(tmp_path / "jax", labels=labels, model=replace(MODEL, net=net), backend="jax")
    difference = images(tmp_path / "torch").astype(int) - images(tmp_path / "jax").astype(int)
    assert np.abs(difference).max() <= 1
    assert len(counted) == 2 * of_one_shard > 0  # traced once, whatever the labels of the three shards
    assert json.loads((tmp_path / "jax" / "manifest.json").read_text())["shards"][0]["by"].startswith("jax ")


def test_a_job_can_be_sent_elsewhere(tmp_path: Path) -> None:
    model = deis.load_model()
    job = Job(tmp_path, model.plan(3), fingerprint(model, None), 3, (1, 2, 3), shard=2, batch=2)
    sent = pickle.loads(pickle.dumps(job))
    assert sent == job
    begin(job)
    made: list[Any] = []
    get_engine("in_process")(sent, missing(sent), made.append)
    assert sorted(record.name for record in made) == ["00000", "00001"]
    assert deis.verify_samples(tmp_path).ok


# --- memory and disks that are too small ----------------------------------------------------------------------------------


def test_out_of_memory_halves_the_batch_and_goes_on(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="it goes on with a batch of") as caught:
        records = generate(tmp_path / "a", 20, model=tiny(most=5), shard=16, batch=16)
    assert len(caught) == 2
    assert {record.batch for record in records} == {4}
    generate(tmp_path / "b", 20, shard=16, batch=4)
    np.testing.assert_array_equal(images(tmp_path / "a"), images(tmp_path / "b"))


def test_a_run_that_goes_on_finds_the_batch_of_the_first_one(tmp_path: Path) -> None:
    """The last shard alone would fit as it is, and must not be made with another batch than in a run that was not interrupted."""
    with pytest.warns(UserWarning, match="goes on with a batch of"):
        generate(tmp_path, 21, model=tiny(most=5), shard=16)
    before = contents(tmp_path)
    (tmp_path / "00001.npz").unlink()
    with pytest.warns(UserWarning, match="goes on with a batch of"):
        assert {record.batch for record in generate(tmp_path, 21, model=tiny(most=5), shard=16)} == {4}
    assert contents(tmp_path) == before


def test_memory_that_holds_no_sample_is_an_error(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="goes on with a batch of"), pytest.raises(MemoryError, match="with one sample a call"):
        generate(tmp_path, 4, model=tiny(most=0))


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error: Exception, is_memory: bool) -> None:
    assert working.is_out_of_memory(error) is is_memory


def test_torch_and_jax_say_that_memory_is_short_as_expected() -> None:
    import jax

    with pytest.raises(RuntimeError) as torch_error:
        torch.empty(2**60, dtype=torch.uint8)
    assert working.is_out_of_memory(torch_error.value)
    assert issubclass(jax.errors.JaxRuntimeError, RuntimeError)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_full_disk_leaves_no_part_and_says_what_is_missing(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, PLAN, fingerprint(MODEL, None), 4, tuple(range(4)), model=MODEL, shard=4, batch=4, format=kind)
    begin(job)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
        with pytest.raises(OSError, match=r"takes \d+ bytes and 10 are free, so that at least \d+ are missing"):
            in_process(job, [0], print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "records"]
    assert generate(tmp_path, 4, format=kind)[0].samples == 4


FILLED = """
import os, sys
import deis

out, sde = sys.argv[1], deis.VPSDE.linear()
model = deis.Pretrained(lambda x, t, labels: x, sde, "eps", (3, 64, 64), None, None, 1.0)
settings = {"model": model, "plan": deis.make_plan(sde, nfe=1), "shard": 4, "format": "npz"}
os.system(f"mount -t tmpfs -o size=256k none {out}")
try:
    deis.generate(out + "/a", 40, **settings)
except OSError as error:
    print(error.strerror)
found = deis.verify_samples(out + "/a")
print(len(found.missing), found.damaged, found.foreign, found.unfinished)
os.system(f"mount -o remount,size=64m {out}")
deis.generate(out + "/a", 40, **settings)
print(deis.verify_samples(out + "/a").ok)
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A tmpfs of 256 kB, in a namespace of its own; then it grows, and the run goes on."""
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [*alone, sys.executable, "-W", "error", "-c", FILLED, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    message, left, whole = done.stdout.splitlines()
    assert "the disk is full: 0000" in message
    assert "bytes and " in message
    assert 0 < int(left.split()[0]) < 10
    assert left.endswith(" () () ()")
    assert whole == "True"
