"""The command line: pictures, arrays, plans, and errors in one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import deis
from deis.cli import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_sample_writes_a_picture_and_arrays(tmp_path: Path, backend: str) -> None:
    out, npz = tmp_path / "a.png", tmp_path / "a.npz"
    result = run("sample", "--num", 20, "--steps", 4, "--out", out, "--npz", npz, "--backend", backend)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"wrote {out}: 20 samples of 4 evaluations each"
    with Image.open(out) as image:
        assert image.size == (10 * 56, 2 * 56)
    with np.load(npz) as arrays:
        assert arrays["samples"].shape == (20, 1, 28, 28)
        np.testing.assert_array_equal(arrays["labels"], np.arange(20) % 10)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.npz", "a.png"]


def test_a_sample_depends_on_the_seed_and_its_number_alone(tmp_path: Path) -> None:
    for name, options in {"a": [], "b": ["--batch", 3], "c": ["--seed", 1], "d": ["--num", 5]}.items():
        files = ["--out", tmp_path / f"{name}.png", "--npz", tmp_path / f"{name}.npz"]
        result = run("sample", "--num", 12, "--steps", 4, *files, *options)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()
    with np.load(tmp_path / "a.npz") as a, np.load(tmp_path / "d.npz") as d:
        np.testing.assert_allclose(a["samples"][:5], d["samples"], atol=1e-9)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_stochastic_sample_depends_on_the_seed_and_its_number_alone(tmp_path: Path, backend: str) -> None:
    common = ["sample", "--num", 6, "--method", "ancestral", "--nfe", 3, "--backend", backend]
    for name, options in {"a": [], "b": ["--batch", 4], "c": ["--seed", 1]}.items():
        files = ["--out", tmp_path / f"{name}.png", "--npz", tmp_path / f"{name}.npz"]
        result = run(*common, *files, *options)
        assert result.exit_code == 0, result.output
    a, b, c = (np.load(tmp_path / f"{name}.npz")["samples"] for name in "abc")
    np.testing.assert_allclose(a, b, atol=1e-9)
    assert np.abs(a - c).max() > 0.1


def test_a_budget_of_evaluations() -> None:
    result = run("plan", "--method", "dpmpp_3s", "--nfe", 7, "--schedule", "edm")
    assert "7 evaluations in 3 steps" in result.output
    assert "num_step asks for 3 steps, nfe asks for 7 steps" in run("plan", "--steps", 3, "--nfe", 7).output


def test_options(tmp_path: Path) -> None:
    out, npz = tmp_path / "a.png", tmp_path / "a.npz"
    result = run(
        "sample", "--num", 6, "--class", 7, "--guidance", 2, "--method", "rhork_2heun", "--steps", 6, "--grid", "rho",
        "--grid-order", 7, "--out", out, "--npz", npz,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "6 samples of 12 evaluations" in result.output
    with np.load(npz) as arrays:
        np.testing.assert_array_equal(arrays["labels"], 7)
    with Image.open(out) as image:
        assert image.size == (3 * 56, 2 * 56)


def test_plan_prints_and_saves(tmp_path: Path) -> None:
    result = run("plan", "--method", "tab2", "--steps", 5, "--out", tmp_path / "plan.json")
    assert result.exit_code == 0, result.output
    plan = deis.make_plan(deis.VPSDE.linear(), "tab2", 5)
    assert repr(plan) in result.output
    assert deis.load_plan(tmp_path / "plan.json") == plan


def test_calibrate_writes_a_plan_that_sample_takes(tmp_path: Path) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "a.png"
    common = ["--guidance", 1.5]
    result = run(
        "calibrate", "--nfe", 3, "--samples", 16, "--teacher-steps", 32, "--iterations", 1, "--stages",
        "least_squares,gauss_newton",
        "--batch", 16, "--out", file, "--work", tmp_path / "work", *common,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "gauss_newton" in result.output
    plan = deis.load_plan(file)
    before, after = (plan.provenance["stages"][k][when] for k, when in ((0, "loss_before"), (-1, "loss_after")))
    assert after < before - 0.2  # what fits are judged by, the mean of log(e^2 + c^2): errors fall by a tenth at least
    result = run("sample", "--plan", file, "--num", 4, "--out", out, "--dtype", "float32", *common)
    assert result.exit_code == 0, result.output
    assert "4 samples of 3 evaluations" in result.output
    assert "conflict" in run("sample", "--plan", file, "--nfe", 3).output


def test_calibrate_writes_the_plans_of_several_budgets_and_goes_on(tmp_path: Path) -> None:
    few = ["--samples", 16, "--teacher-steps", 32, "--allow-rough", "--stages", "least_squares", "--batch", 16]
    options = [*few, "--out", tmp_path / "plans", "--work", tmp_path / "work"]
    result = run("calibrate", "--nfe", "2-3", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"wrote {tmp_path / 'plans'}: plans of 2, 3"
    plans = {nfe: deis.load_plan(tmp_path / "plans" / f"nfe-{nfe}.json") for nfe in (2, 3)}
    assert [plan.nfe for plan in plans.values()] == [2, 3]
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "work").iterdir()}
    result = run("calibrate", "--nfe", "3,4", *options)
    assert result.exit_code == 0, result.output
    assert kept.items() <= {file.name: file.stat().st_mtime_ns for file in (tmp_path / "work").iterdir()}.items()
    assert sorted(file.name for file in (tmp_path / "plans").iterdir()) == ["nfe-2.json", "nfe-3.json", "nfe-4.json"]
    assert np.array_equal(deis.load_plan(tmp_path / "plans" / "nfe-3.json").keep_p, plans[3].keep_p)
    result = run("calibrate", "--nfe", "3,4", *options, "--seconds", 0.001)
    assert result.exit_code == 1
    assert "seconds=0.001 are too short for the teacher" in result.output
    result = run("calibrate", "--nfe", "3,4", *options, "--out", tmp_path / "{nfe}.json")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "4.json").exists()
    assert "is a folder" in run("calibrate", "--nfe", 3, *few, "--out", tmp_path / "plans").output


def test_a_rough_teacher_is_refused_unless_allowed(tmp_path: Path) -> None:
    options = ["--nfe", 3, "--samples", 16, "--teacher-steps", 6, "--stages", "least_squares", "--out", tmp_path / "plan.json"]
    result = run("calibrate", *options)
    assert result.exit_code == 1
    assert "Error: the teacher has not converged: its final states move by" in result.output
    assert not (tmp_path / "plan.json").exists()
    assert run("calibrate", *options, "--allow-rough").exit_code == 0
    assert deis.load_plan(tmp_path / "plan.json").provenance["teacher_steps"] == 6


def test_a_plan_of_another_schedule_is_refused(tmp_path: Path) -> None:
    deis.make_plan(deis.EDM(), nfe=3).save(tmp_path / "plan.json")
    assert "was made for the schedule EDM()" in run("sample", "--plan", tmp_path / "plan.json").output


FEW = ["--nfe", 2, "--num", 2, "--paired", 0]


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (["plan", "--method", "foo"], 1, "rhork_<tableau>"),
        (["plan", "--method", ""], 1, "method='' is unknown"),
        (["plan", "--steps", 0], 2, "'--steps': 0 is not in the range"),
        (["plan", "--nfe", -1], 2, "'--nfe': -1 is not in the range"),
        (["plan", "--nfe", 3, "--steps", 4], 1, "contradict each other"),
        (["plan", "--grid-order", "nan"], 1, "ts_order=nan must be"),
        (["plan", "--steps", 10**12], 1, "at most 1000000"),
        (["plan", "--schedule", "flow", "--grid", "rho"], 1, "alpha is 0"),
        (["plan", "--out", "nowhere/plan.json"], 2, "'nowhere' is not a folder; create it first"),
        (["plan", "--out", "text/plan.json"], 2, "'text' is not a folder"),
        (["sample", "--plan", "nowhere.json"], 2, "does not exist"),
        (["sample", "--plan", "text"], 1, "'text' is not a usable plan file"),
        (["sample", "--plan", "deep.json"], 1, "'deep.json' is not a usable plan file"),
        (["sample", "--class", 11], 1, "--class 11 is not a class of the model, 0 ... 9"),
        (["sample", "--class", -1], 1, "--class -1"),
        (["sample", "--num", 0], 2, "'--num': 0 is not in the range"),
        (["sample", "--batch", 0], 2, "'--batch': 0 is not in the range"),
        (["sample", "--seed", -1], 2, "'--seed': -1 is not in the range"),
        (["sample", "--model", "nowhere"], 1, "is no file or folder"),
        (["sample", "--model", "text"], 1, "'text' is not a file of tensors"),
        (["sample", "--model", "folder"], 1, "lacks config.json"),
        (["sample", "--option", "x"], 1, "must be NAME=VALUE"),
        (["sample", "--device", "nowhere"], 1, "nowhere"),
        (["sample", "--backend", "jax", "--device", "cuda"], 1, "--device cuda is for torch"),
        (["sample", "--out", "nowhere/a.png"], 2, "'nowhere' is not a folder"),
        (["sample", "--npz", "nowhere/a.npz"], 2, "'nowhere' is not a folder"),
        (["calibrate", "--model", "nowhere"], 1, "is no file or folder"),
        (["calibrate", "--stages", "magic"], 1, "stages='magic' is unknown"),
        (["calibrate", "--samples", 4, "--nfe", 3, "--teacher-steps", 2, "--allow-rough"], 1, "too few"),
        (["calibrate", "--nfe", "10-3"], 2, "'10-3' must be numbers of evaluations from 1 on, such as 4, or 3-10, or 3,5,8"),
        (["calibrate", "--nfe", "3-"], 2, "'3-' must be"),
        (["calibrate", "--nfe", "0"], 2, "'0' must be"),
        (["calibrate", "--nfe", "3,4", "--steps", 5], 1, "which contradict each other"),
        (["calibrate", "--nfe", "3-80", "--samples", 8], 1, "too few"),
        (["calibrate", "--seconds", 0], 2, "'--seconds': 0.0 is not in the range"),
        (["calibrate", "--samples", 0], 2, "'--samples': 0 is not in the range"),
        (["calibrate", "--teacher-steps", 1], 2, "'--teacher-steps': 1 is not in the range"),
        (["calibrate", "--out", "nowhere/plan.json"], 2, "'nowhere' is not a folder"),
        (["evaluate", *FEW, "--num", 0], 2, "'--num': 0 is not in the range"),
        (["evaluate", *FEW, "--method", "magic"], 1, "method='magic' is unknown"),
        (["evaluate", *FEW, "--plan", "text"], 1, "'text' is not a usable plan file"),
        (["evaluate", *FEW, "--real", "folder"], 1, "belong together"),
        (["evaluate", *FEW, "--real", "folder", "--features", "text"], 1, "'text' cannot be read as a TorchScript file"),
        (["evaluate", *FEW, "--lpips", "text", "--paired", 1], 1, "'text' cannot be read as a TorchScript file"),
        (["evaluate", *FEW, "--paired", -1], 2, "'--paired': -1 is not in the range"),
        (["evaluate", *FEW, "--reference-steps", 1], 2, "'--reference-steps': 1 is not in the range"),
        (["evaluate", *FEW, "--out", "nowhere/a.json"], 2, "'nowhere' is not a folder"),
    ],
)
def test_errors_are_one_line_without_a_traceback(
    arguments: list[object], code: int, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text").write_text("text")
    Path("deep.json").write_text("[" * 100_000)
    Path("folder").mkdir()
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code
    assert result.output.splitlines()[-1].startswith("Error: ")
    assert match in result.output.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_named() -> None:
    result = run("sample", "--device", "cuda", "--num", 1, "--steps", 2)
    assert isinstance(result.exception, SystemExit), result.exception
    assert "CUDA" in result.output or "NVIDIA" in result.output
