"""What codecs cost and keep: predicted ratio, error and seconds, and when compressing pays.

Symbols: B vectors of a message, d columns, u distinct vectors, h homogenisation at the bound, q bits of the
range of codes, H bits of entropy of a code (L: of the codes of distinct vectors), r bits of a reference.

=============== ==============================================================================
eb_entropy      B d H / 8
eb_lz           B ceil(log2(1 + u')) / 8 + u' d q / 8,    u' = u (1 - h)
eb_lz_entropy   B r / 8 + u' d L / 8
lz              B ceil(log2(1 + u)) / 8 + 4 u d
=============== ==============================================================================

bytes, plus the headers and tables of the layout (``codegen.runtime.codecs.portable``). u at other sizes than
those sampled is read off a straight line in log u over log B. Entropies, ranges and homogenisation come from
samples of real vectors. Vectors that nobody has measured are priced at the most that H can be
(:func:`unmeasured`): no distribution of the same mean square has more entropy than the normal one, for which
H = log2(sigma sqrt(2 pi e) / (2 bound)).

Compressing a message of S bytes over a link of bandwidth w pays when

    S / w > a + S / T_c + S / (R w) + S / T_d,

with T_c, T_d the speeds of encoding and decoding, a the cost of a message, R the ratio; so R must exceed
1 / (1 - w (1 / T_c + 1 / T_d)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cost_models.calibration import Calibration
from ir.compression import (
    CODECS,
    BoundSample,
    CodecName,
    CodecSpeed,
    Direction,
    EmbeddingSample,
    SizeSample,
    fixed_row_bytes,
)
from ir.topology import Topology

# codegen.runtime.codecs: bytes of the frame, of the two counts, and of the head of an array of fixed width
HEADER, COUNTS, ARRAY_HEAD = 32, 8, 5
# codegen.runtime.codecs: states and two lengths, and the states of arrays of 8192 tokens or more
LENGTHS, STATE, NARROW, WIDE, WIDE_FROM = 8, 4, 4, 32, 8192


def bound_of(error: float) -> float:
    """The relative bound whose relative squared error is ``error`` when errors are uniform within it."""
    return math.sqrt(3 * error)


def repetition(sample: EmbeddingSample, rows: float) -> SizeSample:
    """Distinct vectors and reference bits in messages of ``rows`` vectors."""
    sizes = sample.sizes
    if len(sizes) == 1:
        only = sizes[0]
        return SizeSample(
            max(1, round(rows)), min(only.distinct, max(rows, 1)), only.reference_bits, only.reference_table
        )
    at = next((i for i, size in enumerate(sizes[1:-1], 1) if rows <= size.rows), len(sizes) - 1)
    low, high = sizes[at - 1], sizes[at]
    part = math.log(max(rows, 1) / low.rows) / math.log(high.rows / low.rows)
    distinct = low.distinct * (high.distinct / low.distinct) ** part
    return SizeSample(
        max(1, round(rows)),
        min(max(distinct, 1.0), max(rows, 1)),
        max(0.0, low.reference_bits + part * (high.reference_bits - low.reference_bits)),
        max(0.0, low.reference_table + part * (high.reference_table - low.reference_table)),
    )


# what a vector of any distribution can cost: entropies of _BOUNDS, half a bit apart; 352 tokens of two bytes in the
# table of frequencies (codegen.runtime.codecs.portable: ALPHABET); codes as wide as the floats themselves
_BOUNDS = tuple(2.0 ** (half / 2) for half in range(-28, 3))
_LARGEST_TABLE, _WIDEST = 704.0, 32.0
_MANY = 2**30  # vectors of a message, all of them different
_ROUNDING = {"bf16": 2.0**-16}  # 8 significant bits at any magnitude; fp16 would lose small gradients


def unmeasured(name: str, direction: Direction, dim: int) -> EmbeddingSample:
    """What is known of vectors of ``dim`` columns of which there is no sample: the most that codes of them can take.

    Entropy of a code x / (2 bound) rounded, of elements with a mean square of 1: that of the sum of x and an error
    uniform within the bound, at most the normal's, log2(2 pi e (1 + bound^2 / 3)) / 2 - log2(2 bound) (T. Cover and
    J. Thomas, Elements of Information Theory, theorem 8.6.5). Errors are taken as uniform within the bound. Nothing
    repeats. Of the fixed-rate codecs the one whose error does not depend on how large elements are.
    """
    bounds = []
    for bound in _BOUNDS:
        entropy = math.log2(2 * math.pi * math.e * (1 + bound**2 / 3)) / 2 - math.log2(2 * bound)
        bounds.append(
            BoundSample(
                bound=bound,
                entropy=max(0.0, entropy),
                literal_entropy=max(0.0, entropy),
                width=_WIDEST,
                homogenisation=0.0,
                error=bound**2 / 3,
                table=_LARGEST_TABLE,
                literal_table=_LARGEST_TABLE,
            )
        )
    return EmbeddingSample(
        table=name,
        direction=direction,
        dim=dim,
        rms=1.0,
        largest=0.0,
        sizes=(SizeSample(1, 1.0, 0.0), SizeSample(_MANY, float(_MANY), 0.0)),
        bounds=tuple(bounds),
        fixed_error=_ROUNDING,
        origin="not measured: the most that vectors of any distribution take",
    )


def at_bound(sample: EmbeddingSample, bound: float) -> BoundSample:
    """The sample at a relative bound: linear in log2 of the bound between those sampled.

    Beyond them a code loses or gains a bit for each factor of 2.
    """
    bounds = sample.bounds
    if bound <= bounds[0].bound or len(bounds) == 1:
        return _beyond(bounds[0], bound)
    if bound >= bounds[-1].bound:
        return _beyond(bounds[-1], bound)
    at = next(i for i, known in enumerate(bounds) if bound <= known.bound)
    low, high = bounds[at - 1], bounds[at]
    part = math.log(bound / low.bound) / math.log(high.bound / low.bound)

    def between(a: float, b: float) -> float:
        return a + part * (b - a)

    return BoundSample(
        bound=bound,
        entropy=between(low.entropy, high.entropy),
        literal_entropy=between(low.literal_entropy, high.literal_entropy),
        width=between(low.width, high.width),
        homogenisation=between(low.homogenisation, high.homogenisation),
        error=between(low.error / low.bound**2, high.error / high.bound**2) * bound**2,
        table=between(low.table, high.table),
        literal_table=between(low.literal_table, high.literal_table),
    )


def _beyond(known: BoundSample, bound: float) -> BoundSample:
    bits = math.log2(known.bound / bound)
    return BoundSample(
        bound=bound,
        entropy=max(0.0, known.entropy + bits),
        literal_entropy=max(0.0, known.literal_entropy + bits),
        width=min(32.0, max(0.0, known.width + bits)),
        homogenisation=known.homogenisation,
        error=known.error * (bound / known.bound) ** 2,
        table=known.table,
        literal_table=known.literal_table,
    )


def _rans_bytes(values: float, bits: float, table: float) -> float:
    states = NARROW if values < WIDE_FROM else WIDE
    return table + states * STATE + LENGTHS + values * bits / 8


def message_bytes(sample: EmbeddingSample, codec: CodecName, bound: float, rows: float) -> float:
    """Predicted bytes of a message of ``rows`` vectors; never more than uncompressed with its header."""
    known, raw = CODECS[codec], 4.0 * rows * sample.dim
    if codec == "none" or rows <= 0:
        return HEADER + raw
    if known.format:
        return min(HEADER + 4 + rows * fixed_row_bytes(codec, sample.dim), HEADER + raw)
    size = repetition(sample, rows)
    at = at_bound(sample, bound) if known.bounded else None
    distinct = size.distinct * (1 - at.homogenisation) if at else size.distinct
    distinct = max(1.0, distinct) if known.lz else rows
    body = float(COUNTS)
    if known.entropy and at:
        if known.lz:
            body += _rans_bytes(rows, size.reference_bits, size.reference_table)
            body += _rans_bytes(distinct * sample.dim, at.literal_entropy, at.literal_table)
        else:
            body += _rans_bytes(rows * sample.dim, at.entropy, at.table)
    else:
        references = math.ceil(math.log2(1 + distinct)) if distinct > 1 else 0
        body += (
            2 * ARRAY_HEAD + rows * references / 8 + distinct * sample.dim * (at.width if at else 32.0) / 8
        )
    return HEADER + min(body, raw)


def predicted_ratio(sample: EmbeddingSample, codec: CodecName, bound: float, rows: float) -> float:
    """Bytes of the vectors as float32 over bytes of the message."""
    return 4.0 * rows * sample.dim / message_bytes(sample, codec, bound, rows) if rows > 0 else 1.0


def predicted_error(sample: EmbeddingSample, codec: CodecName, bound: float) -> float:
    """Relative squared error of a codec; that of a fixed-rate codec as sampled."""
    if CODECS[codec].bounded:
        return at_bound(sample, bound).error
    return sample.fixed_error.get(codec, math.inf) if CODECS[codec].format else 0.0


# MB/s of encoding and of decoding, and seconds a message costs beyond that, on one core of an x86-64 server with
# AVX-512; vectors of the users of MovieLens, 64 KiB a message: notes of `python benchmarks/codecs.py`
_CPU_SPEEDS: dict[CodecName, tuple[float, float, float]] = {
    "fp16": (1310, 4635, 50e-6),
    "bf16": (1128, 4823, 51e-6),
    "fp8": (532, 1326, 280e-6),
    "int8": (1578, 4344, 33e-6),
    "mx4": (1890, 1434, 269e-6),
    "lz": (1040, 1578, 14e-6),
    "eb_lz": (1103, 3433, 25e-6),
    "eb_entropy": (805, 775, 24e-6),
    "eb_lz_entropy": (788, 1062, 25e-6),
}


def default_speeds(topology: Topology, calibration: Calibration) -> tuple[CodecSpeed, ...]:
    """Speeds for the device kind: those of the calibration; else on CPUs those of one core, which ranks
    share as they share it for the rest; casts at memory bandwidth on GPUs.

    Error-bounded codecs have no GPU kernels here, so they have no default speed there.
    """
    if calibration.codec_speeds:
        return calibration.codec_speeds
    if topology.device.kind == "cpu":
        source = "benchmarks/codecs.py, one x86-64 core"
        shared = calibration.core_sharing
        return tuple(
            CodecSpeed(name, 1e6 * e / shared, 1e6 * d / shared, m * shared, source)
            for name, (e, d, m) in _CPU_SPEEDS.items()
        )
    return library_speeds(topology, calibration)


def library_speeds(topology: Topology, calibration: Calibration) -> tuple[CodecSpeed, ...]:
    """Speeds of fixed-rate codecs that run as single kernels: measured, else casts and scales at memory bandwidth.

    So run FBGEMM's of TorchRec's quantised communication, on CPUs too (``benchmarks/codecs.py``), mx4 excepted there.
    """
    stream = calibration.stream_efficiency * topology.device.tiers[0].read_bandwidth
    source = "modelled: one pass at the memory bandwidth of element-wise kernels"
    found = list(calibration.library_codec_speeds)
    measured = {speed.codec for speed in found}
    names: tuple[CodecName, ...] = ("fp16", "bf16", "fp8", "int8", "mx4")
    for name in names:
        if name in measured:
            continue
        # bytes read and written for each byte of float32; a scale needs the row to be read once more
        moved = 1 + fixed_row_bytes(name, 32) / 128 + (0 if name in ("fp16", "bf16") else 1)
        seconds = calibration.kernel_seconds * 2  # one kernel on each side
        found.append(CodecSpeed(name, stream / moved, stream / moved, seconds, source))
    return tuple(found)


def speed_of(speeds: Sequence[CodecSpeed], codec: CodecName) -> CodecSpeed | None:
    """The speed of a codec, None where it is not known; several entries: the slowest rank's."""
    found = [speed for speed in speeds if speed.codec == codec]
    if not found:
        return None
    return CodecSpeed(
        codec,
        min(speed.encode for speed in found),
        min(speed.decode for speed in found),
        max(speed.message for speed in found),
        found[0].source,
    )
