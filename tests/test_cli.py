"""The command line: pictures, arrays, plans, and errors in one line."""

from pathlib import Path

import numpy as np
import pytest
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
    assert Image.open(out).size == (10 * 56, 2 * 56)
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
    common = ["sample", "--num", 6, "--method", "sde_dpmpp_2m", "--nfe", 3, "--backend", backend]
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
        "sample", "--num", 6, "--class", 7, "--guidance", 2, "--method", "rhork_2heun", "--steps", 2, "--grid", "rho",
        "--grid-order", 7, "--out", out, "--npz", npz,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "6 samples of 4 evaluations" in result.output
    with np.load(npz) as arrays:
        np.testing.assert_array_equal(arrays["labels"], 7)
    assert Image.open(out).size == (3 * 56, 2 * 56)


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
    before, after = (plan.provenance["stages"][k]["after"] for k in (0, -1))
    assert after < 0.5 * before
    result = run("sample", "--plan", file, "--num", 4, "--out", out, "--dtype", "float32", *common)
    assert result.exit_code == 0, result.output
    assert "4 samples of 3 evaluations" in result.output
    assert "contradict" in run("sample", "--plan", file, "--nfe", 3).output


def test_a_rough_teacher_is_refused_unless_allowed(tmp_path: Path) -> None:
    options = ["--nfe", 3, "--samples", 16, "--teacher-steps", 6, "--stages", "least_squares", "--out", tmp_path / "plan.json"]
    result = run("calibrate", *options)
    assert result.exit_code == 1
    assert "Error: the teacher has not converged: its end moves by" in result.output
    assert not (tmp_path / "plan.json").exists()
    assert run("calibrate", *options, "--allow-rough").exit_code == 0
    assert deis.load_plan(tmp_path / "plan.json").provenance["teacher_steps"] == 6


def test_a_plan_of_another_schedule_is_refused(tmp_path: Path) -> None:
    deis.make_plan(deis.EDM(), nfe=3).save(tmp_path / "plan.json")
    assert "was made for the schedule EDM()" in run("sample", "--plan", tmp_path / "plan.json").output


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["plan", "--method", "foo"], "rhork_<tableau>"),
        (["plan", "--steps", 0], "num_step=0"),
        (["plan", "--schedule", "flow", "--grid", "rho"], "alpha is 0"),
        (["sample", "--class", 11], "0 ... 9"),
        (["sample", "--num", 0], "at least 1"),
        (["sample", "--model", "nowhere"], "is no file or folder"),
        (["calibrate", "--model", "nowhere"], "is no file or folder"),
        (["calibrate", "--stages", "magic"], "unknown 'magic'"),
        (["calibrate", "--samples", 4, "--nfe", 3], "too few"),
    ],
)
def test_errors_are_one_line_without_a_traceback(arguments: list[object], match: str) -> None:
    result = run(*arguments)
    assert result.exit_code != 0
    assert match in result.output
    assert "Traceback" not in result.output
