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
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

import deis
from deis.cli import main
from deis.draws import drawn
from deis.features import distances, load_images
from deis.generation import worker as working
from deis.generation.engines import get_engine, in_process
from deis.generation.formats import FORMATS
from deis.generation.job import Job, fingerprint, missing
from deis.generation.manifest import begin, finish
from deis.generation.record import load_record

ROOT = Path(__file__).parents[1]
PLAN = deis.make_plan(deis.VPSDE.linear(), "tab1", 3)
SHAPE = (3, 4, 5)


class Tiny(nn.Module):
    """A network of eps with classes, each of which shifts the data in its own way; it remembers the sizes of its batches."""

    def __init__(self, seed: int = 0, most: int = 10**6) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.shift = nn.Parameter(torch.randn(10, *SHAPE, generator=generator), requires_grad=False)
        self.most, self.batches = most, list[int]()

    def forward(self, x: Any, t: Any, labels: Any) -> Any:
        self.batches.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate room for {len(x)} samples")
        return torch.tanh(x - self.shift[torch.as_tensor(labels)])


def tiny(seed: int = 0, most: int = 10**6) -> deis.Pretrained:
    return deis.Pretrained(Tiny(seed, most), deis.VPSDE.linear(), "eps", SHAPE, 10, None, 1.0)


MODEL = tiny()


def generate(out: Path, num: int = 10, **settings: Any) -> Any:
    own: dict[str, Any] = {"model": MODEL, "plan": PLAN, "shard": 4, "format": "npz"}
    return deis.generate(out, num, **own | settings)


