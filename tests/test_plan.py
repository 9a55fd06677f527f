"""The plan: what it refuses, how it prints, and files that are read whole or not at all."""

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deis

from .fuzz import check_fuzzed
from .oracle import FEW_STEPS
from .test_coefficients import EVERY

SDE = deis.VPSDE.linear()
PLAN = deis.make_plan(SDE, "tab3", 6)
METHODS = ["ddim", "tab3", "tab7", "rhoab2", "ipndm", "rhork_3kutta", "rhork_4rk", "unipc3", "dpmpp_2m", "sa_solver", "deis_abm"]


def changed(name: str, place: object, value: float) -> deis.Plan:
    array = getattr(PLAN, name).copy()
    array[place] = value
    return dataclasses.replace(PLAN, **{name: array})


@FEW_STEPS
@pytest.mark.parametrize("sde", EVERY, ids=lambda s: s.name)
@pytest.mark.parametrize("method", METHODS)
def test_nfe_is_exact_and_no_time_repeats(sde: deis.Schedule, method: str) -> None:
    if isinstance(sde, deis.FlowMatching) and method.startswith("rhork"):
        pytest.skip("no meaning where alpha is 0; test_grids tests the refusal")
    for num_step in (1, 2, 5, 40):
        plan = deis.make_plan(sde, method, num_step)
        stages = len(deis.TABLEAUX[method[6:]].b) if method.startswith("rhork") else 1
        calls: list[np.ndarray] = []

        def model(x: np.ndarray, t: np.ndarray, calls: list[np.ndarray] = calls) -> np.ndarray:
            calls.append(t)
            return 0 * x

        deis.sample(plan, model, np.zeros((2, 3)), predicts="x0", rng=np.random.default_rng(0))
        assert len(calls) == plan.nfe == stages * num_step
        assert plan.num_step == num_step
        assert (plan.ts[0], plan.ts[-1]) == (sde.t_start, sde.t_end)
        assert (np.diff(plan.ts) < 0).all()


@pytest.mark.parametrize("name", ["alpha", "sigma", "keep_x", "next_x"])
@pytest.mark.parametrize("i", [0, 3])
def test_every_changed_scalar_is_noticed(name: str, i: int) -> None:
    if (name, i) == ("alpha", 0):
        i = 1
    with pytest.raises(ValueError, match=r"inconsistent"):
        changed(name, i, getattr(PLAN, name)[i] * (1 + 1e-6))


