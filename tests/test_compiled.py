"""`deis.compile`: it gives what `deis.sample` gives, compiles once, follows its weights, and says why where it cannot."""

import gc
import re
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import deis
from deis.backends.torch import BACKEND
from deis.model.predictions import Predictor, conversions
from deis.run import fused, told_for_plan
from deis.run.eager import run_eager
from deis.run.fused import fusing
from deis.run.options import Options

SDE = deis.VPSDE.linear()
X_T = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)


def net(x: Any, t: Any) -> Any:
    """Nonlinear in x and in t, in any framework."""
    return 0.7 * x / (1 + 0.1 * x * x) * (1 - 0.2 * t[:, None, None])


def guided(weight: Any = 2.0) -> Any:
    weak = deis.Denoiser(lambda x, t: 0.9 * net(x, t), SDE)
    return deis.guided(deis.Denoiser(net, SDE), weak, weight, rescale=0.3, interval=(0.2, 0.9))


CASES: dict[str, tuple[deis.Plan, Any]] = {
    "tab3": (deis.make_plan(SDE, "tab3", 5), net),
    "auto": (deis.make_plan(SDE, nfe=5), deis.Denoiser(net, SDE)),
    "stochastic": (deis.make_plan(SDE, "ddim", 3, eta=1.0), net),
    "corrector": (deis.make_plan(SDE, "unipc2", 4), net),
    "stages": (deis.make_plan(SDE, "dpm_solver_2", 4), net),
    "guidance": (deis.make_plan(SDE, "tab1", 3), guided()),
    "threshold": (deis.make_plan(SDE, "dpmpp_2m", 4), deis.Denoiser(net, SDE, threshold=deis.static_threshold(3.0))),
    "encode": (deis.make_plan(SDE, "ddim", 3, direction="encode"), net),
}


@pytest.fixture
def no_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch.compile trace the loop into its graph and run that, without making C++ of it, which takes seconds a loop."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def eager(plan: deis.Plan, model: Any, x: Any, rng: Any = None) -> Any:
    return deis.sample(plan, model, x, rng=rng) if plan.direction == "decode" else deis.encode(plan, model, x)