def contents(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and path.parent.name != "records"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def images(out: Path) -> Any:
    return np.concatenate([pixels for _, pixels in deis.read_samples(out)])


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


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"plan": deis.make_plan(deis.VPSDE.linear(), "ddim", 4)},
            r"plan is 'tab1' in 3 evaluations .* there and 'ddim' in 4",
        ),
        ({"plan": deis.make_plan(deis.VPSDE.linear(), "tab1", 3, "rho")}, r"plan is 'tab1' .* there and 'tab1' in 3 evaluations"),
        ({"model": tiny(seed=1)}, "model is [0-9a-f]{12} there and [0-9a-f]{12} here"),
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"num": 11}, "labels is .*; num is 10 there and 11 here"),
        ({"guidance": 2.0}, "guidance is 1.0 there and 2.0 here"),
        ({"labels": 3}, "labels is [0-9a-f]{12} there and [0-9a-f]{12} here"),
        ({"format": "png"}, "format is 'npz' there and 'png' here"),
        ({"dtype": "float64"}, "dtype is 'float32' there and 'float64' here"),
        ({"batch": 2, "shard": 2}, "shard is 4 there and 2 here; batch is 4 there and 2 here"),
    ],
)
def test_samples_of_something_else_are_refused_by_name(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    generate(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"holds other samples: {message}.*Give another folder"):
        generate(tmp_path, **other)
    assert contents(tmp_path) == before


def test_sizes_that_are_not_given_are_those_of_the_folder(tmp_path: Path) -> None:
    generate(tmp_path, shard=3, batch=2)
    before = contents(tmp_path)
    (tmp_path / "00001.npz").unlink()
    generate(tmp_path, shard=None)
    assert contents(tmp_path) == before


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("Once")
    with pytest.raises(FileExistsError, match=r"has no manifest.json, and holds \['thesis.tex'\]"):
        generate(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_foreign_file_is_reported_and_left_alone(tmp_path: Path) -> None:
    generate(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "records" / "more").mkdir()
    with pytest.warns(UserWarning, match=r"did not write; it is left alone: \('notes.txt', 'records/more'\)"):
        generate(tmp_path)
    assert deis.verify_samples(tmp_path).foreign == ("notes.txt", "records/more")
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_foreign_file_in_the_place_of_a_shard_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    job = Job(tmp_path, PLAN, fingerprint(MODEL, None), 4, tuple(range(4)), model=MODEL, shard=4, batch=4, format=kind)
    begin(job)
    for number, place in enumerate((job.path(0), job.path(0) / "inner")):
        place.parent.mkdir(exist_ok=True)
        place.write_text("mine")
        with pytest.raises(ValueError, match="is not the shard that belongs there; it was left as it is"):
            generate(tmp_path, 4, format=kind)
        assert place.read_text() == "mine"
        assert deis.verify_samples(tmp_path).missing[0].startswith(f"{job.path(0).name} is missing its record")
        place.unlink()
        if number:
            place.parent.rmdir()
    generate(tmp_path, 4, format=kind)
    job.record_path(0).unlink()  # as if it had been killed between the shard and its record
    generate(tmp_path, 4, format=kind)
    assert deis.verify_samples(tmp_path).ok


def damage(path: Path, kind: str) -> None:
    if kind == "flipped":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        os.truncate(path, 100)


@pytest.mark.parametrize("kind", list(FORMATS))
@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_damaged_shard_is_reported_and_not_overwritten(tmp_path: Path, kind: str, how: str) -> None:
    generate(tmp_path, format=kind)
    before = contents(tmp_path)
    (path,) = tmp_path.glob("00001*")
    name, path = path.name, path / "00000005.png" if kind == "png" else path
    damage(path, how)
    damaged = path.read_bytes()
    found = deis.verify_samples(tmp_path)
    assert not found.ok
    assert [text.partition(":")[0] for text in found.damaged] == [f"{name} is not what was written"]
    with pytest.raises(ValueError, match="is not what was written"):
        list(deis.read_samples(tmp_path))
    if how == "truncated":
        with pytest.raises(ValueError, match=rf"not what was written: \['{name} has \d+ bytes of \d+'\].*move them away"):
            generate(tmp_path, format=kind)
    assert path.read_bytes() == damaged
    shutil.rmtree(path.parent) if kind == "png" else path.unlink()
    generate(tmp_path, format=kind)
    assert contents(tmp_path) == before


def test_a_shard_of_an_older_version_is_refused(tmp_path: Path) -> None:
    generate(tmp_path)
    record = tmp_path / "records" / "00001.json"
    record.write_text(json.dumps({"name": "00001.npz", "version": 0}))
    with pytest.raises(
        ValueError, match=r"records/00001.json' is not usable: it was written by an older version.*, 0, and this is 1"
    ):
        generate(tmp_path)
    (damaged,) = deis.verify_samples(tmp_path).damaged
    assert "00001.npz cannot be checked" in damaged
    assert "older version" in damaged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "an older version of the library, 0, and this is 1"),
        ({"version": 2}, "another version of the library, 2, and this is 1"),
        ({"format": "deis.plan"}, "its format is not 'deis.samples'"),
        ({"samples": {}}, "its samples must say"),
        (None, "truncated or not JSON"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    generate(tmp_path)
    manifest = tmp_path / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[:100] if change is None else json.dumps(json.loads(text) | change))
    for use in (generate, deis.verify_samples):
        with pytest.raises(ValueError, match=message):
            use(tmp_path)


def test_a_shard_that_the_manifest_does_not_tell_of_is_reported(tmp_path: Path) -> None:
    generate(tmp_path / "a")
    generate(tmp_path / "b", seed=1)
    for name in ("00001.npz", "records/00001.json"):
        shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    (damaged,) = deis.verify_samples(tmp_path / "a").damaged
    assert "differs from the one that the manifest tells of" in damaged


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([*range(9), 10], r"labels\[9\]=10 is not a class of the model, 0 ... 9"),
        (["cat"] * 10, r"labels\[0\]='cat' is not a class"),
        (-1, r"labels\[0\]=-1 is not a class"),
        ([1, 2], "labels must be one for each of the 10 samples, and are 2"),
    ],
)
def test_unknown_labels_are_refused(tmp_path: Path, labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / "a", labels=labels)
    assert not (tmp_path / "a").exists()


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    plain = replace(MODEL, num_classes=None)
    with pytest.raises(ValueError, match="the model has no classes"):
        generate(tmp_path / "a", model=plain, labels=3)
    with pytest.raises(ValueError, match="plan was made for the schedule"):
        generate(tmp_path / "a", plan=deis.make_plan(deis.EDM(), nfe=3))
    with pytest.raises(ValueError, match="engine='abacus' is unknown; the known ones are 'in_process'"):
        generate(tmp_path / "a", engine="abacus")
    with pytest.raises(ValueError, match=r"the samples \d+ ... \d+ of 'tab1' are not finite"):
        generate(tmp_path / "a", model=replace(plain, net=lambda x, t, labels: x * np.nan))
    with pytest.raises(FileNotFoundError, match="lacks 3 of 3 shards"):
        list(deis.read_samples(tmp_path / "a"))
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json; give a folder that deis generate wrote"):
        deis.verify_samples(tmp_path)


