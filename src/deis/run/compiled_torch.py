"""The loop of a plan in torch as one program: a CUDA graph with memory of its own, or one graph of `torch.compile`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import kind
from ..backends.record import AddNoise
from ..backends.torch import BACKEND
from ..host import Kept, on_device
from ..model.predictions import Denoiser
from ..plan import Plan
from .fused import fusing
from .loop import Loop

Program = Callable[[Tensor, Any, Any], Tensor]
"""(x_T, the noise or None, inputs) -> x_0"""


def capture(loop: Loop, x: Tensor, inputs: Any, mode: str, channels_last: bool) -> tuple[str, str | None, Callable[..., Tensor]]:
    """Return how the loop was captured, why not as asked if so, and run(x_T, rng, inputs) -> x_0."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if channels_last:
        _convert(loop.model)
    loop, reason = replace(loop, backend=replace(BACKEND, noise=_given)), None
    with torch.inference_mode(False), torch.no_grad():
        x = torch.zeros_like(x, memory_format=layout)
        static = _refilled(inputs, iter([_plain(v, x.device).clone() for v in _leaves(inputs)]))
        example = (x, _drawn(loop.plan, x, None), static)
        loop(*example)  # what the model itself raises is raised here
        program: Program = loop
        if mode != "eager":
            try:
                if mode == "cuda graph":
                    return mode, None, _graph(loop, inputs, *example)
                program = _compiled(loop, *example)
            except Exception as error:
                told = " ".join([line.strip() for line in str(error).splitlines() if line.strip()][:2])
                mode, reason = "eager", f"{mode} failed with {type(error).__name__}: {told}"
    return mode, reason, _runner(loop.plan, program, layout, inputs)


def _runner(plan: Plan, program: Program, layout: Any, inputs: Any) -> Callable[..., Tensor]:
    def run(x_T: Tensor, rng: Any, given: Any) -> Tensor:
        # Compiled code is for tensors without gradients, outside of inference mode: others would compile it again.
        with torch.inference_mode(False), torch.no_grad():
            x = _plain(x_T, x_T.device).contiguous(memory_format=layout)
            values = _given_inputs(given, inputs, x.device)
            return program(x, _drawn(plan, x, rng), _refilled(inputs, iter(values)))

    return run


def _plain(v: Any, device: Any) -> Tensor:
    tensor = on_device(v, device)
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _leaves(tree: Any) -> list[Any]:
    """Return the arrays of `inputs`, in order."""
    if isinstance(tree, dict):
        return [leaf for branch in tree.values() for leaf in _leaves(branch)]
    if isinstance(tree, list | tuple):
        return [leaf for branch in tree for leaf in _leaves(branch)]
    if tree is not None:
        kind("inputs", tree, (Tensor, np.ndarray), "a torch.Tensor or numpy.ndarray, or a tuple, list or dict of them,")
    return [] if tree is None else [tree]


def _refilled(tree: Any, leaves: Iterator[Tensor]) -> Any:
    """Return `inputs` with these arrays in place of its own."""
    if isinstance(tree, dict):
        return {key: _refilled(branch, leaves) for key, branch in tree.items()}
    if isinstance(tree, list | tuple):
        made = [_refilled(branch, leaves) for branch in tree]
        return tuple(made) if isinstance(tree, tuple) else made
    return None if tree is None else next(leaves)


def _given_inputs(given: Any, own: Any, device: Any) -> list[Tensor]:
    """Return the arrays of inputs on a device, or if none are given of those that were compiled for.

    Raises
    ------
    ValueError
        Unless they have the shapes and dtypes of those.
    """
    values = [_plain(v, device) for v in _leaves(own if given is None else given)]
    told = [[(tuple(v.shape), v.dtype) for v in arrays] for arrays in (values, [torch.as_tensor(v) for v in _leaves(own)])]
    if told[0] != told[1]:
        raise ValueError(f"inputs have the shapes and dtypes {told[0]}, and {told[1]} were compiled for; compile again for others")
    return values


