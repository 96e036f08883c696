"""How a decoder is served: tensor, context and pipeline ranks, ring algorithm, weight and cache formats.

Rank ``r`` has the coordinates of a mixed-radix number, innermost first: tensor, context, pipeline. Tensor ranks
split heads and feed-forward width; context ranks hold the same weights and split every sequence; pipeline ranks
hold consecutive layers and work one after another on a request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from ir.decoder import DecoderShape, Positive
from ir.reading import STRICT

WeightFormat = Literal["bf16", "fp8_row"]
"""``fp8_row``: feed-forward weights and their inputs in row-wise scaled FP8, everything else bf16, as Llama 3 is
served (arXiv 2407.21783, section 6.2, which also keeps the first and the last layer in bf16)."""

CacheFormat = Literal["bf16", "fp8"]
Exchange = Literal["none", "pass_kv", "pass_q", "pass_q_eager", "all_gather"]
Tokens = Annotated[int, Field(ge=0, le=2**40)]
Time = Annotated[float, Field(gt=0)]


@dataclass(frozen=True, slots=True)
class ServingRequest:
    """What is served and how fast it must be; None leaves a decision to the planner."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    new: Positive = 128_000  # tokens of a prompt that are not in the cache
    cached: Tokens = 0  # tokens before them whose keys and values are kept (persistent KV)
    batch: Positive = 1  # sequences that are decoded together
    output: Positive = 1024  # tokens the cache must have room for after the prompt
    ttft: Time | None = None  # seconds to the first token, at most; None: no target
    ttit: Time | None = None  # seconds between tokens, at most
    tensor: Positive | None = None
    context: Positive | None = None
    pipeline: Positive | None = None
    weights: Annotated[tuple[WeightFormat, ...], Field(min_length=1)] = ("fp8_row", "bf16")
    cache: Annotated[tuple[CacheFormat, ...], Field(min_length=1)] = ("bf16",)  # fp8 changes attention


@dataclass(frozen=True, slots=True)
class ServingLayout:
    """One way to serve."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    tensor: Positive
    context: Positive
    pipeline: Positive
    weights: WeightFormat
    cache: CacheFormat

    @property
    def ranks(self) -> int:
        """Devices of one replica."""
        return self.tensor * self.context * self.pipeline

    @property
    def label(self) -> str:
        """``"TP8 CP2 PP1, fp8_row weights, bf16 cache"``."""
        degrees = f"TP{self.tensor} CP{self.context} PP{self.pipeline}"
        return f"{degrees}, {self.weights} weights, {self.cache} cache"


@dataclass(frozen=True, slots=True)
class ServedLayout:
    """A layout with what it is modelled to do for the request."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    layout: ServingLayout
    exchange: Exchange  # of the prompt's attention
    ttft: float  # seconds
    ttit: float  # seconds
    memory: int  # bytes of a device
    note: str = ""  # why it is not the chosen one


@dataclass(frozen=True, slots=True)
class Crossover:
    """With so many tokens in all, which exchange for how many new ones.

    ``pass_kv_from``: fewest new tokens from which pass-KV is chosen at every length above; None: never.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    total: Positive  # new and cached tokens
    pass_kv_from: Tokens | None
    full: Exchange  # for a prompt of ``total`` tokens without a cache, all-gather allowed
    one: Exchange  # for one new token


@dataclass(frozen=True, slots=True)
class Serving:
    """The decision."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    model: DecoderShape
    request: ServingRequest
    chosen: ServedLayout
    replicas: Positive  # copies of the layout that the topology holds
    prefill: dict[str, float]  # seconds by purpose; add up to the time to the first token
    decode: dict[str, float]  # the same of the time between tokens
    memory: dict[str, int]  # bytes of a device by purpose
    longest: Tokens  # tokens of one sequence that fit beside the weights
    crossovers: tuple[Crossover, ...]  # by total tokens; empty without context ranks
    alternatives: tuple[ServedLayout, ...]
    evaluated: Positive  # layouts priced
    too_large: Tokens  # of them: do not fit in memory
    too_slow: Tokens  # of the others: miss a target
