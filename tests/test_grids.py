"""Time grids: strictly decreasing, from start to end, whatever is asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import deis

from .oracle import FEW_STEPS, Array, gaussian
from .test_coefficients import EVERY

SDE = deis.VPSDE.linear()


@given(st.sampled_from(EVERY), st.integers(1, 200), st.sampled_from(["t", "rho", "log", "vp_t"]), st.floats(0.5, 9))
def test_grids_decrease_strictly_between_the_exact_ends(sde: deis.Schedule, num_step: int, phase: str, power: float) -> None:
    if phase in ("rho", "log") and isinstance(sde, deis.FlowMatching):
        with pytest.raises(ValueError, match="alpha is 0"):
            deis.make_grid(sde, num_step, phase, power)
        return
    ts = deis.make_grid(sde, num_step, phase, power)
    assert len(ts) == num_step + 1
    assert (ts[0], ts[-1]) == (sde.t_start, sde.t_end)
    assert (np.diff(ts) < 0).all()
    if sde.num_times is not None:
        np.testing.assert_array_equal(ts, np.rint(ts))


@given(st.integers(2, 60), st.data())
def test_discrete_grids_exist_up_to_the_number_of_times(n: int, data: st.DataObject) -> None:
    sde = deis.VPSDE.discrete(np.linspace(0.99, 0.01, n))
    num_step = data.draw(st.integers(1, n - 1))
    ts = deis.make_grid(sde, num_step, "t", data.draw(st.floats(0.3, 8)))
    assert len(np.unique(ts)) == num_step + 1
    assert set(ts) <= set(range(n))
    with pytest.raises(ValueError, match=rf"num_step={n} asks for {n + 1} distinct times, and the schedule has {n}"):
        deis.make_grid(sde, n)


def test_definitions() -> None:
    n = 8
    np.testing.assert_allclose(np.diff(np.sqrt(deis.make_grid(SDE, n, "t", 2)), 2), 0, atol=1e-14)
    np.testing.assert_allclose(np.diff(SDE.rho(deis.make_grid(SDE, n, "rho", 7)) ** (1 / 7), 2), 0, atol=1e-13)
    np.testing.assert_allclose(np.diff(SDE.log_rho(deis.make_grid(SDE, n, "log")), 2), 0, atol=1e-12)


@pytest.mark.parametrize("sde", [deis.EDM(), deis.VESDE(), deis.SubVPSDE.linear(), deis.VPSDE.cosine()], ids=lambda s: s.name)
def test_the_vp_t_grid_has_the_noise_levels_of_the_linear_vp_grid(sde: deis.Schedule) -> None:
    """Between the same ends; and on that schedule it is the "t" grid, as its clock is the "t" clock."""
    ends = SDE.t_of_rho(sde.rho(np.array([sde.t_start, sde.t_end])))
    like = deis.VPSDE.linear(sampling_T=float(ends[0]), sampling_eps=float(ends[1]))
    np.testing.assert_allclose(sde.rho(deis.make_grid(sde, 9, "vp_t")), like.rho(deis.make_grid(like, 9, "t")), rtol=1e-9)
    np.testing.assert_allclose(deis.make_grid(SDE, 9, "vp_t"), deis.make_grid(SDE, 9, "t"), rtol=1e-12)
    first, second = (deis.make_plan(SDE, deis.adams("data", clock, 2, 3), 9) for clock in ("vp_t", "t"))
    np.testing.assert_allclose(first.keep_p, second.keep_p, rtol=1e-9, atol=1e-13)


@FEW_STEPS
@given(st.floats(0.2, 10), st.integers(1, 30), st.floats(0.5, 3))
def test_a_shift_moves_the_times_of_flow_matching_and_no_noise_level(shift: float, num_step: int, power: float) -> None:
    """Equation 23 of arXiv 2403.03206, written out."""
    sde = deis.FlowMatching(shift=shift)
    u = np.linspace(1, 0, num_step + 1) ** power
    np.testing.assert_allclose(deis.make_grid(sde, num_step, "t", power), shift * u / (1 + (shift - 1) * u), rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(sde.sigma(u), deis.FlowMatching().sigma(u))
    assert deis.make_plan(sde, "auto", num_step, "t").matches(deis.FlowMatching())


@pytest.mark.parametrize("sde", EVERY, ids=lambda s: s.name)
@pytest.mark.parametrize(
    "method", ["auto", "tab2", "tab3", "rhoab2", "lms2", "ipndm", "dpmpp_2m", "dpmpp_3m", "unipc2", "deis_abm"]
)
def test_on_the_default_grid_a_higher_order_is_worth_it(sde: deis.Schedule, method: str) -> None:
    """At 50 steps, every method of a higher order has less than half of the error that the first order has on the same schedule."""
    _, solution = gaussian(sde)
    x_T = sde.alpha(sde.t_start) * 0.7 + sde.sigma(sde.t_start) * np.linspace(-2, 2, 9)[:, None]

    def model(x: Array, t: Array) -> Array:
        alpha, sigma = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
        return 0.7 + 0.25 * alpha * (x - 0.7 * alpha) / ((0.5 * alpha) ** 2 + sigma**2)

    def error(name: str) -> float:
        plan = deis.make_plan(sde, name, 50)
        return float(np.abs(deis.sample(plan, model, x_T, predicts="x0") - solution(sde.t_end, x_T)).max())

    assert error(method) < error("ddim") / 2 < 0.05


def test_karras_sigmas() -> None:
    """Equation 5 of arXiv 2206.00364, written out."""
    i = np.arange(18)
    karras = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(deis.make_grid(deis.EDM(), 17, "rho", 7), karras, rtol=1e-12)


def test_custom_times_and_sigmas() -> None:
    ts = [0.9, 0.5, 0.1]
    plan = deis.make_plan(SDE, "tab2", ts=ts)
    np.testing.assert_array_equal(plan.t, ts)
    same = deis.make_plan(SDE, "tab2", sigmas=SDE.rho(np.array(ts)))
    np.testing.assert_allclose(same.t, ts, rtol=1e-13)
    assert deis.make_plan(deis.EDM(), "tab1", sigmas=[80, 5, 0.5, 0]).sigma[-1] == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_step": 0}, "num_step=0"),
        ({"num_step": 2.5}, r"num_step=2\.5"),
        ({"ts_phase": "sigma"}, "'t', 'rho', 'log'"),
        ({"ts_order": 0}, "ts_order=0"),
        ({"ts": [0.1, 0.5]}, "decrease strictly"),
        ({"ts": [0.5, 0.5, 0.1]}, "decrease strictly"),
        ({"ts": [0.5, np.nan]}, "finite"),
        ({"ts": [0.5]}, "shape"),
        ({"sigmas": [1.0, -1.0]}, "at least 0"),
        ({"ts": [0.5, 0.1], "sigmas": [2, 1]}, "not both"),
        ({"ts": [0.5, -0.1]}, "leaves the schedule"),
        ({"ts": [0.5, 0.1], "num_step": 3}, "contradict each other"),
        ({"method": "tab"}, "rhork_<tableau>"),
        ({"method": "ipndm5"}, "1, 2, 3 and 4"),
        ({"method": "rhork_5dopri"}, "'3kutta'"),
    ],
)
def test_bad_input_is_refused_by_name(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        deis.make_plan(SDE, **options)  # type: ignore[arg-type]


def test_methods_say_where_they_have_no_meaning() -> None:
    flow = deis.FlowMatching()
    with pytest.raises(ValueError, match="form='eps' has no meaning where alpha is 0"):
        deis.make_plan(flow, "dpm_solver_2m")
    with pytest.raises(ValueError, match="stages in log rho need a finite one"):
        deis.make_plan(flow, "dpmpp_2s")
    with pytest.raises(ValueError, match="alpha is 0"):
        deis.make_plan(flow, "rhork_2heun")
    with pytest.raises(ValueError, match=r"shift=0 must be a finite number, greater than 0"):
        deis.FlowMatching(shift=0)
    with pytest.raises(ValueError, match="leaves the schedule"):
        deis.make_plan(deis.VPSDE.discrete([0.9, 0.5, 0.1]), ts=[5.0, 1.0])
    with pytest.raises(TypeError, match="sde must be"):
        deis.make_plan("vp")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="method, where it is no name, must be"):
        deis.make_plan(SDE, 3)  # type: ignore[arg-type]
