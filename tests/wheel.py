"""What the installed wheel must do, in an environment of its own: `make package` runs it. Not collected by pytest."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import numpy as np

import deis

SITE = Path(sys.prefix)


def check_place() -> None:
    """Check that it is the wheel that runs, and not a checkout, and that it holds what it needs."""
    home = Path(deis.__file__).parent
    assert home.is_relative_to(SITE), f"deis was imported from {home}, not from the wheel in {SITE}"
    assert (home / "py.typed").exists()
    assert len(list((home / "assets" / "mnist" / "plans").glob("*.json"))) == 8
    assert deis.__version__ == importlib.metadata.version("deis-samplers")
    for alias in ("jax_deis", "th_deis"):
        assert (home.parent / alias / "__init__.py").exists(), alias


def check_numpy() -> None:
    """Sample with NumPy, before any framework is loaded."""
    plan = deis.make_plan(deis.VPSDE.linear(), nfe=5)
    x_0 = deis.sample(plan, lambda x, t: 0.1 * x, np.ones((2, 3)))
    assert x_0.shape == (2, 3)
    assert np.isfinite(x_0).all()
    assert not {"torch", "jax"} & set(sys.modules)


def check_torch() -> None:
    """Sample the bundled model with a plan that was fitted to it."""
    import torch

    network = deis.load_model()
    x_T = torch.randn(2, *network.shape, generator=torch.Generator().manual_seed(0))
    x_0 = deis.sample(network.plan(4), network.conditional([3, 8]), x_T)
    assert network.plan(4).provenance, "the plan did not come with the network"
    assert 0.9 < float(x_0.abs().amax()) < 1.5


def check_command() -> None:
    """Run the command that the wheel installs."""
    shown = subprocess.run([SITE / "bin" / "deis", "plan", "--nfe", "5"], check=True, capture_output=True, text=True).stdout
    assert "5" in shown


if __name__ == "__main__":
    check_place()
    check_numpy()
    check_torch()
    check_command()
    print(f"the wheel of deis-samplers {deis.__version__} works")
