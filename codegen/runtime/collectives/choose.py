"""From the name of an algorithm in a plan to the schedule that runs it, and DDP's gradients through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ir.errors import InputError
from ir.schedules import Collective, Schedule
from ir.schedules.doubling import halving_doubling, recursive_doubling
from ir.schedules.exchange import by_level, flat
from ir.schedules.gather import all_gather, all_reduce, hierarchical_all_reduce, reduce_scatter
from ir.schedules.trees import (
    chain_broadcast,
    chain_reduce,
    double_tree_all_reduce,
    knomial_broadcast,
    knomial_reduce,
    scatter_allgather,
    tree_all_reduce,
)

if TYPE_CHECKING:
    import torch

Shape = Sequence[int]
Make = Callable[[Shape, int], Schedule]  # shape, chunks


def _ranks(shape: Shape) -> int:
    total = 1
    for fanout in shape:
        total *= fanout
    return total


def _on_top(shape: Shape) -> Schedule:
    *inner, top = shape
    if not inner:
        return recursive_doubling(shape)
    return hierarchical_all_reduce(shape, ["ring"] * len(inner), recursive_doubling((top,)))


SCHEDULES: dict[Collective, dict[str, Make]] = {
    "all_reduce": {
        "ring": lambda shape, _: all_reduce((_ranks(shape),), ["ring"]),
        "hierarchical": lambda shape, _: all_reduce(shape, ["ring"] * len(shape)),
        "direct": lambda shape, _: all_reduce(shape, ["direct"] * len(shape)),
        "doubling_on_top": lambda shape, _: _on_top(shape),
        "recursive_doubling": lambda shape, _: recursive_doubling(shape),
        "halving_doubling": lambda shape, _: halving_doubling(shape),
        "tree": lambda shape, _: tree_all_reduce(shape),
        "double_tree": lambda shape, chunks: double_tree_all_reduce(shape, chunks),
    },
    "reduce_scatter": {
        "ring": lambda shape, _: reduce_scatter((_ranks(shape),), ["ring"]),
        "hierarchical": lambda shape, _: reduce_scatter(shape, ["ring"] * len(shape)),
        "bruck": lambda shape, _: reduce_scatter(shape, ["bruck"] * len(shape)),
        "direct": lambda shape, _: reduce_scatter(shape, ["direct"] * len(shape)),
    },
    "all_gather": {
        "ring": lambda shape, _: all_gather((_ranks(shape),), ["ring"]),
        "hierarchical": lambda shape, _: all_gather(shape, ["ring"] * len(shape)),
        "bruck": lambda shape, _: all_gather(shape, ["bruck"] * len(shape)),
        "direct": lambda shape, _: all_gather(shape, ["direct"] * len(shape)),
    },
    "all_to_all": {
        "direct": lambda shape, _: flat(shape, "direct"),
        "pairwise": lambda shape, _: flat(shape, "pairwise"),
        "rail": lambda shape, _: by_level(shape, ["direct"] * len(shape)),
        "rail_bruck": lambda shape, _: by_level(shape, ["bruck"] * len(shape)),
    },
    "broadcast": {
        "direct": lambda shape, _: knomial_broadcast(shape, max(2, *shape)),
        "binomial": lambda shape, _: knomial_broadcast(shape),
        "knomial4": lambda shape, _: knomial_broadcast(shape, 4),
        "scatter_allgather": lambda shape, _: scatter_allgather(shape),
        "chain": lambda shape, chunks: chain_broadcast(shape, chunks),
    },
    "reduce": {
        "binomial": lambda shape, _: knomial_reduce(shape),
        "knomial4": lambda shape, _: knomial_reduce(shape, 4),
        "chain": lambda shape, chunks: chain_reduce(shape, chunks),
    },
}


def schedule_of(collective: Collective, algorithm: str, shape: Shape, chunks: int = 8) -> Schedule:
    """The schedule of an algorithm of :mod:`cost_models.collective.algorithms`.

    Args:
        collective: what is computed.
        algorithm: by name.
        shape: ranks at each level, innermost first.
        chunks: of a pipelined algorithm.

    Raises:
        InputError: no such algorithm, or one that only a library or a switch runs.
    """
    known = SCHEDULES.get(collective, {})
    if algorithm not in known:
        raise InputError(
            f"no schedule runs {collective} by {algorithm!r}; choose one of {', '.join(known) or 'none'}"
        )
    return known[algorithm](shape, chunks)


def gradient_hook(
    algorithm: str, shape: Shape, group: Any = None
) -> Callable[[Any, Any], torch.futures.Future[torch.Tensor]]:
    """A communication hook for DDP that averages each bucket by an all-reduce of this module.

    Register it with ``DistributedDataParallel.register_comm_hook(None, hook)``. The messages of a bucket are
    sent when the hook is called, so they do not run beside the backward pass as the library's would.
    """
    import torch

    from codegen.runtime.collectives.execute import all_reduce as summed

    schedule = schedule_of("all_reduce", algorithm, shape)

    def hook(state: object, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        tensor = bucket.buffer()
        summed(tensor, schedule, group)
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(tensor.div_(schedule.ranks))
        return done

    hook.__annotations__.clear()  # DDP compares them with types, and these are text
    return hook
