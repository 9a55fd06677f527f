"""`jax_deis` and `th_deis`: the API of the paper's reference implementation."""

import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import deis
import jax_deis
import th_deis
from deis.reference import _reference_grid

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
    fractional = _reference_grid(sde, 5, "t", 2.0)
    np.testing.assert_allclose(fractional, np.linspace(99**0.5, 0, 6) ** 2, atol=1e-12)
    # Of (99/9 k^2/9) truncated, 0 and 1 appear twice or leave gaps: unique, then the smallest unused integers.
    crowded = _reference_grid(sde, 20, "t", 2.0)
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