def test_prompts_reach_a_network_of_text(tmp_path: Path) -> None:
    seen: list[Any] = []

    def embed(prompts: Any) -> Any:
        seen.append(list(prompts))
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.float32)[:, None]
        return lengths, 0 * lengths

    def net(x: Any, t: Any, condition: Any) -> Any:
        return x * torch.as_tensor(condition).reshape(-1, 1, 1, 1) / 10

    model = replace(MODEL, net=net, num_classes=None, embed=embed)
    prompts = ["a cat", "a long dog", "two"]
    generate(tmp_path, 3, model=model, labels=prompts, shard=2, format="webdataset")
    assert sorted(seen) == [["a cat", "a long dog"], ["two", "a cat"]]
    assert load_record(tmp_path / "records" / "00001.json").labels == ("two",)


# --- the commands ---------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_the_command_makes_and_verifies(tmp_path: Path) -> None:
    common = ["generate", "--nfe", 2, "--shard", 4, "--out", tmp_path / "a"]
    (tmp_path / "labels.txt").write_text("7\n1\n0\n9\n9\n")
    result = run(*common, "--labels", tmp_path / "labels.txt")
    assert result.exit_code == 0, result.output
    assert "holds 5 of 5 samples in 2 shards" in result.output
    assert [label for record, _ in deis.read_samples(tmp_path / "a") for label in record.labels or ()] == [7, 1, 0, 9, 9]
    result = run("generate", "--verify", tmp_path / "a")
    assert (result.exit_code, result.output) == (0, f"{tmp_path / 'a'}: 2 of 2 shards are whole\n")
    os.truncate(tmp_path / "a" / "00000" / "00000000.png", 10)
    (tmp_path / "a" / "notes").write_text("")
    result = run("generate", "--verify", tmp_path / "a")
    assert result.exit_code == 1
    assert "1 of 2 shards are whole\ndamaged: 00000 is not what was written" in result.output
    assert "foreign: notes" in result.output
    for arguments, message in (
        (["--labels", tmp_path / "labels.txt", "--seed", 1], "seed is 0 there and 1 here"),
        (["--labels", tmp_path / "labels.txt", "--class", 1], "--class 1 and --labels"),
        (["--num", 4, "--class", 12], "labels[0]=12 is not a class of the model, 0 ... 9"),
        ([], "--num and --out say how many samples to make, and where"),
    ):
        result = run(*common, *arguments)
        assert result.exit_code == 1
        assert message in result.output


def test_samples_are_evaluated_as_plans_are(tmp_path: Path) -> None:
    script = torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(60, 4)), torch.zeros(2, *SHAPE))
    script.save(str(tmp_path / "net.pt"))
    np.savez(tmp_path / "real.npz", np.random.default_rng(0).uniform(-1, 1, (30, *SHAPE)))
    generate(tmp_path / "a", 20, format="webdataset")
    arguments = ["evaluate", "--samples", tmp_path / "a", "--out", tmp_path / "out.json", "--batch", 3]
    against = ["--real", tmp_path / "real.npz", "--features", tmp_path / "net.pt"]
    result = run(*arguments, *against)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out.json").read_text())

    def features(x: Any) -> Any:
        return script(torch.from_numpy(x.astype(np.float32))).detach().numpy()

    fake = images(tmp_path / "a").transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    expected = distances(features(fake), features(load_images(tmp_path / "real.npz")))
    (row,) = found["plans"]
    assert (row["method"], row["nfe"], row["samples"]) == ("tab1", 3, 20)
    assert row["frechet"] == pytest.approx(expected["frechet"], rel=1e-4)
    assert {"kid", "precision", "recall"} <= set(row)
    assert "leave out --nfe" in run(*arguments, *against, "--nfe", 3).output
    assert "leave out --plan" in run(*arguments, *against, "--plan", tmp_path / "out.json").output
    assert "give --real and --features, too" in run(*arguments).output
    (tmp_path / "a" / "00001.tar").unlink()
    assert "lacks 1 of 5 shards" in run(*arguments, *against).output
