"""What is chosen on the page, checked, as a plan and as the Python code that makes the same pictures."""

from __future__ import annotations

import math
import re
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..arguments import kind, number, one_of, shown, whole
from ..grids import PHASES
from ..methods import make_plan
from ..methods.registry import REGISTRY
from ..methods.runge_kutta import TABLEAUX
from ..model.load import read_options
from ..model.pretrained import Pretrained
from ..plan import Plan
from ..sde import Schedule

OWN = "the method's own"
CALIBRATED = "calibrated"
METHODS = tuple(entry.name for entry in REGISTRY)
GRIDS = (OWN, *PHASES)
MOST_NFE, MOST_PICTURES, MOST_DEGREE, MOST_GUIDANCE, MOST_SEED = 100, 16, 9, 10, 10**6
_FIELDS = ("sde", "method", "name", "num_step", "ts_phase", "ts_order", "nfe", "ts", "sigmas", "direction")
"""The arguments of `deis.make_plan` that are no options of a method."""
_ONE_AT_A_TIME = threading.Lock()
"""Whoever records warnings changes what all threads do with them."""


def bounded(argument: str, value: Any, least: int, most: int) -> int:
    """Return a whole number within bounds.

    Raises
    ------
    ValueError
        Where it is none, or lies outside.
    """
    return int(number(argument, whole(argument, value, least), most=most, hint="the lab takes no more"))


@dataclass(frozen=True)
class Choice:
    """How to sample.

    Attributes
    ----------
    method : str
        A registered name, such as "tab<q>", or "calibrated" for the model's own plans.
    degree : int
        The number that stands for <q>.
    tableau : str
        The name that stands for <tableau>.
    grid : str
        One of `GRIDS`.
    power : float, optional
        The power of the grid.
    nfe : int
        Network evaluations, 1 ... 100.
    options : mapping
        Options of the method by name: numbers, True, False, None or words.

    Raises
    ------
    ValueError, TypeError
        For a value outside these; it says what to give.
    """

    method: str = "auto"
    degree: int = 3
    tableau: str = "2heun"
    grid: str = OWN
    power: float | None = None
    nfe: int = 10
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        one_of("method", self.method, (*METHODS, CALIBRATED))
        one_of("grid", self.grid, GRIDS)
        set_ = object.__setattr__
        set_(self, "nfe", bounded("nfe", self.nfe, 1, MOST_NFE))
        if "<q>" in self.method:
            set_(self, "degree", bounded("degree", self.degree, 0, MOST_DEGREE))
        if "<tableau>" in self.method:
            one_of("tableau", self.tableau, TABLEAUX)
        if self.power is not None:
            set_(self, "power", number("power", self.power, above=0))
        for name, value in self.options.items():
            _check_option(name, value)

    @classmethod
    def read(cls, *, power: Any = "", options: Any = "", **values: Any) -> Choice:
        """Return the choice of what stands in the fields of the page, where power and options are text.

        Raises
        ------
        ValueError, TypeError
            As the class, and for a power that is no number, or options that are not NAME=VALUE.
        """
        kind("options", options, str, "text, such as eta=0.5,")
        texts = [text for text in re.split(r"[,\s]+", options) if text]
        return cls(power=_power(power), options=read_options(texts), **values)

    @property
    def name(self) -> str:
        """The method as `deis.make_plan` takes it, such as "tab3"."""
        return self.method.replace("<q>", str(self.degree)).replace("<tableau>", self.tableau)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of `deis.make_plan` behind the method."""
        grid = {} if self.grid == OWN else {"ts_phase": self.grid}
        power = {} if self.power is None else {"ts_order": self.power}
        return {"nfe": self.nfe, **grid, **power, **self.options}

    def plan(self, model: Pretrained) -> tuple[Plan, list[str]]:
        """Return the plan for a model, and what the library warns of; see `plan_on`.

        Raises
        ------
        ValueError
            For a budget that the method cannot meet, an option that it does not have, a grid that the schedule does not have, or
            calibrated plans where the model has none for the budget, or with a grid or options.
        """
        if self.method != CALIBRATED:
            return self.plan_on(model.sde)
        if self.arguments.keys() != {"nfe"}:
            raise ValueError("a calibrated plan has its own times and coefficients; leave grid, power and options empty")
        if self.nfe not in model.plans:
            own = ", ".join(map(str, sorted(model.plans)))
            have = f"its own plans are of {own} evaluations" if own else "this model has no plans of its own"
            raise ValueError(f"nfe={self.nfe}: {have}; choose one of them, or another method")
        return model.plans[self.nfe], []

    def plan_on(self, sde: Schedule) -> tuple[Plan, list[str]]:
        """Return the plan for a schedule, and what the library warns of.

        Raises
        ------
        ValueError
            As `plan`.
        """
        with _ONE_AT_A_TIME, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan = make_plan(sde, self.name, **self.arguments)
        return plan, [str(warning.message) for warning in caught]

    def code(self) -> str:
        """Return the Python expression of the plan for `model`."""
        if self.method == CALIBRATED:
            return f"model.plan({self.nfe})"
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"deis.make_plan(model.sde, {self.name!r}, {arguments})"


def _power(text: Any) -> float | None:
    """Return the power in a field of text; None where it is empty."""
    if text is None or not str(text).strip():
        return None
    try:
        return float(str(text))
    except ValueError:
        message = f"power={shown(text)} must be a number greater than 0, such as 2 or 7; leave it empty for the grid's own"
        raise ValueError(message) from None


def _check_option(name: str, value: Any) -> None:
    if name in _FIELDS:
        raise ValueError(f"option {name!r} is no option of a method: it has a field of its own on the page, or none")
    if not (value is None or isinstance(value, bool | int | float | str)):
        raise ValueError(f"option {name}={shown(value)} must be a number, true, false, null or a word")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"option {name}={value!r} must be finite")


@dataclass(frozen=True)
class Request:
    """Which pictures to make.

    Attributes
    ----------
    choice : Choice
    model : str
        A name of `deis.lab.library.Library`.
    guidance : float
        The weight of classifier-free guidance, 0 ... 10; 1 is none.
    label : int, optional
        The class of every picture; without it each class in turn.
    prompt : str
        What a model of text is asked for; other models take no notice.
    seed : int
        Picture i depends on the seed and on i alone; 0 ... 1,000,000.
    num : int
        Pictures, 1 ... 16.

    Raises
    ------
    ValueError
        For a number outside these.
    """

    choice: Choice
    model: str
    guidance: float = 1.0
    label: int | None = None
    prompt: str = ""
    seed: int = 0
    num: int = 10

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "guidance", number("guidance", self.guidance, least=0, most=MOST_GUIDANCE, hint="1 is none"))
        set_(self, "seed", bounded("seed", self.seed, 0, MOST_SEED))
        set_(self, "num", bounded("pictures", self.num, 1, MOST_PICTURES))
        kind("prompt", self.prompt, str, "text")

    def labels(self, model: Pretrained) -> list[Any] | None:
        """Return the class of each picture, or the prompt of each; None for a model without either.

        Raises
        ------
        ValueError
            For a class that the model does not have.
        """
        if model.embed is not None:
            return [self.prompt] * self.num
        if model.num_classes is None:
            if self.label is not None:
                raise ValueError(f"class={self.label!r} was chosen, and this model has no classes; choose none")
            return None
        if self.label is None:
            return [i % model.num_classes for i in range(self.num)]
        return [bounded("class", self.label, 0, model.num_classes - 1)] * self.num
