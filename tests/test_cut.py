"""Cut plans: what a plan is from its middle on."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deis
from deis.calibration.table import Table
from deis.cut import cut_plan, from_call
from deis.methods.registry import REGISTRY
from deis.plan import Plan

from .oracle import FEW_STEPS, gaussian, two_modes
from .test_coefficients import EVERY

SDE = deis.VPSDE.linear()
NAMES = [
    name
    for entry in REGISTRY
    for name in ([entry.name.replace("<q>", q) for q in "123"] if "<q>" in entry.name else [entry.name.replace("<tableau>", "4rk")])
]
COLUMNS = ("keep_x", "keep_p", "keep_z", "next_x", "next_p")
X_T = np.random.default_rng(0).standard_normal((6, 3))


def assert_alike(plan: Plan, other: Plan, tolerance: float = 1e-9) -> None:
    """As recurrences: the rows of two plans may part them differently."""
    np.testing.assert_allclose(plan.t, other.t, rtol=1e-12)
    mine, its = Table.of(plan), Table.of(other)
    for name in ("a", "c"):
        np.testing.assert_allclose(getattr(mine, name), getattr(its, name), rtol=tolerance, atol=tolerance)


@FEW_STEPS
@given(
    form=st.sampled_from(["eps", "data"]),
    order=st.integers(0, 4),
    corrector=st.none() | st.integers(0, 4),
    call=st.integers(0, 7),
)
def test_a_plan_in_its_clock_cut_at_a_row_is_the_method_on_the_times_left(
    form: Any, order: int, corrector: int | None, call: int
) -> None:
    method = deis.adams(form, "vp_t", order, corrector)
    plan = deis.make_plan(SDE, method, 8)
    assert_alike(from_call(plan, SDE, call), deis.make_plan(SDE, method, ts=plan.t[call:]))


@FEW_STEPS
@given(form=st.sampled_from(["eps", "data"]), order=st.integers(0, 3), where=st.floats(0.05, 0.95))
def test_a_plan_in_its_clock_cut_between_rows_is_the_method_from_there(form: Any, order: int, where: float) -> None:
    method = deis.adams(form, "vp_t", order)
    plan = deis.make_plan(SDE, method, 8)
    start = float(plan.t[0] * where + plan.t[-1] * (1 - where))
    if np.abs(plan.t / start - 1).min() < 1e-3:
        return
    replaced = int(np.argmin(np.abs(plan.t[:-1] - start)))  # the clock of the rule is this schedule's own time
    if plan.t[replaced + 1] >= start:
        replaced += 1
    assert_alike(cut_plan(plan, SDE, start), deis.make_plan(SDE, method, ts=np.append(start, plan.t[replaced + 1 :])))


@FEW_STEPS
@pytest.mark.parametrize("name", NAMES)
def test_every_method_can_begin_with_every_evaluation(name: str) -> None:
    plan = deis.make_plan(SDE, name, 4)
    rows = np.flatnonzero(plan.calls)
    ends = plan.ts[1 + np.cumsum(plan.accepts) - plan.accepts]  # of the steps that the rows belong to
    for call, row in enumerate(rows.tolist()):
        ahead = plan.t[row] < ends[row] or (plan.t[row] == ends[row] and not plan.accepts[row])  # heunpp2
        if plan.t[row] == plan.t[-1] or ahead or (plan.t[row + 1 :] > plan.t[row]).any():
            with pytest.raises(ValueError, match="or the plan ends there"):
                from_call(plan, SDE, call)
            continue
        part = from_call(plan, SDE, call)  # which checks that alpha x_0 + sigma eps is carried exactly
        assert part.nfe == plan.nfe - call
        np.testing.assert_array_equal(part.t, plan.t[row:])
        intact = part.window + int(plan.t[row] == plan.t[row + 1])  # beyond, no row knows where the plan began
        for column in COLUMNS:
            np.testing.assert_array_equal(getattr(part, column)[intact:], getattr(plan, column)[row + intact :])


@pytest.mark.parametrize("name", ["tab3", "auto", "unipc3", "dpmpp_2m", "dpm_solver_3", "dpmpp_3s", "rhork_4rk", "edm_heun"])
def test_errors_fall_with_the_steps_from_wherever_the_cut_is(name: str) -> None:
    """A step of first order in front leaves order 2: the worst errors over starts, at 20 and 80 steps."""
    eps, solution = two_modes(SDE)
    x = np.linspace(-2, 2, 8)[:, None]
    errors = np.zeros(2)
    for start in np.linspace(0.4, 0.6, 9).tolist():
        exact = solution(np.array([start, SDE.t_end]), x[:, 0])[-1][:, None]
        parts = [cut_plan(deis.make_plan(SDE, name, n), SDE, start) for n in (20, 80)]
        errors = np.maximum(errors, [np.abs(deis.sample(part, eps, x) - exact).max() for part in parts])
    assert np.log2(errors[0] / errors[1]) / 2 > 1.6, errors


def test_an_evaluation_at_the_time_of_the_next_shares_its_weights() -> None:
    """The second stage of Heun's method lies at the end of its step: begun there, both evaluations are of one state."""
    plan = deis.make_plan(SDE, "rhork_2heun", 5)
    eps, _ = gaussian(SDE)
    twice, once = from_call(plan, SDE, 3), from_call(plan, SDE, 4)
    assert (twice.nfe, once.nfe, twice.t[0]) == (7, 6, once.t[0])
    np.testing.assert_allclose(deis.sample(twice, eps, X_T), deis.sample(once, eps, X_T), rtol=1e-12)


