"""The legal layouts of a decoder's training, and how its layers are divided over pipeline stages.

Rules, each with the name that errors use:

    world          tensor x context x pipeline x data = ranks
    heads          tensor divides the query heads, and divides or is a multiple of the key-value heads
    ffn            tensor divides the feed-forward width
    sequence       2 context divides the sequence (the balanced halves of a causal mask), and tensor the tokens
                   of a rank (sequence parallelism)
    layers         each chunk but the first and the last has a layer
    batch          data x micro_batch divides the sequences of a step
    schedule       virtual stages divide a rank's layer slots and need an interleaved schedule; N is the
                   pipeline, twice it or all micro-batches, and divides them
    replicate      divides the data ranks. Left free, the state is sharded over all of them, or over those
                   within one domain of a level of the topology (hybrid sharding), which is where it can pay
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

from ir.decoder import DecoderShape
from ir.parallelism import RECOMPUTE, SCHEDULES, Layout, ParallelismConstraints, Schedule, Zero

ZERO: tuple[Zero, ...] = (1, 2, 3)
Degrees = tuple[int, int, int, int, int]
"""tensor, context, pipeline, data, micro-batch."""


@lru_cache(maxsize=4096)
def divisors(number: int) -> tuple[int, ...]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def _allowed(values: tuple[int, ...], fixed: int | None) -> tuple[int, ...]:
    return values if fixed is None else tuple(v for v in values if v == fixed)


def degrees(
    shape: DecoderShape, sequence: int, sequences: int, world: int, rules: ParallelismConstraints
) -> Iterator[Degrees]:
    """Every legal product of degrees with every legal micro-batch."""
    for tensor in _allowed(divisors(world), rules.tensor):
        if not tensor_fits(shape, tensor):
            continue
        for context in _allowed(divisors(world // tensor), rules.context):
            if sequence % (2 * context if context > 1 else 1) or sequence // context % tensor:
                continue
            for pipeline in _allowed(divisors(world // (tensor * context)), rules.pipeline):
                data = world // (tensor * context * pipeline)
                if pipeline > shape.layers + 2 or sequences % data or rules.data not in (None, data):
                    continue
                for micro_batch in _allowed(divisors(sequences // data), rules.micro_batch):
                    yield tensor, context, pipeline, data, micro_batch


def tensor_fits(shape: DecoderShape, tensor: int) -> bool:
    """Whether heads and feed-forward width divide over ``tensor`` ranks."""
    shared = shape.kv_heads % tensor == 0 or tensor % shape.kv_heads == 0
    return shape.heads % tensor == 0 and shape.ffn % tensor == 0 and shared


def copies(made: Degrees, rules: ParallelismConstraints, domains: tuple[int, ...]) -> tuple[int, ...]:
    """Numbers of copies of the sharded state to try; ``domains``: ranks of a domain of each level."""
    tensor, context, pipeline, data, _ = made
    if rules.replicate is not None:
        return (rules.replicate,) if data % rules.replicate == 0 else ()
    stride = tensor * context * pipeline
    inside = {min(data, size // stride) for size in domains if size >= stride}
    return tuple(sorted({1, *(data // m for m in inside if data % m == 0 and context * m > 1)}))


def layouts(
    shape: DecoderShape,
    sequences: int,
    made: Degrees,
    rules: ParallelismConstraints,
    replications: tuple[int, ...] = (1,),
) -> Iterator[Layout]:
    """Every legal layout of the degrees."""
    tensor, context, pipeline, data, micro_batch = made
    count = sequences // (data * micro_batch)
    for schedule, stages, run, slots in _schedules(shape.layers, pipeline, count, *_choices(rules)):
        for recompute in rules.recompute or RECOMPUTE:
            for zero, replicate in product(rules.zero or ZERO, replications):
                yield Layout(
                    tensor=tensor,
                    context=context,
                    pipeline=pipeline,
                    data=data,
                    micro_batch=micro_batch,
                    micro_batches=count,
                    schedule=schedule,
                    virtual_stages=stages,
                    contiguous=run,
                    recompute=recompute,
                    zero=zero,
                    slots=slots,
                    replicate=replicate,
                )


def count_layouts(
    shape: DecoderShape,
    sequences: int,
    made: Degrees,
    rules: ParallelismConstraints,
    replications: tuple[int, ...] = (1,),
) -> int:
    """How many :func:`layouts` there are, without making them."""
    schedules = _schedules(shape.layers, made[2], sequences // (made[3] * made[4]), *_choices(rules))
    return len(schedules) * len(rules.recompute or RECOMPUTE) * len(rules.zero or ZERO) * len(replications)


def _choices(rules: ParallelismConstraints) -> tuple[tuple[Schedule, ...], int | None, int | None]:
    return rules.schedules or SCHEDULES, rules.virtual_stages, rules.contiguous


@lru_cache(maxsize=16384)
def _schedules(
    layers: int,
    pipeline: int,
    count: int,
    allowed: tuple[Schedule, ...],
    virtual_stages: int | None,
    contiguous: int | None,
) -> tuple[tuple[Schedule, int, int, int], ...]:
    """(schedule, virtual stages, N, layer slots of a rank)."""
    if pipeline == 1:
        plain = "1f1b" in allowed and virtual_stages in (None, 1) and contiguous in (None, 1)
        return (("1f1b", 1, 1, layers),) if plain else ()
    fewest = -(-layers // pipeline)
    return tuple(
        (schedule, stages, run, slots)
        for slots in (fewest, fewest + 1)
        for stages in _allowed(divisors(slots), virtual_stages)
        if _filled(layers, pipeline, stages, slots)
        for schedule in allowed
        for run in _allowed(_runs(schedule, stages, pipeline, count), contiguous)
    )


def _runs(schedule: Schedule, stages: int, pipeline: int, count: int) -> tuple[int, ...]:
    """Legal N of a schedule; none where the schedule does not go with the stages."""
    if schedule == "gpipe":
        return (count,) if stages == 1 else ()
    if stages == 1:
        return () if schedule == "interleaved_1f1b" else (1,)
    if schedule == "1f1b":
        return ()
    return tuple(sorted({n for n in (pipeline, 2 * pipeline, count) if n >= pipeline and count % n == 0}))


@lru_cache(maxsize=4096)
def _filled(layers: int, pipeline: int, stages: int, slots: int) -> bool:
    """Only the first and the last chunk may be left without a layer, and no rank."""
    return all(
        count > 0 or (rank, chunk) in ((0, 0), (pipeline - 1, stages - 1))
        for rank, own in enumerate(stage_layers(layers, pipeline, stages, slots, 1.0))
        for chunk, count in enumerate(own)
    )


@lru_cache(maxsize=8192)
def stage_layers(
    layers: int, pipeline: int, stages: int, slots: int, head: float
) -> tuple[tuple[int, ...], ...]:
    """[rank][chunk] layers: all slots are filled, then the surplus is taken where it weighs most.

    Each surplus layer comes off the rank with most work, the lowest rank among equals: the first holds the
    embedding and most activations. It comes off the first chunk of the first rank and off the last chunk of
    the others, as in Llama 3 (arXiv 2407.21783, section 3.3.2), where 126 layers lie in 128 slots.

    Args:
        layers: of the model.
        pipeline: ranks.
        stages: chunks of a rank, a divisor of ``slots``.
        slots: layers a rank may hold.
        head: work of the output projection, in layers.
    """
    made = [[slots // stages] * stages for _ in range(pipeline)]
    for _ in range(pipeline * slots - layers):
        work = [sum(own) + (head if rank == pipeline - 1 else 0.0) for rank, own in enumerate(made)]
        rank = max(range(pipeline), key=lambda r: (sum(made[r]) > 0, work[r], -r))
        order = range(stages) if rank == 0 else range(stages - 1, -1, -1)
        chunk = max(order, key=lambda v: made[rank][v])
        made[rank][chunk] -= 1
    return tuple(tuple(own) for own in made)


def head_layers(shape: DecoderShape) -> float:
    """Work of the output projection in layers, by the FLOP of their matrices."""
    return shape.vocab_matrix / shape.layer_matrices
