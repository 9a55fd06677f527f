"""The samplers of ComfyUI itself, in float64 and with the same noise, beside our plans.

It needs a checkout of ComfyUI, named by the environment variable DEIS_COMFYUI, and what ComfyUI imports:

    DEIS_COMFYUI=.../ComfyUI python -m pytest tests/test_comfyui_samplers.py -m comfyui
"""

from __future__ import annotations

import importlib
import inspect
import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import deis
from benchmarks.comfyui import find_program

from . import transcriptions as tr
from .test_samplers import EDM, FLOW, carried, close, of_flow, run
from .test_transcriptions import X, karras, noise, two_modes

ROOT = os.environ.get("DEIS_COMFYUI")
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(ROOT is None, reason="DEIS_COMFYUI does not name a checkout of ComfyUI"),
    pytest.mark.filterwarnings("ignore"),  # ComfyUI's own
]
Array = NDArray[np.float64]


@pytest.fixture(scope="module")
def samplers() -> SimpleNamespace:
    """ComfyUI's module of samplers, and what it asks a model for: its parametrization."""
    assert ROOT is not None
    find_program(ROOT)
    sampling = importlib.import_module("comfy.model_sampling")
    kinds = {
        "eps": type("Eps", (sampling.ModelSamplingDiscrete, sampling.EPS), {})(),
        "flow": type("Flow", (sampling.ModelSamplingDiscreteFlow, sampling.CONST), {})(),
    }
    return SimpleNamespace(functions=importlib.import_module("comfy.k_diffusion.sampling"), kinds=kinds)


def theirs(
    samplers: SimpleNamespace, name: str, kind: str, denoise: tr.Denoise, x: Array, sigmas: Array, seen: tr.Noise, **options: Any
) -> Array:
    """Run sample_<name> of ComfyUI, the k-th noise of step i being seen(i, k)."""
    at = {"i": -1, "k": 0}

    class Model:
        inner_model = SimpleNamespace(
            model_patcher=SimpleNamespace(get_model_object=lambda asked: samplers.kinds[kind]),
            inner_model=SimpleNamespace(model_sampling=samplers.kinds[kind]),
        )

        def __call__(self, x: Tensor, sigma: Tensor, **others: Any) -> Tensor:
            return torch.from_numpy(denoise(x.numpy(), float(sigma[0])))

    def told(about: dict[str, Any]) -> None:
        at.update(i=about["i"], k=0)

    def noise_sampler(*levels: Any) -> Tensor:
        at["k"] += 1
        return torch.from_numpy(seen(at["i"], at["k"] - 1))[None]

    function = getattr(samplers.functions, f"sample_{name}")
    if "noise_sampler" in inspect.signature(function).parameters:
        options["noise_sampler"] = noise_sampler
    end: Tensor = function(Model(), torch.from_numpy(x)[None], torch.from_numpy(sigmas), callback=told, disable=True, **options)
    return end[0].numpy()


CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("heunpp2", "heunpp2", {}, {}),
    *((f"ipndm_v{q}", "ipndm_v", {}, {"max_order": q}) for q in (2, 3, 4)),
    ("gradient_estimation", "gradient_estimation", {"gamma": 1.5}, {"ge_gamma": 1.5}),
    ("res_multistep", "res_multistep", {}, {}),
    ("exp_heun_2_x0", "exp_heun_2_x0", {}, {}),
    ("exp_heun_2_x0_sde", "exp_heun_2_x0_sde", {}, {}),
    ("lcm", "lcm", {}, {}),
    *(
        (name, name, {"eta": eta}, {"eta": eta})
        for name in (
            "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "res_multistep_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde",
            "seeds_2", "seeds_3",
        )
        for eta in (0.5, 1.0)
    ),
    ("seeds_2", "seeds_2", {"r": 0.3, "solver": "phi_2"}, {"r": 0.3, "solver_type": "phi_2"}),
    ("seeds_3", "seeds_3", {"r_1": 0.4, "r_2": 0.8}, {"r_1": 0.4, "r_2": 0.8}),
    ("er_sde", "er_sde", {"stages": 1}, {"max_stage": 1}),
]  # fmt: skip


@pytest.mark.parametrize("to_zero", [True, False])
@pytest.mark.parametrize(("name", "other", "options", "others"), CASES, ids=[f"{name}-{list(o)}" for name, _, o, _ in CASES])
def test_a_plan_is_comfyui_s_sampler(
    samplers: SimpleNamespace, name: str, other: str, options: dict[str, Any], others: dict[str, Any], to_zero: bool
) -> None:
    sampler = partial(theirs, samplers, other, "eps", seen=noise, **others)
    close(deis.make_plan(EDM, name, sigmas=karras(7, to_zero), **options), sampler, karras(7, to_zero))


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_dpmpp_sde_is_comfyui_s_with_the_noise_of_its_stage_carried(samplers: SimpleNamespace, eta: float) -> None:
    sigmas = karras(7)
    sampler = partial(theirs, samplers, "dpmpp_sde", "eps", seen=carried(sigmas, 0.5, eta), eta=eta)
    close(deis.make_plan(EDM, "dpmpp_sde", sigmas=sigmas, eta=eta), sampler, sigmas)


@pytest.mark.parametrize("stages", [2, 3])
def test_er_sde_is_comfyui_s_but_for_its_sums_of_200_points(samplers: SimpleNamespace, stages: int) -> None:
    x = run(deis.make_plan(EDM, "er_sde", sigmas=karras(7), stages=stages), of_flow, X / (1 + karras(7)[0])) * (1 + karras(7)[-1])
    found = theirs(samplers, "er_sde", "eps", two_modes, X, karras(7), noise, max_stage=stages)
    assert 1e-6 < np.abs(x - found).max() < 5e-3


FLOWS: list[tuple[str, str, dict[str, Any]]] = [
    *(
        (f"{name}_rf" if name != "euler_ancestral" else "ancestral_rf", name, {"eta": eta})
        for name in ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral")
        for eta in (0.5, 1.0)
    ),
    *((name, name, {"eta": 0.5}) for name in ("seeds_2", "seeds_3", "dpmpp_2m_sde", "dpmpp_3m_sde")),
    ("lcm", "lcm", {}),
]


@pytest.mark.parametrize("last", [0.0, 0.1])
@pytest.mark.parametrize(("name", "other", "options"), FLOWS, ids=[f"{name}-{o}" for name, _, o in FLOWS])
def test_a_plan_of_flow_matching_is_comfyui_s_sampler(
    samplers: SimpleNamespace, name: str, other: str, options: dict[str, Any], last: float
) -> None:
    sigmas = np.linspace(0.98, last, 8)
    found = theirs(samplers, other, "flow", of_flow, X, sigmas, noise, **options)
    x = run(deis.make_plan(FLOW, name, ts=sigmas, **options), of_flow, X)
    np.testing.assert_allclose(x, found, rtol=0, atol=1e-12 * np.abs(found).max())