@FEW_STEPS
@given(st.sampled_from(["auto", "tab3", "dpmpp_3s", "sde_dpmpp_2m", "ddim"]), st.integers(1, 4))
def test_two_parts_carry_what_the_whole_does(name: str, place: int) -> None:
    """Both halves are exact where the prediction is constant, and the first one is the plan's own rows."""
    plan = deis.make_plan(SDE, name, 5)
    middle = float(plan.ts[place])
    first, second = cut_plan(plan, SDE, end=middle), cut_plan(plan, SDE, middle)
    assert (first.nfe + second.nfe, float(first.t[-1]), float(second.t[0])) == (plan.nfe, middle, middle)
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(first, column), getattr(plan, column)[: len(first.rows)])


def test_a_fitted_plan_keeps_its_rows_and_says_what_it_was_fitted_to() -> None:
    plan = deis.make_plan(SDE, "auto", 6)
    fitted = replace(plan, keep_p=plan.keep_p * 1.01, fitted="a test")
    part = cut_plan(fitted, SDE, float(plan.t[2]))
    assert (part.fitted, part.nfe) == ("a test", 4)
    for column in COLUMNS:
        np.testing.assert_array_equal(getattr(part, column)[2:], getattr(fitted, column)[4:])


def test_a_calibrated_plan_gives_way_to_auto_and_says_so() -> None:
    plan = replace(deis.make_plan(SDE, "tab3", 6), fitted="a test", provenance={"stages": []})
    with pytest.warns(UserWarning, match=r"was calibrated as a whole, from t=1\.0; from t=0\.\d+ on 'auto' takes its place"):
        part = cut_plan(plan, SDE, 0.3)
    assert part == deis.make_plan(SDE.between(0.3), nfe=part.nfe)
    with pytest.warns(UserWarning, match="takes its place"):
        assert from_call(plan, SDE, 2) == deis.make_plan(SDE, ts=plan.t[2:])
    assert cut_plan(plan, SDE, end=float(plan.t[3])).provenance == plan.provenance  # its first rows stay


@pytest.mark.parametrize("sde", EVERY, ids=lambda sde: sde.name)
def test_a_part_of_a_schedule_is_the_schedule_there(sde: deis.Schedule) -> None:
    ts = deis.make_grid(sde, 9)
    part = sde.between(float(ts[3]), float(ts[7]))
    assert (part.t_start, part.t_end) == (ts[3], ts[7])
    np.testing.assert_array_equal(part.rho(ts), sde.rho(ts))
    assert deis.make_plan(part, "auto", 3).matches(sde)
    assert (sde.t_start, sde.t_end) == (ts[0], ts[-1])
    with pytest.raises(ValueError, match="must be greater"):
        sde.between(float(ts[7]), float(ts[3]))


