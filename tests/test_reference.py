"""`jax_deis` and `th_deis`: the API of the paper's reference implementation."""

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import deis
import jax_deis
import th_deis
from deis.reference import IntegerVPSDE, get_rev_ts

X_T = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
BACKENDS: list[Any] = [(jax_deis, jnp, jnp.asarray), (th_deis, torch, torch.tensor)]
METHODS = [
    ("t_ab", "tab3", 10),
    ("rho_ab", "rhoab3", 10),
    ("rho_rk", "rhork_3kutta", 30),
    ("ipndm", "ipndm4", 10),
]


@pytest.mark.parametrize(("module", "xp", "convert"), BACKENDS, ids=["jax", "torch"])
@pytest.mark.parametrize(("method", "name", "nfe"), METHODS)
def test_every_method_is_the_plan_of_its_name(module: Any, xp: Any, convert: Any, method: str, name: str, nfe: int) -> None:
    scalars = []

    def eps_fn(x_t: Any, scalar_t: Any) -> Any:
        scalars.append(scalar_t.shape)
        vec_t = xp.ones(x_t.shape[0]) * scalar_t
        return xp.sin(x_t) * vec_t[:, None]

    def model(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.sin(x) * t[:, None]

    vpsde = module.VPSDE(*module.get_linear_alpha_fns(beta_0=0.01, beta_1=20), 1e-3, 1.0)
    sampler_fn = module.get_sampler(
        vpsde, eps_fn, ts_phase="t", ts_order=2.0, num_step=10, method=method, ab_order=3, rk_method="3kutta"
    )
    sample = sampler_fn(convert(X_T))
    assert set(scalars) == {()}
    assert len(scalars) == (1 if module is jax_deis else nfe)
    power = 1.0 if method == "ipndm" else 2.0
    plan = deis.make_plan(deis.VPSDE.linear(0.01, 20), name, 10, "t", power)
    assert plan.nfe == nfe
    expected = deis.sample(plan, model, X_T.astype(np.float64))
    np.testing.assert_allclose(np.asarray(sample), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("module", [jax_deis, th_deis])
@pytest.mark.parametrize("phase", ["rho", "t", "log"])
def test_cosine_and_every_grid(module: Any, phase: str) -> None:
    vpsde = module.VPSDE(*module.get_cos_alpha_fns(), 1e-3, 0.98)
    run = module.get_sampler(vpsde, lambda x, t: 0.1 * x, ts_phase=phase, ts_order=3, num_step=5, method="t_ab", ab_order=2)
    convert = jnp.asarray if module is jax_deis else torch.tensor
    assert np.isfinite(np.asarray(run(convert(X_T)))).all()


def test_discrete_schedules_use_fractional_times_until_two_truncate_to_one() -> None:
    sde = th_deis.DiscreteVPSDE(torch.linspace(0.999, 0.001, 100))
    assert (sde.sampling_T, sde.sampling_eps) == (99, 0)
    fractional = get_rev_ts(sde, 5, 2.0, "t")
    np.testing.assert_allclose(fractional, np.linspace(99**0.5, 0, 6) ** 2, atol=1e-12)
    # Of (99/9 k^2/9) truncated, 0 and 1 appear twice or leave gaps: unique, then the smallest unused integers.
    crowded = get_rev_ts(sde, 20, 2.0, "t")
    kept = set(np.floor(np.linspace(0, 99**0.5, 21) ** 2 + 1e-9).astype(int).tolist())
    assert len(kept) < 21
    filled = sorted(kept | set([i for i in range(100) if i not in kept][: 21 - len(kept)]))
    np.testing.assert_array_equal(crowded, filled[::-1])
    seen: list[float] = []

    def eps_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(float(t))
        return 0.1 * x

    th_deis.get_sampler(sde, eps_fn, ts_phase="t", ts_order=2.0, num_step=5, method="t_ab", ab_order=1)(torch.tensor(X_T))
    np.testing.assert_allclose(seen, fractional[:-1], rtol=1e-6)
    with pytest.raises(ValueError, match="asks for 101 distinct times"):
        th_deis.get_sampler(sde, eps_fn, num_step=100)


def test_jax_discrete_schedules_use_integers() -> None:
    sde = jax_deis.DiscreteVPSDE(discrete_alpha=jnp.linspace(0.999, 0.001, 100))
    assert isinstance(sde, IntegerVPSDE)
    np.testing.assert_array_equal(get_rev_ts(sde, 5, 1, "t"), np.floor(np.linspace(99, 0.1, 6)))
    np.testing.assert_array_equal(get_rev_ts(sde, 5, 2, "t"), np.floor(np.linspace(99**0.5, 0.1**0.5, 6) ** 2 + 1e-9))


COSINE: dict[str, Any] = {"t2alpha_fn": jax_deis.get_cos_alpha_fns()[0], "alpha2t_fn": jax_deis.get_cos_alpha_fns()[1]}
LINEAR: dict[str, Any] = dict(zip(COSINE, jax_deis.get_linear_alpha_fns(0.01, 20), strict=True))
TABLE = np.cumprod(1 - np.linspace(1e-4, 0.02, 100))
SDES: list[Any] = [
    (jax_deis.VPSDE(**COSINE, sampling_eps=1e-3, sampling_T=0.98), (0.01, 0.2, 0.5, 0.9)),
    (jax_deis.VPSDE(**LINEAR, sampling_eps=1e-3, sampling_T=1.0), (0.01, 0.2, 0.5, 1.0)),
    (jax_deis.VPSDE(lambda t: 1 / (1 + 9 * t**2), lambda a: (1 / a - 1) ** 0.5 / 3, 1e-3, 1.0), (0.01, 0.2, 0.5, 1.0)),
    (th_deis.DiscreteVPSDE(discrete_alpha=TABLE), (0.5, 10.3, 50.7, 98.5)),
]
SDE_IDS = ["cosine", "linear", "own", "discrete"]


def test_the_cosine_alpha_is_not_divided_by_its_value_at_0() -> None:
    t2alpha_fn, alpha2t_fn = th_deis.get_cos_alpha_fns()
    t = np.array([0.0, 1e-6, 1e-3, 0.2, 0.7, 0.98, 1.0])
    alpha = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(t2alpha_fn(t), alpha, rtol=1e-15)
    with np.errstate(divide="ignore"):  # dalpha/dt is 0.04 at t = 0, so that alpha's own rounding is worth 3e-15 there
        np.testing.assert_allclose(alpha2t_fn(t2alpha_fn(t)), t, rtol=1e-12, atol=1e-14)
    sde = th_deis.VPSDE(t2alpha_fn, alpha2t_fn, 0.0, 0.98)
    np.testing.assert_allclose(sde.sigma(np.array([0.0])), np.sin(0.008 / 1.008 * np.pi / 2), rtol=1e-14)
    np.testing.assert_allclose(np.exp(2 * sde.log_alpha(t[:-1])), alpha[:-1], rtol=1e-12)
    np.testing.assert_allclose(sde.t_of_log_rho(sde.log_rho(t[:-1])), t[:-1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("sde", "times"), SDES, ids=SDE_IDS)
def test_the_objects_of_the_reference(sde: Any, times: tuple[float, ...]) -> None:
    with jax.enable_x64(True):
        t = jnp.array(times)
        abar = np.asarray(sde.t2alpha_fn(t))
        np.testing.assert_allclose(abar, sde.alpha(np.array(times)) ** 2, rtol=1e-12)
        np.testing.assert_allclose(sde.t2rho(t), np.sqrt((1 - abar) / abar), rtol=1e-9)
        np.testing.assert_allclose(sde.rho2t(sde.t2rho(t)), times, rtol=1e-12)
        np.testing.assert_allclose(sde.alpha2t_fn(sde.t2alpha_fn(t)), times, rtol=1e-9)
        # v = psi(t, 0) x moves by eps drho, and x by its drift and eps_integrand eps.
        drho = jax.vmap(jax.grad(sde.t2rho))(t)
        np.testing.assert_allclose(sde.eps_integrand(t), np.sqrt(abar) * drho, rtol=1e-9)
        x = jnp.arange(4.0)
        np.testing.assert_allclose(sde.v2x(sde.x2v(x, t), t[::-1]), sde.psi(t, t[::-1]) * x, rtol=1e-12)
        assert sde.is_continuous == (sde.num_times is None)
    np.testing.assert_allclose(deis.make_plan(sde, "tab2", 5).alpha ** 2, sde.t2alpha_fn(deis.make_plan(sde, "tab2", 5).t), 1e-12)


@pytest.mark.parametrize(("sde", "times"), SDES, ids=SDE_IDS)
def test_times_of_any_framework_and_gradients(sde: Any, times: tuple[float, ...]) -> None:
    names = ("t2alpha_fn", "t2rho", "eps_integrand", "d_log_alpha_dtau_fn")
    h = 1e-6 * times[-1]
    with jax.enable_x64(True):
        for name in names:
            fn = getattr(sde, name)
            expected = np.asarray(fn(jnp.array(times)))
            slope = (np.asarray(fn(jnp.array(times) + h)) - np.asarray(fn(jnp.array(times) - h))) / (2 * h)
            t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
            y = fn(t)
            np.testing.assert_allclose(y.detach(), expected, rtol=1e-12)
            np.testing.assert_allclose(torch.autograd.grad(y.sum(), t)[0], slope, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(fn(np.array(times)), expected, rtol=1e-12)
            for i, time in enumerate(times):
                scalar = torch.tensor(time, dtype=torch.float64)
                assert (fn(scalar).shape, fn(jnp.asarray(time)).shape, np.shape(fn(time))) == ((), (), ())
                np.testing.assert_allclose([fn(scalar), fn(jnp.asarray(time)), fn(time)], expected[i], rtol=1e-12)
                np.testing.assert_allclose(jax.grad(fn)(time), slope[i], rtol=1e-5, atol=1e-7)


def test_a_table_takes_integer_times_and_its_inverse_has_a_gradient() -> None:
    sde = th_deis.DiscreteVPSDE(torch.from_numpy(TABLE))
    whole = torch.arange(100)
    np.testing.assert_allclose(sde.t2alpha_fn(whole), TABLE, rtol=1e-6)
    assert torch.isfinite(sde.eps_integrand(whole)).all()
    alpha = torch.tensor(0.5 * (TABLE[10] + TABLE[11]), requires_grad=True)
    slope = torch.autograd.grad(sde.alpha2t_fn(alpha), alpha)[0]
    np.testing.assert_allclose(slope, 1 / (TABLE[11] - TABLE[10]), rtol=1e-9)
    np.testing.assert_allclose(jax.grad(sde.alpha2t_fn)(alpha.item()), slope, rtol=1e-3)


def test_a_table_with_ties_is_the_same_in_every_framework() -> None:
    sde = th_deis.DiscreteVPSDE(np.array([0.9, 0.9, 0.75, 0.75, 0.75, 0.5, 0.25, 0.25]))
    alpha, t = np.array([0.95, 0.9, 0.8, 0.76, 0.74, 0.5, 0.3, 0.25, 0.2]), np.linspace(-1, 8, 37)
    for fn, x in ((sde.alpha2t_fn, alpha), (sde.t2alpha_fn, t)):
        np.testing.assert_allclose(fn(torch.from_numpy(x)), fn(x), rtol=1e-12)
        with jax.enable_x64(True):
            np.testing.assert_allclose(fn(jnp.asarray(x)), fn(x), rtol=1e-12)


@pytest.mark.parametrize("module", [jax_deis, th_deis])
def test_the_cosine_alpha_has_its_gradient_at_1(module: Any) -> None:
    t2alpha_fn, _ = module.get_cos_alpha_fns()
    t = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    assert abs(torch.autograd.grad(t2alpha_fn(t), t)[0]) < 1e-12
    assert abs(jax.grad(t2alpha_fn)(1.0)) < 1e-6


def test_states_keep_their_framework() -> None:
    sde = th_deis.VPSDE(*th_deis.get_cos_alpha_fns(), 1e-3, 0.98)
    expected = 1 / np.cos(0.508 / 1.008 * np.pi / 2)
    for x in (torch.ones(2, 3), jnp.ones((2, 3)), np.ones((2, 3), np.float32)):
        for t in (0.5, torch.tensor(0.5), jnp.asarray(0.5), np.float64(0.5)):
            v = sde.x2v(x, t)
            assert type(v) is type(x)
            np.testing.assert_allclose(np.asarray(v), expected, rtol=1e-6)
            np.testing.assert_allclose(np.asarray(sde.v2x(v, t)), 1, rtol=1e-6)


def test_without_a_framework_that_can_differentiate_it_says_so() -> None:
    run_without(
        {"jax", "jaxlib"},
        "import torch, th_deis\n"
        "sde = th_deis.VPSDE(lambda t: 1 / (1 + t**2), lambda a: (1 / a - 1) ** 0.5, 1e-3, 1.0)\n"
        "assert abs(float(sde.d_log_alpha_dtau_fn(1.0)) + 1) < 1e-12\n",
    )
    run_without(
        {"torch", "jax", "jaxlib"},
        "import th_deis\n"
        "sde = th_deis.VPSDE(lambda t: 1 / (1 + t**2), lambda a: (1 / a - 1) ** 0.5, 1e-3, 1.0)\n"
        "try:\n    sde.d_log_alpha_dtau_fn(1.0)\n"
        "except TypeError as error:\n    assert 'import torch or jax' in str(error), error\n"
        "else:\n    raise AssertionError\n",
    )


@pytest.mark.parametrize("method", ["t_ab", "rho_ab", "rho_rk", "ipndm"])
@pytest.mark.parametrize("sde", [sde for sde, _ in SDES], ids=SDE_IDS)
def test_a_sampler_can_be_jitted(sde: Any, method: str) -> None:
    sampler_fn = jax_deis.get_sampler(sde, lambda x, t: 0.1 * x, "t", 2, 5, method)
    x_T = jnp.asarray(X_T)
    np.testing.assert_allclose(jax.jit(sampler_fn)(x_T), sampler_fn(x_T), rtol=1e-5)


def test_the_defaults_are_those_of_the_reference() -> None:
    vpsde = th_deis.VPSDE(*th_deis.get_linear_alpha_fns(0.1, 20), 1e-3, 1.0)
    calls: list[float] = []

    def eps_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(float(t))
        return 0.1 * x

    th_deis.get_sampler(vpsde, eps_fn, "log", 0, 4)(torch.tensor(X_T))
    assert len(calls) == 4 * 3  # rho_rk, 3kutta


def test_unknown_names_list_the_known_ones() -> None:
    vpsde = th_deis.VPSDE(*th_deis.get_linear_alpha_fns(0.1, 20), 1e-3, 1.0)
    with pytest.raises(ValueError, match="'rho_rk', 'rho_ab', 't_ab', 'ipndm'"):
        th_deis.get_sampler(vpsde, lambda x, t: x, method="ddim")
    with pytest.raises(ValueError, match="'3kutta'"):
        th_deis.get_sampler(vpsde, lambda x, t: x, method="rho_rk", rk_method="5x")


BLOCK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Refuse())
"""


def run_without(blocked: set[str], code: str) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCK.format(blocked=blocked) + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_deis_needs_numpy_and_scipy_only() -> None:
    blocked = {"torch", "jax", "jaxlib", "flax", "diffusers", "click", "PIL", "tqdm", "safetensors"}
    run_without(
        blocked,
        "import numpy as np, deis, th_deis, jax_deis\n"
        "plan = deis.make_plan(deis.VPSDE.linear(), 'tab3', 5)\n"
        "x = deis.sample(plan, lambda x, t: 0.1 * x, np.ones((2, 3)))\n"
        "assert x.shape == (2, 3)\n"
        "third = {name.split('.')[0] for name in sys.modules} & {'torch', 'jax', 'flax', 'diffusers', 'matplotlib', 'mpmath'}\n"
        "assert not third, third\n",
    )


def test_th_deis_works_without_jax() -> None:
    run_without(
        {"jax", "jaxlib", "flax"},
        "import torch, th_deis\n"
        "sde = th_deis.VPSDE(*th_deis.get_linear_alpha_fns(0.1, 20), 1e-3, 1.0)\n"
        "torch.manual_seed(0)\n"
        "run = th_deis.get_sampler(sde, lambda x, t: 0.1 * x, num_step=5)\n"
        "assert run(torch.randn(2, 3)).shape == (2, 3)\n",
    )


def test_jax_deis_works_without_torch() -> None:
    run_without(
        {"torch", "diffusers"},
        "import jax.numpy as jnp, jax_deis\n"
        "sde = jax_deis.VPSDE(lambda t: jnp.exp(-10 * t**2), lambda a: (-jnp.log(a) / 10) ** 0.5, 1e-3, 1.0)\n"
        "assert jax_deis.get_sampler(sde, lambda x, t: 0.1 * x, num_step=5)(jnp.ones((2, 3))).shape == (2, 3)\n",
    )
