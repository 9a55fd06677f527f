"""What `deis.generate` and `deis generate --verify` refuse or report, and the commands."""

import json
import os
import shutil
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
from deis.features import distances, load_images
from deis.generation.formats import FORMATS
from deis.generation.job import Job, fingerprint
from deis.generation.manifest import begin
from deis.generation.record import load_record

from .shards import MODEL, PLAN, SHAPE, contents, generate, images, tiny

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
