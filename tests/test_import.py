"""`import deis` loads nothing; each public name brings its own module."""

import pkgutil
import subprocess
import sys

import pytest

import deis

HEAVY = {"torch", "jax", "diffusers", "scipy.optimize", "scipy.interpolate", "deis.calibration"}


def loaded_after(code: str) -> set[str]:
    code += "\nimport sys; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_alone_loads_no_other_module() -> None:
    loaded = loaded_after("import deis")
    assert "numpy" not in loaded
    assert {name for name in loaded if name.startswith("deis")} == {"deis"}


def test_sampling_loads_neither_frameworks_nor_calibration() -> None:
    plan = "plan = deis.make_plan(deis.VPSDE.linear(), nfe=4)"
    code = f"import deis, numpy\n{plan}\ndeis.sample(plan, lambda x, t: x, numpy.ones((2, 3)))"
    assert not HEAVY & loaded_after(code)


def test_calibration_loads_no_optimizer_until_it_searches() -> None:
    assert "scipy.optimize" not in loaded_after("import deis; deis.calibrate")


def test_the_public_names() -> None:
    assert set(deis._HOME) == set(deis.__all__) <= set(dir(deis))
    for name in deis.__all__:
        getattr(deis, name)
    # Loading a module of that name would put it in the place of what the name stands for.
    assert not set(deis.__all__) & {module.name for module in pkgutil.iter_modules(deis.__path__)}


def test_modules_are_attributes_and_others_are_refused() -> None:
    code = "import deis; deis.calibration.teacher_grid; deis.sde.VPSDE; deis.methods.KNOWN; deis.plan.Plan"
    assert "deis.calibration" in loaded_after(code)
    with pytest.raises(AttributeError, match="module 'deis' has no attribute 'nonsense'"):
        _ = deis.nonsense  # type: ignore[attr-defined]
