"""`deis.recommend`: the least error within a budget, what it costs, and what half of it gives up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import deis
from deis.cli import main
from deis.cli.compare import use
from deis.comparison.advice import duration
from deis.comparison.result import Row, code_of

from .oracle import two_modes

SDE = deis.VPSDE.linear()
EPS, _ = two_modes(SDE)


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.from_numpy(EPS(x.numpy(), t.numpy()))


MODEL = deis.Denoiser(model, SDE)
X_T = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 3)))
FEW: dict[str, Any] = {"methods": ("auto", "tab3", "ddim"), "reference_steps": 64}


def test_the_recommended_plan_has_the_least_error_of_the_comparison(tmp_path: Path) -> None:
    found = deis.recommend(MODEL, X_T, nfe=8, work=tmp_path, **FEW)
    whole = deis.compare(MODEL, X_T, nfes=(4, 8), work=tmp_path, **FEW)
    best, half = whole.best(8), whole.best(4)
    assert best is not None
    assert half is not None
    assert (found.row.method, found.row.error) == (best.method, best.error)
    assert found.half is not None
    assert (found.half.method, found.half.error) == (half.method, half.error)
    assert found.plan == deis.make_plan(SDE, best.method, nfe=8)
    space: dict[str, Any] = {"deis": deis, "model": MODEL}
    exec(found.code, space)
    assert space["plan"] == found.plan
    which, cost, gives = found.lines
    assert f"Use {best.method} with 8 calls" in which
    assert f"error {best.error:.3g}" in which
    assert duration(best.seconds) in cost
    assert f"{half.error:.3g}, by {half.method}" in gives


def test_an_error_is_reached_with_the_fewest_evaluations() -> None:
    found = deis.recommend(MODEL, X_T, error=0.02, **FEW)
    before = deis.compare(MODEL, X_T, nfes=(found.row.nfe - 1,), **FEW).best()
    assert before is not None
    assert found.row.error is not None
    assert before.error is not None
    assert found.row.error <= 0.02 < before.error
    with pytest.raises(ValueError, match=r"error=0.001 is not reached in 50 evaluations: the least is .*, by ddim"):
        deis.recommend(MODEL, X_T, error=0.001, **FEW | {"methods": ["ddim"]})


def test_the_seconds_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, later = [0.0], [1.0]

    def timed(x: Tensor, t: Tensor) -> Tensor:
        clock[0] += 1.0 if t[0].item() == SDE.t_start else later[0]
        return model(x, t)

    monkeypatch.setattr("deis.comparison.bench.time.perf_counter", lambda: clock[0])  # a call takes a second
    slow = deis.Denoiser(timed, SDE)
    found = deis.recommend(slow, X_T, seconds=6.5 / 16, **FEW)
    assert (found.row.nfe, found.row.seconds) == (6, 6 / 16)
    assert found.half is not None
    assert found.half.nfe == 3
    later[0] = 1.2  # slower than the call that is timed first
    found = deis.recommend(slow, X_T, seconds=6.5 / 16, **FEW)
    assert found.row.nfe == 5
    assert found.row.seconds == pytest.approx(5.8 / 16)
    with pytest.raises(ValueError, match=r"an image is less than one call of the network takes, 0.062 in batches of 64"):
        deis.recommend(slow, X_T, seconds=0.9 / 16, **FEW)


def test_fitted_plans_take_part() -> None:
    found = deis.recommend(MODEL, X_T, nfe=3, calibrate=True, **FEW | {"reference_steps": None})
    assert found.fitted_here
    assert found.plan.nfe == 3
    assert found.plan.provenance["samples"] > 0
    assert found.code == 'plan = deis.load_plan("plan.json")'
    errors = {row.method: row.error for row in found.rows if row.nfe == 3}
    assert errors["fitted"] == min(error for error in errors.values() if error is not None) == found.row.error


def test_one_budget_and_a_method_that_meets_it() -> None:
    several: dict[str, Any] = {"nfe": 3, "error": 0.1}
    for budgets in ({}, several):
        with pytest.raises(ValueError, match="give exactly one of nfe, seconds and error"):
            deis.recommend(MODEL, X_T, **budgets, **FEW)
    with pytest.raises(ValueError, match=r"no method has samples of nfe=3: calibrated: the model has no calibrated plan of 3"):
        deis.recommend(MODEL, X_T, nfe=3, **FEW | {"methods": ["calibrated"]})
    found = deis.recommend(MODEL, X_T, nfe=1, **FEW)
    assert found.lines[2] == "There is no half of a single call."


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (Row("calibrated", "", 5), "plan = model.plan(5)"),
        (Row("tab3", "rho:7", 5), 'plan = deis.make_plan(model.sde, "tab3", nfe=5, ts_phase="rho", ts_order=7)'),
        (Row("ddim", "log", 5), 'plan = deis.make_plan(model.sde, "ddim", nfe=5, ts_phase="log")'),
    ],
)
def test_the_line_of_python(row: Row, code: str) -> None:
    assert code_of(row) == code
    plan = eval(code.removeprefix("plan = "), {"deis": deis, "model": deis.load_model()})
    assert plan.nfe == 5


# --- the command --------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["recommend", *map(str, arguments)])


def test_the_command_says_three_lines_and_writes_the_plan(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    arguments = ("--nfe", 3, "--num", 2, "--method", "calibrated", "--method", "ddim", "--reference-steps", 8, "--allow-rough")
    result = run(*arguments, "--out", out)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["Use", "It", "Half", "wrote"]
    assert f'in Python: deis.sample(deis.load_plan("{out}"), model, x_T)' in result.stdout
    assert deis.load_plan(out) in (deis.load_model().plans[3], deis.make_plan(deis.load_model().sde, "ddim", nfe=3))
    assert "give one budget: --nfe, --seconds an image, or --error" in run("--num", 2).output


def test_a_pipeline_is_told_the_line_of_diffusers(tmp_path: Path) -> None:
    line = 'pipe.scheduler = PlanScheduler.from_plan(deis.load_plan("p.json"), pipe.scheduler.config)'
    assert line in use("owner/name", Path("p.json"))
    (tmp_path / "model_index.json").write_text("{}")
    assert line in use(str(tmp_path), Path("p.json"))
    (tmp_path / "model_index.json").unlink()
    assert "diffusers" not in use(str(tmp_path), Path("p.json"))
