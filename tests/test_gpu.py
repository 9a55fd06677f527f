"""What only a GPU shows: CUDA graphs of whole loops, and that no step of a run makes the host wait.

They need one: python -m pytest -m gpu tests/test_gpu.py
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import deis

from .test_compiled import CASES, PLAN, SDE, X_T, Small, eager, net

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]


def on_gpu(values: Any = X_T) -> Tensor:
    return torch.as_tensor(values).to("cuda")


def close(found: Tensor, expected: Tensor, within: float = 1e-5) -> None:
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=within)


def graph(plan: deis.Plan, model: Any, shape: Any, **options: Any) -> deis.Compiled:
    compiled = deis.compile(plan, model, shape, **options)
    assert (compiled.how, compiled.reason) == ("cuda graph", None)
    return compiled


@pytest.mark.parametrize("where", ["cuda", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_a_cuda_graph_gives_what_the_eager_loop_gives(case: str, where: str) -> None:
    plan, model = CASES[case]
    compiled = graph(plan, model, X_T.shape, device="cuda")
    for seed in (0, 1):
        one, two = (torch.Generator(where).manual_seed(seed) if plan.stochastic else None for _ in range(2))
        x = on_gpu() + seed
        close(compiled(x, one), eager(plan, model, x, two))


@pytest.mark.parametrize("guidance", [1.0, 2.0, [1.0, 3.0]])
def test_the_bundled_network_with_labels_in_a_cuda_graph(guidance: Any) -> None:
    network = deis.load_model(device="cuda")
    model, x = network.conditional([3, 7], guidance), torch.randn(2, *network.shape, device="cuda")
    close(graph(network.plan(5), model, x)(x), deis.sample(network.plan(5), model, x))


def test_labels_change_from_call_to_call() -> None:
    network = deis.load_model(device="cuda")
    null, x = torch.tensor([10, 10], device="cuda"), torch.randn(2, *network.shape, device="cuda")
    first = torch.tensor([0, 0], device="cuda")
    compiled = graph(network.plan(5), lambda labels: network.conditioned(labels, null, 2.0), x, inputs=first)
    for labels in ([3, 7], [1, 2]):
        given = torch.tensor(labels, device="cuda")
        close(compiled(x, inputs=given), deis.sample(network.plan(5), network.conditional(labels, guidance=2.0), x))
    close(compiled(x), compiled(x, inputs=first))


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Strict:
    """A model that makes waiting for the device an error from its first call to its last."""

    def __init__(self, model: Callable[[Tensor, Tensor], Tensor], calls: int) -> None:
        self.model, self.left, self.mode = model, calls, waiting_is_an_error()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.left > 0 and torch.cuda.get_sync_debug_mode() == 0:
            self.mode.__enter__()
        self.left -= 1
        if self.left == 0:
            self.mode.__exit__(None, None, None)
        return self.model(x, t)


@pytest.mark.parametrize("where", ["cuda", "cpu"])
@pytest.mark.parametrize("method", ["tab3", "auto", "unipc2", "rhork_2heun", "ancestral", "dpmpp_2m_sde", "parallel2"])
def test_no_step_waits(method: str, where: str) -> None:
    plan = deis.make_plan(SDE, method, 30)
    strict = Strict(net, plan.nfe)
    try:
        deis.sample(plan, strict, on_gpu(), rng=torch.Generator(where).manual_seed(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert strict.left == 0


@pytest.mark.parametrize("several", [False, True])
def test_no_call_of_the_bundled_network_waits(several: bool) -> None:
    """From the first call to the last step: what comes before the first call may wait."""
    network = deis.load_model(device="cuda")
    inner, begun = network.net, list[bool]()

    def spied(x: Any, t: Any, labels: Any) -> Any:
        if not begun:
            begun.append(True)
            torch.cuda.set_sync_debug_mode("error")
        return inner(x, t, labels)

    object.__setattr__(network, "net", spied)
    x = torch.randn(3, *network.shape, device="cuda")
    plan = [network.plan(n) for n in (5, 7, 5)] if several else network.plan(5)
    try:
        deis.sample(plan, network.conditional([1, 2, 3], [1.0, 2.0, 3.0]), x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert begun


def test_a_replay_does_not_wait() -> None:
    x = on_gpu()
    compiled = graph(PLAN, net, x)
    compiled(x)
    with waiting_is_an_error():
        compiled(x)


def test_memory_does_not_grow() -> None:
    x = torch.randn(2, 1, 32, 32, device="cuda")
    compiled = graph(PLAN, Small().cuda(), x)
    for _ in range(3):
        compiled(x)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(100):
        compiled(x)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_weights_are_read_where_they_lie() -> None:
    model, x = Small().cuda(), torch.randn(2, 1, 8, 8, device="cuda")
    compiled = graph(PLAN, model, x)
    before = compiled(x)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    after = compiled(x)
    assert (after - before).abs().max() > 1e-3
    close(after, deis.sample(PLAN, model, x))


@pytest.mark.parametrize("options", [{}, {"channels_last": True}], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-4), ("float16", 1e-2), ("bfloat16", 5e-2)])
def test_halves_and_channels_last(dtype: str, within: float, options: dict[str, bool]) -> None:
    """The state stays float32; the tolerances are those of the network's own rounding."""
    x = torch.randn(2, 1, 16, 16, device="cuda")
    expected = deis.sample(PLAN, Small().cuda(), x)
    compiled = graph(PLAN, Small().cuda().to(getattr(torch, dtype)), x, network_dtype=dtype, **options)
    found = compiled(x)
    assert found.dtype == torch.float32
    close(found, expected, within)


def test_what_waits_runs_eagerly_and_says_so() -> None:
    x = on_gpu()
    with pytest.warns(UserWarning, match="synchronizing"):
        compiled = deis.compile(PLAN, lambda x, t: net(x, t) * float(x.sum() > -1e9), x)
    assert compiled.how == "eager"
    close(compiled(x), deis.sample(PLAN, net, x))


def test_a_capture_that_fails_leaves_the_device_as_it_was() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        torch.cuda.synchronize()  # which the debug mode does not see, and a capture does not allow
        return net(x, t)

    x = on_gpu()
    with pytest.warns(UserWarning, match="cuda graph failed"):
        compiled = deis.compile(PLAN, model, x)
    assert compiled.how == "eager"
    close(compiled(x), deis.sample(PLAN, net, x))
    assert torch.randn(4, device="cuda").isfinite().all()  # of the default generator, which was told of the capture
    close(graph(PLAN, net, x)(x), deis.sample(PLAN, net, x))


def test_two_threads_on_two_streams_share_a_graph() -> None:
    x = torch.randn(2, 4, 64, 64, device="cuda")
    compiled = graph(PLAN, lambda x, t: 0.1 * x, x)
    wrong: list[int] = []

    def work(k: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            own = torch.full_like(x, float(k))
            found = [compiled(own) for _ in range(20)]
            expected = deis.sample(PLAN, lambda x, t: 0.1 * x, own)
            wrong.extend(k for v in found if not np.allclose(v.cpu(), expected.cpu(), rtol=1e-4))

    torch.cuda.synchronize()
    threads = [Thread(target=work, args=(k,)) for k in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
