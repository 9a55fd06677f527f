"""What only a GPU shows: CUDA graphs of whole loops, that no step of a run makes the host wait, and memory that runs out.

They need one: python -m pytest -m gpu tests/test_gpu.py
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor

import deis
from deis.backends.torch import BACKEND
from deis.run.fused import fusing

from .shards import images
from .test_compiled import CASES, PLAN, SDE, X_T, Small, eager, net

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]


os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes what torch needs


@pytest.fixture(autouse=True)
def float32() -> Iterator[None]:
    """Let float32 be float32: cuDNN rounds the inputs of its products to TF32 where it is allowed to."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


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


@pytest.mark.parametrize("tf32", [False, True])
def test_a_cuda_graph_gives_every_bit_of_the_eager_loop(tf32: bool) -> None:
    """Where it did not, TF32 would make a thousandth of the last bit."""
    torch.backends.cudnn.allow_tf32 = tf32
    network = deis.load_model(device="cuda")
    model, x = network.conditional([3, 7]), torch.randn(2, *network.shape, device="cuda")
    for plan in (network.plan(5), deis.make_plan(network.sde, "tab3", 10), deis.make_plan(network.sde, "unipc2", 5)):
        assert torch.equal(graph(plan, model, x)(x), deis.sample(plan, model, x))


def test_torch_and_jax_agree() -> None:
    if jax.default_backend() == "cpu":
        pytest.skip("this JAX has no GPU")
    x, labels = np.random.default_rng(0).standard_normal((4, 1, 28, 28)).astype(np.float32), np.arange(4)
    here, there = deis.load_model(device="cuda"), deis.load_model(backend="jax")
    plan = deis.make_plan(here.sde, "tab3", 10)
    with jax.default_matmul_precision("highest"):
        expected = deis.compile(plan, there.conditional(labels), jnp.asarray(x), donate=False)(jnp.asarray(x))
    close(graph(plan, here.conditional(labels), on_gpu(x))(on_gpu(x)).cpu(), torch.tensor(np.asarray(expected)), 1e-4)


def test_x_with_gradients_and_of_inference_mode() -> None:
    compiled, x = graph(PLAN, net, on_gpu()), on_gpu()
    expected = deis.sample(PLAN, net, x)
    found = compiled(x.clone().requires_grad_())
    assert not found.requires_grad
    close(found, expected)
    with torch.inference_mode():
        of_inference = x + 0
        close(compiled(of_inference), expected)
    close(compiled(of_inference), expected)
    close(compiled(x.mT.contiguous().mT), expected)  # laid out in another way


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


# --- sums in one kernel -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terms", [1, 2, 5, 8, 9, 17])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sum_in_one_kernel(terms: int, dtype: str) -> None:
    fused = fusing(BACKEND, torch.device("cuda"))
    assert fused is not BACKEND
    rng = np.random.default_rng(terms)
    c_x, *c_p = rng.standard_normal(terms).tolist()
    x, *history = (torch.as_tensor(v).to("cuda", getattr(torch, dtype)) for v in rng.standard_normal((terms, 2, 3, 8, 8)))
    found = fused.combine(c_x, x.to(memory_format=torch.channels_last), c_p, history)
    assert found.dtype == x.dtype
    close(found, BACKEND.combine(c_x, x, c_p, history), 1e-6 if dtype == "float32" else 1e-14)


def test_a_graph_has_a_kernel_a_sum() -> None:
    """A model of one kernel, a conversion and a step: three kernels a call, and copies of x_T, of the times and of x_0."""
    plan, x = deis.make_plan(SDE, "tab3", 10), torch.randn(2, 3, 8, 8, device="cuda")
    compiled = graph(plan, lambda x, t: torch.tanh(x), x, predicts="v")
    compiled(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        compiled(x)
        torch.cuda.synchronize()
    ran = Counter(event.name for event in seen.events() if event.device_type.name == "CUDA")
    assert ran.total() <= 3 * plan.nfe + 3, ran


# --- shards -------------------------------------------------------------------------------------------------------------


def test_memory_that_runs_out_halves_the_batch(tmp_path: Path) -> None:
    options: dict[str, Any] = {"device": "cuda", "format": "npz", "shard": 512}
    plan = deis.load_model().plan(4)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 5e8) / total)
    try:
        with pytest.warns(UserWarning, match="out of memory"):
            (short,) = deis.generate(tmp_path / "short", 512, plan=plan, batch=512, **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert short.batch in (16, 32, 64, 128, 256)
    deis.generate(tmp_path / "long", 512, plan=plan, batch=short.batch, **options)
    np.testing.assert_array_equal(images(tmp_path / "short"), images(tmp_path / "long"))


def test_shards_of_a_gpu_are_the_same_each_time_and_those_of_the_cpu_up_to_rounding(tmp_path: Path) -> None:
    options: dict[str, Any] = {"plan": deis.load_model().plan(4), "format": "npz", "batch": 8}
    for name, shard, device in (("one", 8, "cuda"), ("two", 16, "cuda"), ("cpu", 16, "cpu")):
        deis.generate(tmp_path / name, 16, shard=shard, device=device, **options)
    np.testing.assert_array_equal(images(tmp_path / "one"), images(tmp_path / "two"))
    apart = np.abs(images(tmp_path / "one").astype(int) - images(tmp_path / "cpu").astype(int))
    assert np.median(apart) == 0
    assert np.quantile(apart, 0.99) <= 2  # of 255; cuDNN rounds to TF32
