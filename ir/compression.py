"""Compression of embedding traffic: the codecs, what is measured of a table, what is asked and decided.

A message is what one rank sends to another for one table and direction: ``rows`` vectors of ``dim`` float32.
Bounds are relative: the largest error of any element, as a fraction of the root mean square (rms) of the
message's finite elements. So a bound keeps its meaning while weights and gradients change size, and with
errors uniform in [-bound, bound] the relative squared error is ``bound**2 / 3``.

The two levels follow arXiv 2407.04272 (SC'24): a bound for each table by its class, and a factor that decays
over the first iterations. Bounds, thresholds and classes are this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, ConfigDict, Field

from ir.errors import InputError
from ir.reading import STRICT

CodecName = Literal[
    "none", "fp16", "bf16", "fp8", "int8", "mx4", "lz", "eb_lz", "eb_entropy", "eb_lz_entropy"
]
Direction = Literal["forward", "backward"]
Engine = Literal["exchange", "torchrec"]
WantedEngine = Literal["exchange", "torchrec", "fastest"]
TableClass = Literal["wide", "middle", "narrow"]

PHASE_OF: dict[Direction, str] = {"forward": "output_dist", "backward": "gradient_dist"}


@dataclass(frozen=True, slots=True)
class Codec:
    """What a codec does to a message.

    Attributes:
        number: on the wire.
        lz: repeated vectors are sent once.
        entropy: codes are entropy coded; without it they have a fixed width.
        bounded: the error of every element is at most a bound that the sender chooses.
        format: the number format of a fixed-rate codec (:mod:`ir.formats`), else empty.
    """

    number: int
    lz: bool = False
    entropy: bool = False
    bounded: bool = False
    format: str = ""


CODECS: dict[CodecName, Codec] = {
    "none": Codec(0),
    "fp16": Codec(1, format="fp16"),
    "bf16": Codec(2, format="bf16"),
    "fp8": Codec(3, format="fp8_row"),
    "int8": Codec(4, format="int8_fused"),  # FBGEMM's fused 8-bit rows, TorchRec's int8
    "mx4": Codec(5, format="mxfp4_e2m1:even:away"),  # FBGEMM's quantize_mx, TorchRec's mx4
    "lz": Codec(6, lz=True),  # lossless
    "eb_lz": Codec(7, lz=True, bounded=True),
    "eb_entropy": Codec(8, entropy=True, bounded=True),
    "eb_lz_entropy": Codec(9, lz=True, entropy=True, bounded=True),
}


def codec_of(name: str) -> Codec:
    """The codec called ``name``; raises InputError."""
    codec = CODECS.get(name)  # type: ignore[call-overload]
    if codec is None:
        raise InputError(f"codec {name!r} is not known; use one of {', '.join(CODECS)}")
    assert isinstance(codec, Codec)
    return codec


def fixed_row_bytes(name: CodecName, dim: int) -> float:
    """Bytes of one vector under a fixed-rate codec (or none); raises InputError for the others.

    fp8 4 more for its scale; int8 8 more (fp32 scale and bias); mx4 17 bytes for 32 elements.
    """
    if name == "none":
        return 4.0 * dim
    if name in ("fp16", "bf16"):
        return 2.0 * dim
    if name == "fp8":
        return dim + 4.0
    if name == "int8":
        return dim + 8.0
    if name == "mx4":
        return dim * 17 / 32
    raise InputError(f"codec {name!r} has no fixed rate")


def torchrec_row_bytes(name: CodecName, dim: int) -> float:
    """Bytes of one vector under TorchRec's quantised communication; raises InputError for other codecs.

    Unlike here, int8 has rows of 32 elements and fp8 no scale (source: fbgemm_gpu.quantize_comm 1.8,
    ROW_DIM_DEFAULT and calc_quantized_size).
    """
    if name == "int8":
        return dim * 40 / 32
    if name == "fp8":
        return float(dim)
    return fixed_row_bytes(name, dim)


def torchrec_refuses(name: CodecName, device: str, row_split: bool) -> str:
    """Why TorchRec 1.8 does not run a codec as it is named; empty if it does.

    ``row_split``: a table of the exchange has its rows split, so that outputs are summed on the way.
    """
    if name not in ("none", "fp16", "bf16", "fp8", "int8", "mx4"):
        return "TorchRec's messages have a fixed size"
    if device == "cpu" and name == "fp8":
        return "FBGEMM has no fp8 kernel for CPUs"
    if row_split and name in ("fp8", "int8", "mx4"):
        return "sums over row blocks are exchanged, for which TorchRec has fp16 and bf16 only"
    return ""


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
RelativeBound = Annotated[float, Field(gt=0, le=4)]


@dataclass(frozen=True, slots=True)
class SizeSample:
    """Repetition among the vectors of messages of one size."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    rows: Annotated[int, Field(ge=1)]  # vectors of a message
    distinct: Annotated[float, Field(ge=1)]  # different ones among them, mean
    reference_bits: NotNegative  # entropy of the reference of one vector
    reference_table: NotNegative = 0.0  # bytes of the table of frequencies of references


