"""A plugin of pytest: the scheduler tests of a checkout of diffusers run on PlanScheduler, with names in configurations adapted.

`test_diffusers_suite` starts it in the checkout, whose tests are a package of the same name as these.
"""

from __future__ import annotations

from typing import Any

import pytest

from deis.adapters.diffusers import PlanScheduler

SD = {"num_train_timesteps": 1100, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
METHODS = (
    "auto", "ddim", "tab1", "tab3", "rhoab2", "ipndm4", "lms3", "deis_abm2", "unipc2", "unipc3_bh2", "dpmpp_2m",
    "dpmpp_3m_published", "dpm_solver_2", "dpmpp_3s", "rhork_2heun", "edm_heun",
)  # fmt: skip
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    **{method: SD | {"method": method} for method in METHODS},
    **{spacing: SD | {"method": "tab2", "timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")},
    "karras": SD | {"method": "tab2", "use_karras_sigmas": True},
    "flow": {"method": "tab2", "use_flow_sigmas": True, "flow_shift": 3.0},
    "v_prediction": SD | {"method": "unipc2", "prediction_type": "v_prediction"},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put PlanScheduler in the place of the classes under test."""
    for item in items:
        cls: Any = getattr(item, "cls", None)
        if "scheduler_classes" in vars(cls or object) and PlanScheduler not in cls.scheduler_classes:
            cls.scheduler_classes = tuple(s if hasattr(s, "stands_for") else stand_in(s) for s in cls.scheduler_classes)


def stand_in(original: Any) -> Any:
    """Return what makes the PlanScheduler of a configuration of a class of diffusers, when it is called as that class is."""

    def make(cls: Any, **config: Any) -> Any:
        return PlanScheduler.from_config({"_class_name": original.__name__} | dict(original(**config).config))

    members = {"stands_for": original, "__new__": make, "__init__": original.__init__, "_deprecated_kwargs": []}
    for name in ("from_config", "from_pretrained"):
        members[name] = staticmethod(getattr(PlanScheduler, name))
    return type(original.__name__, (), members)


def common(base: Any) -> dict[str, Any]:
    """Return a class of diffusers' common tests for each configuration."""

    def configured(config: dict[str, Any]) -> Any:
        return lambda self, **more: config | more

    return {
        f"Test_{name}": type(
            f"Test_{name}",
            (base,),
            {
                "scheduler_classes": (PlanScheduler,),
                "forward_default_kwargs": (("num_inference_steps", 25),),
                "get_scheduler_config": configured(config),
            },
        )
        for name, config in CONFIGURATIONS.items()
    }