def _drawn(plan: Plan, x: Tensor, rng: Any) -> Tensor | None:
    """Return the noise of the rows that add some, of shape (rows, *x.shape), as an eager run draws it; zeros without rng."""
    if not plan.stochastic:
        return None
    rows, zero = [row for row in plan.rows if row.keep_z], torch.zeros_like(x, dtype=BACKEND.carry(x.dtype))
    if rng is None:
        return torch.stack([zero for _ in rows])
    add_noise = BACKEND.noise(rng, len(x))
    return torch.stack([add_noise(1.0, zero) for _ in rows])


def _given(noise: Tensor, batch: int) -> AddNoise:
    left = iter(noise.unbind())
    return lambda keep_z, x, i=0: torch.add(x, next(left), alpha=keep_z)


def _convert(model: Any) -> None:
    while isinstance(model, Denoiser):
        model = model.model
    if isinstance(model, torch.nn.Module):
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _compiled(loop: Loop, *example: Any) -> Program:
    def whole(x: Tensor, noise: Any, inputs: Any) -> Tensor:
        return loop(x, noise, inputs)

    # torch counts how often it compiled a code object, and refuses the ninth time; so each loop has one of its own.
    own = FunctionType(whole.__code__.replace(), whole.__globals__, closure=whole.__closure__)
    program = torch.compile(own, fullgraph=True, dynamic=False)
    program(*example)
    return program


@dataclass(frozen=True, eq=False)
class _Graph:
    """A captured loop, with the memory that it reads and writes: graph(x_T, rng, inputs) -> x_0."""

    graph: torch.cuda.CUDAGraph
    plan: Plan
    inputs: Any
    """Those that were compiled for."""
    x: Tensor
    """Where x_T lies."""
    rest: list[Tensor]
    """Where the noise and the inputs lie."""
    x_0: Tensor
    owns: tuple[Any, ...]
    """What must live as long as the graph: the loop with its model, and what was copied from the host."""
    device: torch.cuda.device
    lock: Lock
    done: torch.cuda.Event

    def __call__(self, x_T: Tensor, rng: Any, given: Any) -> Tensor:
        # The device has nothing to do until `replay`, so that whatever the host does before adds to the time of the run.
        x_T = x_T.detach() if x_T.requires_grad else x_T
        values = self._values(rng, given) if self.rest else []
        with self.lock, self.device:
            self.done.wait()  # for the last call, which may be on another stream
            self.x.copy_(x_T)
            for slot, value in zip(self.rest, values, strict=True):
                slot.copy_(value)
            self.graph.replay()
            x_0 = self.x_0.clone()
            self.done.record()
        return x_0

    def _values(self, rng: Any, given: Any) -> list[Tensor]:
        noise = _drawn(self.plan, self.x, rng)
        return [*([] if noise is None else [noise]), *_given_inputs(given, self.inputs, self.x.device)]


def _graph(loop: Loop, inputs: Any, *slots: Any) -> _Graph:
    kept, graph, device = Kept(), torch.cuda.CUDAGraph(), slots[0].device
    loop = replace(loop, backend=fusing(loop.backend, device))
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loop(*slots)  # libraries choose their kernels and take their memory
            with kept.keeping():
                loop(*slots)
            with kept.giving(), _refusing_waits():  # here an error leaves nothing behind, and says what waits
                loop(*slots)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        generator = torch.cuda.default_generators[device.index]
        before = generator.clone_state()
        try:
            with kept.giving(), torch.cuda.graph(graph):
                x_0 = loop(*slots)
        except Exception:
            generator.graphsafe_set_state(before)  # a capture that failed leaves it waiting for a graph
            raise
        x, *rest = _leaves(slots)
        own = (loop, kept, slots)
        return _Graph(graph, loop.plan, inputs, x, rest, x_0, own, torch.cuda.device(device), Lock(), torch.cuda.Event())


@contextmanager
def _refusing_waits() -> Iterator[None]:
    """Let what makes the host wait for the device raise an error."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