def close(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    scale = np.abs(np.asarray(expected)).max()
    np.testing.assert_allclose(np.asarray(found) / scale, np.asarray(expected) / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("no_code")
def test_torch_compile_gives_what_the_eager_loop_gives(case: str) -> None:
    plan, model = CASES[case]
    compiled = deis.compile(plan, model, (2, 3, 4))
    assert (compiled.how, compiled.reason) == ("torch.compile", None)
    for seed in (0, 1):
        x = torch.tensor(X_T) + seed
        rng = [torch.Generator().manual_seed(seed) if plan.stochastic else None for _ in range(2)]
        close(compiled(x, rng[0]), eager(plan, model, x, rng[1]))


@pytest.mark.parametrize("case", CASES)
def test_jit_gives_what_the_eager_loop_gives(case: str) -> None:
    plan, model = CASES[case]
    compiled = deis.compile(plan, model, jax.ShapeDtypeStruct(X_T.shape, jnp.float32))
    assert (compiled.how, compiled.reason) == ("jit", None)
    key = jax.random.key(3) if plan.stochastic else None
    expected = eager(plan, model, jnp.asarray(X_T), key)
    for rng in (key, None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(2))):
        close(compiled(jnp.array(X_T), rng), expected)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.last(torch.nn.functional.silu(self.conv(x)) * (1 + t.to(x.dtype)[:, None, None, None]))


PLAN = deis.make_plan(SDE, "tab2", 3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler of C++")
def test_inductor_runs_the_whole_loop() -> None:
    torch._dynamo.reset()
    compiled = deis.compile(PLAN, net, (2, 3, 4))
    assert (compiled.how, compiled.reason) == ("torch.compile", None)
    close(compiled(torch.tensor(X_T)), deis.sample(PLAN, net, torch.tensor(X_T)))


@pytest.mark.usefixtures("no_code")
def test_one_graph_without_breaks_serves_every_later_call() -> None:
    counters, model = torch._dynamo.utils.counters, Small().requires_grad_()
    counters.clear()
    x = torch.randn(2, 1, 8, 8)
    compiled = deis.compile(PLAN, model, x)
    assert compiled.how == "torch.compile"
    assert counters["stats"]["unique_graphs"] == 1
    with torch.inference_mode():
        made_inside = torch.randn(2, 1, 8, 8)
        inside = compiled(made_inside)
    for other in (torch.randn_like(x), x.double().float(), x.clone().requires_grad_(), x.mT, made_inside):
        close(compiled(other), deis.sample(PLAN, model, other.detach()))
    close(compiled(made_inside), inside.clone())
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["graph_break"] == {}
    assert not compiled(x.requires_grad_()).requires_grad


@pytest.mark.usefixtures("no_code")
def test_more_loops_compile_than_torch_allows_one_function() -> None:
    x = torch.tensor(X_T)
    with torch._dynamo.config.patch(recompile_limit=1):
        loops = [deis.compile(deis.make_plan(SDE, "ddim", n), net, x) for n in (2, 3, 4)]
    assert {compiled.how for compiled in loops} == {"torch.compile"}


@pytest.mark.usefixtures("no_code")
def test_torch_follows_weights_that_change_in_place() -> None:
    model, x = Small(), torch.randn(2, 1, 8, 8)
    compiled = deis.compile(PLAN, model, x)
    before = compiled(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x, torch.ones(2)).square().mean().backward()
    optimizer.step()
    after = compiled(x)
    assert (after - before).abs().max() > 1e-3
    close(after, deis.sample(PLAN, model, x))


def test_jax_takes_weights_as_arguments_and_those_that_change_as_inputs() -> None:
    weights = {"w": jnp.full((3, 4), 0.3), "b": jnp.zeros(4)}

    def make(weights: Any) -> Callable[[Any, Any], Any]:
        return lambda x, t: weights["w"] * x + weights["b"]

    compiled = deis.compile(PLAN, make, jnp.asarray(X_T), inputs=weights)
    other = {"w": jnp.full((3, 4), 0.5), "b": jnp.ones(4)}
    for given in (weights, other):
        close(compiled(jnp.array(X_T), inputs=given), deis.sample(PLAN, make(given), jnp.asarray(X_T)))
    close(compiled(jnp.array(X_T)), deis.sample(PLAN, make(weights), jnp.asarray(X_T)))
    with pytest.raises(ValueError, match="compile again for others"):
        compiled(jnp.array(X_T), inputs={"w": jnp.zeros(4), "b": jnp.ones(4)})


def test_jax_writes_no_weights_into_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    lower = jax.stages.Lowered.compile

    def told(lowered: Any) -> Any:
        texts.append(lowered.as_text())
        return lower(lowered)

    monkeypatch.setattr(jax.stages.Lowered, "compile", told)
    weight = jnp.asarray(np.random.default_rng(0).standard_normal((12, 12)), jnp.float32) / 12
    model = lambda x, t: (x.reshape(2, 12) @ weight).reshape(2, 3, 4)  # noqa: E731
    compiled = deis.compile(PLAN, model, jnp.asarray(X_T))
    close(compiled(jnp.array(X_T)), deis.sample(PLAN, model, jnp.asarray(X_T)))
    (text,) = texts
    assert "tensor<12x12xf32>" in text
    assert not [line for line in text.splitlines() if "constant" in line and "12x12xf32" in line]


def test_jax_gives_the_memory_of_its_argument_away_only_if_it_may() -> None:
    x = jnp.array(X_T)
    keeps = deis.compile(PLAN, net, x, donate=False)
    close(keeps(x), keeps(x))
    donates = deis.compile(PLAN, net, x)
    assert not x.is_deleted()
    donates(x)
    assert x.is_deleted()
    with pytest.raises(ValueError, match=r"donated to an earlier call.*donate=False"):
        donates(x)


@pytest.mark.usefixtures("no_code")
def test_torch_inputs_change_from_call_to_call() -> None:
    x = torch.tensor(X_T)

    def make(inputs: Any) -> deis.Denoiser:
        labels, (weight,) = inputs["labels"], inputs["more"]
        return deis.Denoiser(lambda x, t: net(x, t) * (1 + 0.1 * labels[:, None, None]) * weight, SDE)

    first = {"labels": torch.tensor([1, 2]), "more": (torch.tensor(1.0),)}
    second = {"labels": np.array([3, 4]), "more": (torch.tensor(0.5),)}
    compiled = deis.compile(PLAN, make, x, inputs=first)
    torch._dynamo.utils.counters.clear()
    for given in (second, first):
        told = {"labels": torch.as_tensor(given["labels"]), "more": given["more"]}
        close(compiled(x, inputs=given), deis.sample(PLAN, make(told), x))
    close(compiled(x), compiled(x, inputs=first))
    assert torch._dynamo.utils.counters["stats"] == {}, "compiled again"
    for wrong in ({"labels": torch.tensor([1]), "more": first["more"]}, {"labels": torch.tensor([1, 2])}):
        with pytest.raises(ValueError, match="compile again for others"):
            compiled(x, inputs=wrong)
    with pytest.raises(TypeError, match=r"inputs must be a torch\.Tensor"):
        compiled(x, inputs={"labels": [1, 2], "more": first["more"]})


@pytest.mark.usefixtures("no_code")
def test_labels_of_a_pretrained_network_are_inputs() -> None:
    """`Pretrained.conditioned` takes labels that are not known in numbers."""
    weight = torch.linspace(0.5, 1.0, 11)
    network = deis.Pretrained(lambda x, t, labels: net(x, t) * weight[labels][:, None, None], SDE, "eps", (3, 4, 1), 10, 10, 1.0)
    plan, x, null = deis.make_plan(SDE, "ddim", 2), torch.tensor(X_T), torch.tensor([10, 10])
    compiled = deis.compile(plan, lambda labels: network.conditioned(labels, null, 2.0), x, inputs=torch.tensor([0, 0]))
    assert compiled.how == "torch.compile", compiled.reason
    for labels in ([3, 7], [1, 2]):
        given = torch.tensor(labels)
        close(compiled(x, inputs=given), deis.sample(plan, network.conditioned(given, null, 2.0), x))


def reads(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.1 * x if x.sum() > 0 else 0.2 * x


@pytest.mark.usefixtures("no_code")
def test_a_model_that_cannot_be_captured_runs_eagerly_and_says_why() -> None:
    x = torch.tensor(X_T)
    with pytest.warns(UserWarning, match=r"eager: torch\.compile failed with .*[Dd]ata.dependent"):
        compiled = deis.compile(PLAN, reads, x)
    assert compiled.how == "eager"
    assert compiled.reason is not None
    assert "torch.compile failed" in compiled.reason
    torch.testing.assert_close(compiled(x), deis.sample(PLAN, reads, x), rtol=0, atol=0)
    asked = deis.compile(PLAN, reads, x, mode="eager")
    assert (asked.how, asked.reason) == ("eager", None)


def test_an_eager_loop_draws_the_noise_of_an_eager_run() -> None:
    plan, _ = CASES["stochastic"]
    x, (one, two) = torch.tensor(X_T), (torch.Generator().manual_seed(5) for _ in range(2))
    compiled = deis.compile(plan, net, x, mode="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x, one), deis.sample(plan, net, x, rng=two), rtol=0, atol=0)
    with pytest.raises(ValueError, match="rng is missing"):
        compiled(x)


def test_errors_of_the_model_itself_are_raised_at_once() -> None:
    for x in (torch.tensor(X_T), jnp.asarray(X_T)):
        with pytest.raises(ValueError, match=r"model\(x, t\) returned shape"):
            deis.compile(PLAN, lambda x, t: x[:, :1], x)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_network_in_half_precision_keeps_a_float32_state(dtype: str) -> None:
    seen: set[str] = set()

    def half(x: Any, t: Any) -> Any:
        seen.add(str(x.dtype))
        return 0.1 * x

    for x in (torch.tensor(X_T), jnp.array(X_T)):
        exact = np.asarray(deis.sample(PLAN, lambda x, t: 0.1 * x, x))
        compiled = deis.compile(PLAN, half, x, network_dtype=dtype, mode="eager")
        found = compiled(x)
        assert str(found.dtype).endswith("float32")
        assert {name.removeprefix("torch.") for name in seen} == {dtype}
        error = np.abs(np.asarray(found) - exact).max() / np.abs(exact).max()
        assert 0 < error < {"float16": 1e-3, "bfloat16": 1e-2}[dtype]
        seen.clear()


def test_channels_last_reaches_the_network_and_its_weights() -> None:
    model, seen = Small(), set()
    model.register_forward_pre_hook(lambda _, given: seen.add(given[0].is_contiguous(memory_format=torch.channels_last)))
    x = torch.randn(2, 1, 8, 8)
    expected = deis.sample(PLAN, model, x)
    seen.clear()
    compiled = deis.compile(PLAN, deis.Denoiser(model, SDE), x, mode="eager", channels_last=True)
    close(compiled(x), expected)
    assert seen == {True}
    assert model.last.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_does_not_apply_is_refused_with_what_does() -> None:
    x, in_jax = torch.tensor(X_T), jnp.asarray(X_T)
    for error, message, arguments, options in (
        (TypeError, "plan must be a deis.Plan", (None, net, x), {}),
        (TypeError, "computes at once", (PLAN, net, X_T), {}),
        (ValueError, "goes with a shape in numbers", (PLAN, net, x), {"device": "cpu"}),
        (ValueError, r"shape\[1\]=0", (PLAN, net, (2, 0)), {}),
        (ValueError, "needs an array on a GPU, and shape is on cpu", (PLAN, net, x), {"mode": "cuda graph"}),
        (ValueError, "the others are torch's", (PLAN, net, in_jax), {"mode": "cuda graph"}),
        (ValueError, "x of four dimensions, and x has shape", (PLAN, net, x), {"channels_last": True}),
        (ValueError, "XLA chooses the layout", (PLAN, net, in_jax), {"channels_last": True}),
        (ValueError, "network_dtype='int8' is unknown", (PLAN, net, x), {"network_dtype": "int8"}),
        (ValueError, "donate=None must be True or False", (PLAN, net, x), {"donate": None}),
        (TypeError, r"model must be a function of \(inputs\)", (PLAN, net, x), {"inputs": x}),
        (TypeError, r"model must be a function of \(x, t\)", (PLAN, lambda x: x, x), {}),
    ):
        with pytest.raises(error, match=message):
            deis.compile(*arguments, **options)
    with pytest.raises(ValueError, match="while another program is being traced"):
        jax.jit(lambda x: deis.compile(PLAN, net, x)(x))(in_jax)


def test_another_array_than_was_compiled_for_is_refused() -> None:
    compiled = deis.compile(PLAN, net, torch.tensor(X_T), mode="eager")
    for error, message, x in (
        (TypeError, "another framework was compiled for", jnp.asarray(X_T)),
        (ValueError, r"has shape \(1, 3, 4\)", torch.tensor(X_T[:1])),
        (ValueError, "dtype torch.float64", torch.tensor(X_T).double()),
        (ValueError, "x_T is on meta, and cpu", torch.empty(X_T.shape, device="meta")),
    ):
        with pytest.raises(error, match=message):
            compiled(x)
    with pytest.raises(ValueError, match="compile again with inputs="):
        compiled(torch.tensor(X_T), inputs=torch.zeros(2))


def test_a_compiled_loop_keeps_its_model_and_no_longer() -> None:
    model = Small()
    alive, x = weakref.ref(model), torch.randn(2, 1, 8, 8)
    compiled = deis.compile(PLAN, model, x, mode="eager")
    del model
    gc.collect()
    assert alive() is not None
    del compiled
    gc.collect()
    assert alive() is None


def test_nothing_is_warned_of_where_the_loop_was_captured() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert deis.compile(PLAN, net, jnp.asarray(X_T)).reason is None


# --- sums in one kernel of a GPU ----------------------------------------------------------------------------------------


@pytest.fixture
def jiterator(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Let Python compute what a kernel of the jiterator would, by its code; yield the number of states of each kernel that ran."""
    ran: list[int] = []

    def create(code: str, **defaults: float) -> Callable[..., Any]:
        parameters, body = re.fullmatch(r"template <typename T> T \w+\((.*)\) \{ return (.*); \}", code).groups()  # type: ignore[union-attr]
        names = [parameter.removeprefix("T ") for parameter in parameters.split(", ")]

        def kernel(*states: torch.Tensor, **weights: float) -> Any:
            assert len(states) <= 8
            assert weights.keys() == defaults.keys()
            ran.append(len(states))
            return eval(body, {"fma": lambda a, b, c: torch.add(c, b, alpha=a)}, dict(zip(names, states, strict=False)) | weights)

        return kernel

    monkeypatch.setattr(torch.cuda.jiterator, "_create_jit_fn", create)
    fused._kernel.cache_clear()
    yield ran
    fused._kernel.cache_clear()


@pytest.mark.parametrize("terms", range(1, 18))
def test_a_sum_of_many_states_takes_a_kernel_for_each_eight(terms: int, jiterator: list[int]) -> None:
    backend = fusing(BACKEND, torch.device("cpu"))
    assert backend is not BACKEND
    rng = np.random.default_rng(terms)
    c_x, *c_p = rng.standard_normal(terms).tolist()
    x, *history = torch.tensor(rng.standard_normal((terms, 2, 3)))
    jiterator.clear()
    found = backend.combine(c_x, x, [*c_p, 0.0, 3.0], [*history, torch.full_like(x, torch.nan)])
    assert torch.equal(found, BACKEND.combine(c_x, x, c_p, history))
    assert sum(jiterator) == (terms + len(jiterator) - 1 if terms > 1 else 0)
    assert len(jiterator) == -(-(terms - 1) // 7)


@pytest.mark.parametrize("case", CASES)
def test_a_loop_of_fused_sums_gives_what_the_eager_loop_gives(case: str, jiterator: list[int]) -> None:
    plan, model = CASES[case]
    model, predicts, threshold = told_for_plan(model, plan, None)
    predictor = Predictor(model, fusing(BACKEND, torch.device("cpu")), torch.float32, threshold)
    jiterator.clear()
    x = torch.tensor(X_T)
    one, two = (torch.Generator().manual_seed(0) if plan.stochastic else None for _ in range(2))
    options = Options(conversions(plan, predicts, threshold is not None), one, False, None, False, False, False, False)
    close(run_eager(plan, predictor, x, options), eager(plan, CASES[case][1], x, two))
    assert len(jiterator) >= plan.nfe - 1  # the last sum may have one term


def test_where_nothing_can_be_fused_the_backend_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fusing(BACKEND, torch.device("cpu")) is BACKEND  # the jiterator refuses
    monkeypatch.delattr(torch.cuda.jiterator, "_create_jit_fn")
    fused._kernel.cache_clear()
    assert fusing(BACKEND, torch.device("cpu")) is BACKEND


def test_an_array_of_numpy_is_not_one_of_jax() -> None:
    compiled = deis.compile(PLAN, net, jnp.asarray(X_T))
    with pytest.raises(TypeError, match="x_T is a ndarray, and another framework was compiled for"):
        compiled(X_T)
