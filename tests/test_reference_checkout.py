"""`jax_deis` and `th_deis` beside the paper's reference implementation: DEIS_REFERENCE names a checkout of github.com/qsh-zh/deis.

Run with `DEIS_REFERENCE=path python -m pytest -m reference`. Both sides compute in float64; what is left is the reference's own
quadrature, a left Riemann sum of 10,000 points.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_deis
import th_deis
from deis.reference import get_rev_ts

pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif("DEIS_REFERENCE" not in os.environ, reason="DEIS_REFERENCE names no checkout of the reference"),
]

GRIDS = [("t", 1), ("t", 2), ("t", 3), ("log", 0), ("rho", 5), ("rho", 7)]
METHODS: list[tuple[str, dict[str, Any]]] = [
    *(("rho_rk", {"rk_method": name}) for name in ("1euler", "2heun", "3kutta", "3ral", "3heun", "3vdh", "3ssprk", "4rk")),
    *((method, {"ab_order": order}) for method in ("rho_ab", "t_ab") for order in (1, 2, 3)),
    ("ipndm", {}),
]
SCHEDULES = ("linear", "cosine", "discrete")
RIEMANN = {"rho_rk": 1e-9, "ipndm": 1e-9, "rho_ab": 1e-4, "t_ab": 5e-3}
"""The reference's error in these samples; that of the last two falls by 20 where its sums get 20 times their points."""
NUM_STEP = 8
X_T = np.random.default_rng(0).standard_normal((2, 3))


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference warns of each discrete schedule
        yield
    torch.set_default_dtype(default)


def reference(name: str) -> ModuleType:
    """Return a package of the reference under a name that is not ours."""
    import jax._src.numpy.lax_numpy as moved
    from jax._src.numpy.util import promote_dtypes_inexact

    alias = f"reference_{name}"
    if alias not in sys.modules:
        moved._promote_dtypes_inexact = promote_dtypes_inexact  # type: ignore[attr-defined]  # where the reference's JAX had it
        path = Path(os.environ["DEIS_REFERENCE"]) / name / "__init__.py"
        spec = importlib.util.spec_from_file_location(alias, path, submodule_search_locations=[str(path.parent)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules[alias] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[alias])
    return sys.modules[alias]


def schedule(module: Any, kind: str) -> Any:
    if kind == "linear":
        return module.VPSDE(*module.get_linear_alpha_fns(0.01, 20), 1e-3, 1.0)
    if kind == "cosine":
        return module.VPSDE(*module.get_cos_alpha_fns(), sampling_eps=1e-3, sampling_T=0.9)
    betas = np.linspace(1e-4, 0.02, 1000)
    table = np.cumprod(1 - betas)
    return module.DiscreteVPSDE(discrete_alpha=jnp.asarray(table) if "jax" in module.__name__ else torch.from_numpy(table))


def sampled(module: Any, kind: str, *args: Any, **options: Any) -> np.ndarray:
    """Return samples of a Gaussian of standard deviation 0.5, whose eps is known and keeps errors as small as they are."""
    sde, abar = schedule(module, kind), schedule(jax_deis if "jax" in module.__name__ else th_deis, kind).t2alpha_fn

    def eps_fn(x: Any, t: Any) -> Any:
        t = t if "jax" in module.__name__ else torch.as_tensor(t)
        return (1 - abar(t)) ** 0.5 * x / (1 - 0.75 * abar(t))

    x_T = jnp.asarray(X_T) if "jax" in module.__name__ else torch.from_numpy(X_T)
    return np.asarray(module.get_sampler(sde, eps_fn, *args, **options)(x_T))


@pytest.mark.parametrize("ours", [jax_deis, th_deis], ids=["jax", "torch"])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("phase", "order"), GRIDS)
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_samples(ours: Any, kind: str, phase: str, order: float, method: str, options: dict[str, Any]) -> None:
    if method == "ipndm" and (phase, order) != ("t", 1):
        pytest.skip("ipndm has one grid")
    theirs = reference(ours.__name__)
    got, expected = (sampled(module, kind, phase, order, NUM_STEP, method, **options) for module in (ours, theirs))
    start = float(theirs.sde.get_rev_ts(schedule(theirs, kind), NUM_STEP, order, phase)[0])
    late = 0 if np.isclose(start, schedule(ours, kind).sampling_T) else 1e-3
    np.testing.assert_allclose(got, expected, rtol=RIEMANN[method] + late)


@pytest.mark.parametrize("ours", [jax_deis, th_deis], ids=["jax", "torch"])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("phase", "order"), GRIDS)
@pytest.mark.parametrize("num_step", [1, 8, 40, 300, 999])
def test_times(ours: Any, kind: str, phase: str, order: float, num_step: int) -> None:
    theirs = reference(ours.__name__)
    expected = np.asarray(theirs.sde.get_rev_ts(schedule(theirs, kind), num_step, order, phase))
    got = get_rev_ts(schedule(ours, kind), num_step, order, phase)
    assert got[0] == schedule(ours, kind).sampling_T
    # Powers of roots that should be integers, as of 999 itself, come out below them, and the reference truncates those.
    below = (expected == got - 1) & (kind == "discrete")
    assert below.sum() <= 2
    np.testing.assert_allclose(got, expected + below, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ours", [jax_deis, th_deis], ids=["jax", "torch"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_objects(ours: Any, kind: str) -> None:
    theirs = schedule(reference(ours.__name__), kind)
    sde = schedule(ours, kind)
    public = {name for name in dir(theirs) if not name.startswith("_")}
    assert public <= set(dir(sde))
    t = jnp.linspace(float(sde.sampling_eps), float(sde.sampling_T), 7)[1:-1] + 0.01
    rho = theirs.t2rho(t)
    for name, args in {
        "t2alpha_fn": (t,),
        "alpha2t_fn": (theirs.t2alpha_fn(t),),
        "d_log_alpha_dtau_fn": (t,),
        "eps_integrand": (t,),
        "t2rho": (t,),
        "rho2t": (rho,),
        "psi": (t, t[::-1]),
    }.items():
        np.testing.assert_allclose(getattr(sde, name)(*args), getattr(theirs, name)(*args), rtol=1e-9, err_msg=name)
    x = jnp.asarray(X_T) if ours is jax_deis else torch.from_numpy(X_T)
    for name in ("x2v", "v2x"):
        np.testing.assert_allclose(getattr(sde, name)(x, t[2]), getattr(theirs, name)(x, t[2]), rtol=1e-9, err_msg=name)
    assert (sde.is_continuous, sde.alpha_start) == (theirs.is_continuous, theirs.alpha_start)
    assert (sde.sampling_eps, sde.sampling_T) == (theirs.sampling_eps, theirs.sampling_T)
