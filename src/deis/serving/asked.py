"""What a request asks for in JSON, checked; and the plans of requests, each made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any, Literal

from ..arguments import shown
from ..extras import needs
from ..methods import make_plan
from ..methods.registry import find
from ..model.pretrained import Pretrained
from ..plan import Plan

with needs("serve", "deis serve"):
    from pydantic import BaseModel, ConfigDict, Field

MOST_NFE = 100
"""The most evaluations that a request may ask for."""
_PLANS = 256


class Asked(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    nfe: Annotated[int, Field(ge=1, le=MOST_NFE, description="Network evaluations.")] = 10
    method: Annotated[str | None, Field(description="As for deis.make_plan; without it auto, or the model's own plan.")] = None
    options: Annotated[dict[str, bool | int | float | str | None], Field(max_length=16, description="Of the method.")] = {}
    label: Annotated[int | None, Field(alias="class", description="Of every picture; without it each class in turn.")] = None
    prompt: Annotated[str | None, Field(max_length=2000, description="Of a model of text.")] = None
    guidance: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False, description="Classifier-free; 1 is none.")] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Picture i depends on the seed and on i alone.")] = 0
    num: Annotated[int, Field(ge=1, description="Pictures.")] = 1
    format: Annotated[Literal["png", "npy"], Field(description="One picture, or the numbers, (num, c, h, w).")] = "png"

    def labels(self, model: Pretrained) -> list[Any] | None:
        """Return what the network is conditioned on, one entry a picture.

        Raises
        ------
        ValueError
            If a prompt is missing, or the model takes no prompt or no class.
        """
        if (model.embed is None) != (self.prompt is None):
            does = "takes none; leave it out" if model.embed is None else "is one of text; give one"
            raise ValueError(f"prompt={shown(self.prompt)}, and this model {does}")
        if self.label is not None and (model.num_classes is None or model.embed is not None):
            raise ValueError(f"class={self.label}, and this model has no classes; leave it out")
        if model.embed is not None:
            return [self.prompt] * self.num
        if model.num_classes is None:
            return None
        return [i % model.num_classes if self.label is None else self.label for i in range(self.num)]


def planner(model: Pretrained) -> Callable[[Asked], Plan]:
    """Return the function from a request to its plan, which makes each plan once and keeps the last ones.

    It raises ValueError where `deis.make_plan` does, and for an option that the method does not have.
    """

    @lru_cache(maxsize=_PLANS)
    def made(method: str, nfe: int, options: str) -> Plan:
        found: dict[str, Any] = json.loads(options)
        known = find(method)[0].options_of(method)
        if others := sorted(found.keys() - known.keys()):  # deis.make_plan has arguments that are none, such as the schedule
            raise ValueError(f"options={others} are unknown; those of the method {method!r} are {', '.join(known) or 'none'}")
        return make_plan(model.sde, method, nfe=nfe, **found)

    def plan_of(asked: Asked) -> Plan:
        own = asked.method is None and not asked.options and asked.guidance == 1
        if own and asked.nfe in model.plans:
            return model.plans[asked.nfe]
        return made(asked.method or "auto", asked.nfe, json.dumps(asked.options, sort_keys=True))

    return plan_of
