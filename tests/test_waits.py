"""No step of a run waits for the device: nothing reads a value on the host, and what is copied to the device takes its turn there.

torch's profiler counts what reads values. Copies are seen on the meta device, which stands for a GPU: every copy between it and the
host must be one that does not wait.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import deis
from deis.host import Kept, on_device
from deis.methods.registry import REGISTRY

SDE = deis.VPSDE.linear()
NAMES = sorted({entry.name.replace("<q>", "2").replace("<tableau>", "3kutta") for entry in REGISTRY})
READS = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero"}


def model(x: Tensor, t: Tensor) -> Tensor:
    return x / (1 + x * x) * (1 + t.reshape(-1, *(1,) * (x.ndim - 1)))


class Profiled:
    """A model that lets the profiler run from its first call to its last."""

    def __init__(self, calls: int, model: Callable[[Tensor, Tensor], Tensor] = model) -> None:
        self.left, self.model = calls, model
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self.running = False

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.left -= 1
        if not self.running:
            self.profile.start()
            self.running = True
        if self.left == 0:
            self.profile.stop()
        return self.model(x, t)

    def reads(self) -> dict[str, int]:
        assert self.left == 0
        counted = {event.key: event.count for event in self.profile.key_averages()}
        assert counted, "the profiler saw nothing"
        return {name: count for name, count in counted.items() if name in READS}


def plan_of(name: str, sde: deis.Schedule = SDE, num_step: int = 6) -> deis.Plan:
    return deis.make_plan(sde, name, num_step)


def a_plan(name: str) -> deis.Plan:
    """A plan of the first schedule that the method takes."""
    for sde in (SDE, deis.EDM(), deis.FlowMatching()):
        try:
            return plan_of(name, sde)
        except ValueError as error:
            reason = error
    raise reason


@pytest.mark.filterwarnings("ignore:.*in 6 steps:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_no_method_reads_a_value_between_its_calls(name: str) -> None:
    plan = a_plan(name)
    spy = Profiled(plan.nfe)
    deis.sample(plan, spy, torch.randn(2, 3, 4), rng=torch.Generator().manual_seed(0))
    assert spy.reads() == {}


def wrapped(kind: str, spy: Callable[[Tensor, Tensor], Tensor]) -> Any:
    if kind == "guided":
        return deis.guided(deis.Denoiser(spy, SDE), deis.Denoiser(model, SDE), [1.0, 2.0], rescale=0.5, interval=(0.1, 0.8))
    if kind == "classifier":
        return deis.classifier_guided(deis.Denoiser(spy, SDE), lambda x, t: -(x**2).sum((1, 2)))
    if kind == "threshold":
        return deis.Denoiser(spy, SDE, "eps", deis.static_threshold())
    if kind == "dynamic threshold":
        return deis.Denoiser(spy, SDE, "eps", deis.dynamic_threshold())
    operator = deis.operators.mask(np.tile([1.0, 0.0], (3, 2)))
    return deis.posterior(deis.Denoiser(spy, SDE), operator, torch.randn(2, 3, 4), 0.1, kind)


@pytest.mark.parametrize("kind", ["guided", "classifier", "threshold", "dynamic threshold", "pigdm", "dps", "replacement"])
def test_no_wrapper_of_a_model_reads_a_value(kind: str) -> None:
    """On the CPU torch's quantile itself checks its argument there; on a GPU it does not."""
    spy = Profiled(6)
    deis.sample(plan_of("tab3"), wrapped(kind, spy), torch.randn(2, 3, 4))
    found = spy.reads()
    assert found == {} or (kind == "dynamic threshold" and found.keys() <= {"aten::item", "aten::_local_scalar_dense"})


def test_the_profiler_sees_a_value_that_is_read() -> None:
    spy = Profiled(6, lambda x, t: model(x, t) * float(x[0, 0, 0] > -9))
    deis.sample(plan_of("tab3"), spy, torch.randn(2, 3, 4))
    assert spy.reads()["aten::item"] == 5
    finite = Profiled(6)
    deis.sample(plan_of("tab3"), finite, torch.randn(2, 3, 4), check_finite=True)
    assert finite.reads()["aten::is_nonzero"] == 5


class Copies(TorchDispatchMode):
    """Records the copies between host and device, and how many of them wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.all = self.waiting = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        given = {v.device.type for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim}
        made = {found.device.type} if isinstance(found, Tensor) else set()
        if len(given | made) > 1:
            self.all += 1
            self.waiting += not kwargs.get("non_blocking")
        return found


def copies(run: Callable[[], Any]) -> Copies:
    with Copies() as mode:
        out = run()
    assert out.is_meta
    return mode


@pytest.fixture(scope="module")
def network() -> deis.Pretrained:
    return deis.load_model(device="meta")


@pytest.mark.parametrize("guidance", [1.0, 2.0, [1.0, 2.0, 3.0]])
def test_labels_and_weights_reach_the_device_without_waiting(network: deis.Pretrained, guidance: Any) -> None:
    x = torch.empty(3, *network.shape, device="meta")
    found = copies(lambda: deis.sample(network.plan(5), network.conditional([1, 2, 3], guidance), x))
    assert found.all >= 6  # the times, and the labels of each call
    assert found.waiting == 0


def test_noise_of_the_host_reaches_the_device_without_waiting() -> None:
    plan = deis.make_plan(SDE, "ddim", 6, eta=1.0)
    x = torch.empty(3, 2, device="meta")
    found = copies(lambda: deis.sample(plan, model, x, rng=torch.Generator().manual_seed(0)))
    assert found.all == 1 + np.count_nonzero(plan.keep_z)
    assert found.waiting == 0


def test_plans_of_one_batch_do_not_wait(network: deis.Pretrained) -> None:
    plans = [network.plan(5), network.plan(7), network.plan(5)]
    x = torch.empty(3, *network.shape, device="meta")
    found = copies(lambda: deis.sample(plans, network.conditional([1, 2, 3], [1.0, 2.0, 3.0]), x))
    assert found.all > 7
    assert found.waiting == 0


def test_a_copy_that_waits_is_seen() -> None:
    found = copies(
        lambda: deis.sample(plan_of("tab3"), lambda x, t: x * torch.ones(2).to(x.device), torch.empty(3, 2, device="meta"))
    )
    assert found.waiting == 6


def test_what_was_copied_once_is_given_again_in_order() -> None:
    device, kept = torch.device("meta"), Kept()
    with kept.keeping():
        first = [on_device(np.ones(n), device) for n in (1, 2)]
    with kept.giving():
        assert [on_device(np.ones(n), device) for n in (1, 2)] == first
    assert on_device(np.ones(1), device) is not first[0]
    there = torch.ones(1)
    assert on_device(there, there.device) is there
