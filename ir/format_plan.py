"""Number formats: what is asked (:class:`FormatRequest`) and what was decided (:class:`FormatPlan`).

Names of tensors, used by sensitivities, rules and decisions alike:

=================== ======================================================================
``<table>``         weights of an embedding table
``<table>.state``   optimizer state of a table (training)
``<op>.weight``     weight of a GEMM op, ``<op>`` its name in the captured graph
``<op>.input``      the activation that the GEMM op reads
``<op>.kv``         keys and values that an attention op caches
``traffic.forward`` pooled embeddings on the wire
``traffic.backward`` their gradients on the wire
=================== ======================================================================

A format is named by its id (:func:`ir.formats.parse_format`). Losses add up over tensors: the predicted
increase of the training loss (or of whatever metric the sensitivities were measured in) when one tensor
alone is stored in a format. With ``traffic``, ``activation`` and ``kv_cache`` tensors only what a kernel or
a codec exists for is offered unless ``kernels`` is "emulate".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field

from ir.errors import InputError
from ir.formats import parse_format
from ir.reading import STRICT

TensorKind = Literal["table", "state", "weight", "activation", "kv_cache", "traffic"]
FormatObjective = Literal["step", "memory", "loss"]


def _known(text: str) -> str:
    try:
        return parse_format(text).id
    except InputError as error:
        raise ValueError(str(error)) from None


FormatId = Annotated[str, AfterValidator(_known)]


@dataclass(frozen=True, slots=True)
class LossChange:
    """Predicted increase of the loss when one tensor takes one format."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    mean: float
    stderr: Annotated[float, Field(ge=0)] = 0.0


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Loss increase by tensor and format; tensors or formats that are missing are estimated data-free.

    Attributes:
        tensors: tensor name -> format id -> change.
        method: how it was measured: "qsnr", "fisher", "loss change".
        metric: unit of the means, such as "log-loss".
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    tensors: dict[str, dict[FormatId, LossChange]] = field(default_factory=dict)
    method: str = "qsnr"
    metric: str = "relative squared error"
    source: str = ""


@dataclass(frozen=True, slots=True)
class FormatRequest:
    """What the format pass shall do; every bound that is given holds together with the others.

    Attributes:
        objective: "step" minimises predicted step time, "memory" bytes of all tensors that get a format,
            "loss" the predicted increase of the loss (then give a bound on bits, bytes or seconds).
        max_loss: accuracy budget, in the metric of the sensitivities.
        average_bits: bound on stored bits per element over all tables and GEMM weights.
        max_bytes: bound on bytes of all tables (with optimizer state) and GEMM weights, all copies counted
            once.
        max_step: bound on the predicted step objective, seconds.
        formats: what may be used, by kind of tensor; a kind that is missing takes its documented menu.
        rules: glob over tensor names -> the formats allowed there (one format pins it); the last rule
            that matches decides.
        groups: each a tuple of globs whose tensors must take the same format (QKV, fused tables).
        kernels: "native" offers a format only where the topology's devices have a kernel that reads it (or
            where dequantising first is priced); "emulate" offers every format and prices the bits as if a
            kernel existed, for studies of accuracy and of future devices.
        sensitivity: loss increases; None estimates all of them from the formats' QSNR.
        pareto: number of further budgets to solve for, for a sweep from the widest to the narrowest plan.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    objective: FormatObjective = "step"
    max_loss: Annotated[float, Field(ge=0)] | None = None
    average_bits: Annotated[float, Field(gt=0)] | None = None
    max_bytes: Annotated[int, Field(gt=0)] | None = None
    max_step: Annotated[float, Field(gt=0)] | None = None
    formats: dict[TensorKind, Annotated[tuple[FormatId, ...], Field(min_length=1)]] = field(
        default_factory=dict
    )
    rules: dict[str, Annotated[tuple[FormatId, ...], Field(min_length=1)]] = field(default_factory=dict)
    groups: tuple[Annotated[tuple[str, ...], Field(min_length=1)], ...] = ()
    kernels: Literal["native", "emulate"] = "native"
    sensitivity: Sensitivity | None = None
    pareto: Annotated[int, Field(ge=0, le=64)] = 0


@dataclass(frozen=True, slots=True)
class TensorFormat:
    """The decision for one tensor."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: str
    kind: TensorKind
    format: FormatId
    elements: Annotated[float, Field(ge=0)]
    bits: Annotated[float, Field(gt=0)]  # stored bits per element, scales and padding included
    loss: float  # predicted increase
    stderr: Annotated[float, Field(ge=0)] = 0.0
    emulated: bool = False  # no kernel reads the format on this device
    runner_up: str = ""  # the format it would take next
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ParetoPoint:
    """One solution of the sweep; ``bound``: no plan within ``budget`` has a smaller objective."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    budget: float
    objective: float
    bound: float
    loss: float
    average_bits: float


@dataclass(frozen=True, slots=True)
class FormatPlan:
    """The formats of all tensors (section ``decisions.formats``).

    ``objective`` and ``lower_bound`` are in the unit of ``objective_name``: seconds, bytes or loss.
    ``TablePlan.format`` repeats the format of a table, for the cost models.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    objective_name: FormatObjective
    objective: float
    lower_bound: float
    loss: float  # predicted increase, all tensors together
    stderr: Annotated[float, Field(ge=0)]
    average_bits: float  # over tables and GEMM weights
    bytes: Annotated[float, Field(ge=0)]  # of tables, their state and GEMM weights
    cast_seconds: Annotated[float, Field(ge=0)]  # quantising and dequantising at boundaries, a step
    sensitivity: str  # how the losses were estimated, and their metric
    tensors: tuple[TensorFormat, ...]
    loss_price: float = 0.0  # fall of the objective per unit of accuracy budget (dual of the bound)
    pareto: tuple[ParetoPoint, ...] = ()

    def format_of(self, name: str) -> str | None:
        """The format of the tensor called ``name``; None when no format was decided for it."""
        return next((tensor.format for tensor in self.tensors if tensor.name == name), None)

    @property
    def gap(self) -> float:
        """(objective - lower bound) / objective, a fraction of 1."""
        return 0.0 if self.objective <= 0 else max(0.0, 1 - self.lower_bound / self.objective)