@dataclass(frozen=True, slots=True)
class BoundSample:
    """The codes that one bound makes of a sample."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    bound: RelativeBound
    entropy: NotNegative  # bits of one code, all vectors
    literal_entropy: NotNegative  # bits of one code, distinct vectors only
    width: Annotated[float, Field(ge=0, le=32)]  # bits of the range of codes, mean
    homogenisation: Annotated[float, Field(ge=0, le=1)]  # share of distinct vectors lost by quantising
    error: NotNegative  # relative squared error
    table: NotNegative = 0.0  # bytes of the table of frequencies, all vectors
    literal_table: NotNegative = 0.0  # the same, distinct vectors only


def _rising(sizes: tuple[SizeSample, ...]) -> tuple[SizeSample, ...]:
    rows = [size.rows for size in sizes]
    if rows != sorted(set(rows)):
        raise ValueError("sizes must rise")
    return sizes


def _rising_bounds(bounds: tuple[BoundSample, ...]) -> tuple[BoundSample, ...]:
    values = [sample.bound for sample in bounds]
    if values != sorted(set(values)):
        raise ValueError("bounds must rise")
    return bounds


@dataclass(frozen=True, slots=True)
class EmbeddingSample:
    """What was measured of one table's traffic in one direction (:mod:`codegen.runtime.codecs.sampling`)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    table: str
    direction: Direction
    dim: Annotated[int, Field(ge=1)]
    rms: NotNegative  # root mean square of the elements
    largest: NotNegative  # largest magnitude
    sizes: Annotated[tuple[SizeSample, ...], Field(min_length=1), AfterValidator(_rising)]
    bounds: Annotated[tuple[BoundSample, ...], Field(min_length=1), AfterValidator(_rising_bounds)]
    fixed_error: dict[str, NotNegative]  # relative squared error of each fixed-rate codec
    origin: str = ""  # "12 batches of 1024, after 300 steps"


@dataclass(frozen=True, slots=True)
class CodecSpeed:
    """What one codec costs a rank, in bytes of uncompressed data."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    codec: CodecName
    encode: Positive  # bytes/s
    decode: Positive  # bytes/s
    message: NotNegative  # seconds for each message beyond that, both sides together
    source: str = ""


@dataclass(frozen=True, slots=True)
class Decay:
    """The iteration-wise level: bounds are multiplied by a factor that falls from ``start`` to 1 in steps."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    start: Annotated[float, Field(ge=1, le=64)] = 1.0
    steps: Count = 0  # training steps until the factor is 1
    stages: Annotated[int, Field(ge=1, le=100)] = 4  # equal parts of ``steps``, each with its own factor

    def factor(self, step: int) -> float:
        """The factor at training step ``step``, counted from 0: start^(1 - i / stages) in stage i."""
        if step >= self.steps:
            return 1.0
        stage = max(0, step) * self.stages // self.steps
        return float(self.start ** (1 - stage / self.stages))


@dataclass(frozen=True, slots=True)
class CompressionRequest:
    """What the user asks of the compression pass.

    ``error_budget`` and ``gradient_budget`` are relative squared errors (noise over signal power,
    10^(-QSNR/10)) of each table's outputs and gradients, number formats and codec together;
    ``format_error`` (globs over tables) says how much of the first the formats have used already.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    samples: tuple[EmbeddingSample, ...] = ()
    speeds: tuple[CodecSpeed, ...] = ()  # measured on the ranks; default: the cost model's
    error_budget: NotNegative = 1e-3  # 30 dB: between fp8 (31) and int4 (21 dB on normal draws)
    gradient_budget: NotNegative = 1e-3
    format_error: dict[str, NotNegative] = field(default_factory=dict)
    codecs: Annotated[tuple[CodecName, ...], Field(min_length=1)] = tuple(CODECS)
    engine: WantedEngine = "exchange"  # "torchrec": one fixed-rate codec a direction, by TorchRec itself
    decay: Decay = field(default_factory=Decay)
    ratio_margin: Annotated[float, Field(ge=0, lt=1)] = 0.15  # predicted ratios are trusted less this


@dataclass(frozen=True, slots=True)
class TableCompression:
    """The decision for one table and direction; ratio and error are those after the decay."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    table: str  # or "tower 0": all that the module of a tower sends (ir.towers.sent_name)
    direction: Direction
    codec: CodecName
    bound: NotNegative  # of each element, relative to the message's rms; 0 where the codec has none
    table_class: TableClass
    ratio: Positive  # predicted uncompressed bytes / bytes
    error: NotNegative  # predicted relative squared error
    budget: NotNegative  # what was left of the budget for it
    link: NotNegative  # seconds on the link, one rank's message to every peer, compressed
    coding: NotNegative  # seconds of encoding and decoding them
    uncompressed: NotNegative  # seconds on the link without compression
    verdict: str


@dataclass(frozen=True, slots=True)
class ExchangeCompression:
    """What compression does to one exchange of the modelled step, on its slowest rank."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    direction: Direction
    uncompressed: NotNegative  # seconds
    link: NotNegative  # seconds on the link, compressed
    coding: NotNegative  # seconds of encoding, decoding and of exchanging sizes
    used: bool

    @property
    def phase(self) -> str:
        """Name of the phase of the step."""
        return PHASE_OF[self.direction]

    @property
    def factor(self) -> float:
        """Compressed over uncompressed seconds; 1 where compression is not used."""
        if not self.used or self.uncompressed <= 0:
            return 1.0
        return (self.link + self.coding) / self.uncompressed


@dataclass(frozen=True, slots=True)
class Compression:
    """The compression section of a plan."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    engine: Engine
    decay: Decay
    tables: tuple[TableCompression, ...]
    exchanges: tuple[ExchangeCompression, ...]

    def of(self, table: str, direction: Direction) -> TableCompression | None:
        """The decision for one table and direction, None where there is none."""
        found = (t for t in self.tables if t.table == table and t.direction == direction)
        return next(found, None)

    def uses(self, direction: Direction) -> bool:
        """Whether the exchange of this direction is compressed at all."""
        return any(e.used for e in self.exchanges if e.direction == direction)