def test_a_part_of_a_discrete_schedule_keeps_ends_between_its_times() -> None:
    sde = deis.VPSDE.discrete(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    ts = deis.make_grid(sde.between(500.5, 20), 5)
    assert (ts[0], ts[-1]) == (500.5, 20)
    np.testing.assert_array_equal(ts[1:], np.rint(ts[1:]))
    with pytest.raises(ValueError, match=r"start=1000 must lie in \[0, 999\]"):
        sde.between(1000)


@FEW_STEPS
def test_stochastic_plans_keep_the_variance() -> None:
    """Begun between two rows: the plan's own check is that of the law of the end."""
    methods = (deis.get_method("ancestral"), deis.get_method("sde_dpmpp_2m"), deis.get_method("sa_solver", tau=0.6))
    for method in (*methods, deis.get_method("edm_heun", churn=3.0)):
        plan = deis.make_plan(SDE, method, 7)
        part = cut_plan(plan, SDE, 0.31)
        assert part.stochastic
        assert float(part.t[0]) == 0.31


def test_the_whole_plan_is_returned_as_it_is() -> None:
    plan = deis.make_plan(SDE, "auto", 5)
    assert cut_plan(plan, SDE) is plan
    assert cut_plan(plan, SDE, SDE.t_start, SDE.t_end) is plan
    assert from_call(plan, SDE, 0) is plan


def test_a_start_at_the_end_of_a_step_wastes_no_stage_of_it() -> None:
    for name, stages in (("rhork_2heun", 2), ("rhork_4rk", 4), ("dpmpp_3s", 3)):
        plan = deis.make_plan(SDE, name, 5)
        assert [cut_plan(plan, SDE, t).nfe for t in plan.ts[:-1]] == [n * stages for n in (5, 4, 3, 2, 1)]


def test_every_time_in_the_plan_can_be_a_start() -> None:
    for name in ("auto", "dpm_solver_3", "edm_heun", "rhork_3ssprk"):
        plan = deis.make_plan(SDE, name, 5)
        counts = [cut_plan(plan, SDE, t).nfe for t in np.linspace(SDE.t_start, SDE.t_end, 50)[:-1]]
        assert counts[0] == plan.nfe
        assert all(before >= after for before, after in pairwise(counts))
        assert counts[-1] >= 1


def test_flow_matching_begins_behind_alpha_0() -> None:
    flow = deis.FlowMatching()
    for name in ("auto", "tab3", "dpmpp_2m"):
        plan = deis.make_plan(flow, name, 6)
        for call in range(1, 6):
            assert from_call(plan, SDE, call).nfe == 6 - call
        assert cut_plan(plan, flow, 0.5 * float(plan.t[0] + plan.t[1])).alpha[0] > 0


def test_what_cannot_be_cut_is_refused() -> None:
    plan = deis.make_plan(SDE, "auto", 5)
    with pytest.raises(ValueError, match=r"start=1\.5 lies outside the plan 'auto'"):
        cut_plan(plan, SDE, 1.5)
    with pytest.raises(ValueError, match=r"start=0\.0005 lies outside"):
        cut_plan(plan, SDE, 0.0005)
    with pytest.raises(ValueError, match=r"end=0\.5 ends no step"):
        cut_plan(plan, SDE, end=0.5)
    with pytest.raises(ValueError, match="no step left"):
        cut_plan(plan, SDE, float(plan.t[3]), float(plan.t[2]))
    with pytest.raises(ValueError, match="was made for the schedule"):
        cut_plan(plan, deis.VPSDE.cosine(), 0.5)
    with pytest.raises(ValueError, match=r"call=5 must lie in 0 \.\.\. 4"):
        from_call(plan, SDE, 5)
    with pytest.raises(ValueError, match="begin with one of its full steps"):
        from_call(deis.make_plan(SDE, "rhork_3ssprk", 3), SDE, 1)