@pytest.mark.parametrize("place", [(i, j) for i in range(6) for j in range(min(i, 3) + 1)])
def test_every_changed_coefficient_is_noticed(place: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"row {place[0]} is inconsistent"):
        changed("keep_p", place, PLAN.keep_p[place] * (1 + 1e-6))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"t": PLAN.t[::-1]}, "t must decrease as sigma/alpha does"),
        ({"t": np.append(PLAN.t[[1, 0]], PLAN.t[2:])}, "decrease from step to step"),
        ({"t": PLAN.t[:-1]}, r"t must have shape \(7,\)"),
        ({"keep_p": PLAN.keep_p[0]}, "2 dimension"),
        ({"keep_x": np.full(6, np.nan)}, r"keep_x\[0\]=.*finite"),
        ({"form": "score"}, "'eps', 'data'"),
        ({"discrete": True}, "whole numbers"),
        ({"discrete": 1}, "True or False"),
        ({"method": 3}, "string"),
        ({"alpha": -PLAN.alpha}, "at least 0"),
        ({"accepts": np.arange(6) < 5}, "accepts is False in the last row"),
        ({"accepts": np.ones(6)}, "accepts must be bool"),
        ({"calls": np.zeros(6, dtype=bool)}, "calls is False in every row"),
        ({"calls": np.ones(5, dtype=bool)}, r"calls must be bool of shape \(6,\)"),
        ({"guess": np.ones(6)}, "guess=.* must be 0 in every row that calls"),
        ({"guess": np.ones(5)}, r"guess must have shape \(6,\)"),
        ({"keep_z": np.full(6, 0.1)}, "inconsistent"),
        ({"fitted": 1}, "fitted=1 must be a string"),
        ({"alpha": np.append(0, PLAN.alpha[1:])}, "form='eps' has no meaning"),
    ],
)
def test_bad_tables_are_refused(change: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(PLAN, **change)  # type: ignore[arg-type]


def test_predictions_from_before_the_first_and_wasted_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1 uses a prediction from before the first"):
        changed("keep_p", (1, 3), 0.1)
    idle = deis.make_plan(SDE, "ddim", 2)
    with pytest.raises(ValueError, match="row 1 wastes an evaluation"):
        dataclasses.replace(idle, keep_p=np.array([[idle.keep_p[0, 0]], [0.0]]))


def test_a_stage_looks_ahead_no_further_than_the_end_of_the_next_step() -> None:
    plan = deis.make_plan(SDE, "rhork_2heun", 3, "t", 1)

    def moved(row: int, t: float) -> deis.Plan:
        return dataclasses.replace(plan, t=np.where(np.arange(7) == row, t, plan.t))

    assert moved(1, plan.ts[2]).t[1] == plan.ts[2]
    for row, t in ((1, plan.ts[2] - 1e-3), (3, plan.ts[3] - 1e-3), (5, plan.ts[3] - 1e-3), (3, plan.ts[1] + 1e-3)):
        with pytest.raises(ValueError, match="t of every stage must lie within its step or the next"):
            moved(row, t)


def test_wild_extrapolation_is_legal() -> None:
    """Weights of five million, which cancel to five: no inconsistency, though no good sampler either."""
    with pytest.warns(UserWarning, match="'tab5' with the rho grid of power 2 in 5 steps is off by"):
        plan = deis.make_plan(deis.VPSDE.cosine(), "tab5", 5, ts_phase="rho", ts_order=2)
    assert np.abs(plan.keep_p).max() > 1e6


def test_plans_are_frozen_and_compare_by_content() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAN.method = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        PLAN.keep_p[0, 0] = 1
    twin = deis.make_plan(SDE, "tab3", 6)
    assert twin == PLAN
    assert hash(twin) == hash(PLAN)
    assert deis.make_plan(SDE, "tab2", 6) != PLAN
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN


@pytest.mark.parametrize(
    ("method", "num_step", "size"),
    [
        ("ddim", 1, "1 evaluation in 1 step,"),
        ("ddim", 2, "2 evaluations in 2 steps,"),
        ("dpmpp_2s", 1, "2 evaluations in 1 step,"),
        ("parallel2", 2, "3 evaluations in 2 calls in 2 steps,"),
    ],
)
def test_the_title_counts_in_singular_and_plural(method: str, num_step: int, size: str) -> None:
    assert f": {size}" in repr(deis.make_plan(SDE, method, num_step)).splitlines()[0]


def test_repr_is_a_table() -> None:
    text = repr(PLAN)
    assert "tab3: 6 evaluations in 6 steps" in text
    assert "VPSDE.linear(0.1, 20.0)" in text
    for t in PLAN.t:
        assert f"{t:.6g} |" in text
    long = deis.make_plan(SDE, "tab3", 500)
    times = [line.partition(" |")[0].strip() for line in repr(long).splitlines()[3:]]
    assert times == [f"{t:.6g}" for t in long.t[:6]] + ["..."] + [f"{t:.6g}" for t in long.t[-7:]]
    assert "next_p" in repr(deis.make_plan(SDE, "rhork_4rk", 5))


@FEW_STEPS
@given(
    sde=st.sampled_from(EVERY),
    method=st.sampled_from(["ddim", "ipndm", "ancestral", "unipc2"]),
    n=st.integers(1, 30),
    power=st.floats(1, 5),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_files_round_trip_bit_for_bit(tmp_path: Path, sde: deis.Schedule, method: str, n: int, power: float) -> None:
    plan = deis.make_plan(sde, method, n, ts_order=power)
    plan.save(tmp_path / "plan.json")
    loaded = deis.load_plan(tmp_path / "plan.json")
    assert loaded == plan
    for name in ("t", "alpha", "sigma", "keep_x", "keep_p", "keep_z", "next_x", "next_p", "guess", "accepts", "calls"):
        assert getattr(loaded, name).tobytes() == getattr(plan, name).tobytes()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@given(st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_fuzzed_files_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    check_fuzzed(data, PLAN, deis.load_plan, tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda d: d.update(version=4), "version is 4 .*upgrade"),
        (lambda d: d.update(version="1"), "version is '1'"),
        (lambda d: d.update(format="other"), "format"),
        (lambda d: d.pop("sha256"), "must hold"),
        (lambda d: d["plan"].pop("form"), r"lacks \['form'\]"),
        (lambda d: d["plan"].update(extra=1), r"unknown fields \['extra'\]"),
        (lambda d: d["plan"]["t"].__setitem__(0, "1"), "t is not a table of numbers"),
        (lambda d: d["plan"]["keep_p"][2].pop(), "keep_p is not a table"),
        (lambda d: d["plan"]["keep_p"][2].__setitem__(0, 0.5), "row 2 is inconsistent"),
        (lambda d: d["plan"]["t"].__setitem__(1, d["plan"]["t"][1] + 1e-9), "changed after it was saved"),
        (lambda d: d["plan"].update(method="mine"), "changed after it was saved"),
        (lambda d: d["plan"]["calls"].__setitem__(0, 1), "calls is not a list of true and false"),
        (lambda d: d["plan"]["t"].__setitem__(0, float("nan")), "NaN"),
    ],
)
def test_edited_files_are_refused_with_the_reason(tmp_path: Path, edit: object, match: str) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    document = json.loads(path.read_text())
    edit(document)  # type: ignore[operator]
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=match):
        deis.load_plan(path)


def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    path.write_text(path.read_text().replace('"version": 3,', '"version": 3, "version": 3,'))
    with pytest.raises(ValueError, match="stands twice"):
        deis.load_plan(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)

    def fail(self: Path, text: str, **options: object) -> int:
        self.write_bytes(text.encode()[:100])
        raise OSError("disk full")

    other = deis.make_plan(SDE, "tab1", 3)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="disk full"):
            other.save(path)
    assert deis.load_plan(path) == PLAN
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
