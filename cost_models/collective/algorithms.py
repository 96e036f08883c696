"""Every algorithm by name, and the fastest for a collective, a size and a network.

=================== ============================================================================
all_reduce          ring, channel_ring, hierarchical, overlapped, doubling_on_top,
                    recursive_doubling, halving_doubling, direct, tree, double_tree, in_switch, host_staged
reduce_scatter      ring, channel_ring, hierarchical, bruck, direct, in_switch
all_gather          ring, channel_ring, hierarchical, bruck, direct, in_switch
all_to_all          direct, pairwise, rail, rail_bruck
broadcast           direct, binomial, knomial4, scatter_allgather, chain, in_switch, host_staged
reduce              direct, binomial, knomial4, chain
send_receive        direct (to the farthest rank)
=================== ============================================================================

``channel_ring`` is NCCL's ring with a channel for each NIC. ``halving_doubling`` and ``recursive_doubling`` with
additions on the device are the all-reduce of the CUDA-aware MPI of Awan et al. (arXiv 1810.11112),
``host_staged`` what it replaced, ``chain`` the broadcast of arXiv 1707.09414.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cost_models.collective import doubling, exchange, gather, staged, trees
from cost_models.collective.switch import in_switch
from cost_models.collective.terms import NetworkLevel, Terms, check_levels, hop, ranks_of, used
from ir.errors import InputError
from ir.schedules import Collective
from ir.schedules.gather import GatherWay


@dataclass(frozen=True, slots=True)
class Setting:
    """What a collective is priced for.

    Attributes:
        levels: of the network, innermost first.
        reduction: seconds a byte to add up on the device.
        copies: between device and host memory, for ``host_staged``; None: not offered.
        host_reduction: seconds a byte to add up on the host.
    """

    levels: tuple[NetworkLevel, ...]
    reduction: float = 0.0
    copies: NetworkLevel | None = None
    host_reduction: float = 0.0


@dataclass(frozen=True, slots=True)
class Priced:
    """An algorithm with its cost.

    Attributes:
        algorithm: by name.
        terms: seconds by cause.
        chunk: bytes of a chunk of a pipelined algorithm; 0 when nothing is cut.
    """

    algorithm: str
    terms: Terms
    chunk: float = 0.0

    @property
    def seconds(self) -> float:
        """The sum of the terms."""
        return self.terms.seconds


Form = Callable[[float, Setting], Priced | None]  # None: not on this network


def _plain(name: str, form: Callable[[float, Setting], Terms]) -> Form:
    return lambda size, setting: Priced(name, form(size, setting))


def _gathers(collective: Collective) -> dict[str, Form]:
    def level(way: GatherWay) -> Callable[[float, Setting], Terms]:
        return lambda size, s: gather.by_level(collective, [way] * len(s.levels), size, s.levels, s.reduction)

    return {
        "ring": _plain("ring", lambda size, s: gather.ring(collective, size, s.levels, s.reduction)),
        "channel_ring": _plain(
            "channel_ring", lambda size, s: gather.channel_ring(collective, size, s.levels, s.reduction)
        ),
        "hierarchical": _plain("hierarchical", level("ring")),
        "bruck": _plain("bruck", level("bruck")),
        "direct": _plain("direct", level("direct")),
        "in_switch": _switched(collective),
    }


def _switched(collective: Collective) -> Form:
    def form(size: float, setting: Setting) -> Priced | None:
        found = used(setting.levels)
        if len(found) != 1 or not found[0].switch_efficiency:
            return None
        return Priced("in_switch", in_switch(collective, size, found[0]))

    return form


def _split(setting: Setting, size: float) -> tuple[tuple[NetworkLevel, ...], NetworkLevel, float]:
    """The inner levels, the outermost, and the bytes that are left for it."""
    *inner, top = used(setting.levels)
    return tuple(inner), top, size / ranks_of(inner)


def _on_top(name: str) -> Form:
    """Rings inside, something with fewer steps between hosts."""

    def form(size: float, setting: Setting) -> Priced | None:
        inner, top, left = _split(setting, size)
        chunk = 0.0
        if name == "double_tree":
            chunks = trees.best_tree_chunks(left, top, setting.reduction)
            above = trees.double_tree(left, top, chunks, setting.reduction)
            chunk = left / 2 / chunks
        elif inner:
            above = doubling.recursive_doubling(left, (top,), setting.reduction)
        else:
            return None
        ways: list[GatherWay] = ["ring"] * len(inner)
        terms = gather.hierarchical_all_reduce(size, inner, above, ways, setting.reduction)
        return Priced(name, terms, chunk)

    return form


def _overlapped(size: float, setting: Setting) -> Priced | None:
    if len(used(setting.levels)) < 2:
        return None
    return Priced("overlapped", gather.overlapped_all_reduce(size, setting.levels, setting.reduction))


def _staged_all_reduce(size: float, setting: Setting) -> Priced | None:
    if setting.copies is None:
        return None
    on_hosts = min(
        doubling.recursive_doubling(size, setting.levels, setting.host_reduction),
        doubling.halving_doubling(size, setting.levels, setting.host_reduction),
        key=lambda terms: terms.seconds,
    )
    return Priced("host_staged", staged.staged(size, setting.copies, on_hosts))


def _staged_broadcast(size: float, setting: Setting) -> Priced | None:
    if setting.copies is None:
        return None
    chunks = trees.best_chunks(size, staged.staged_hops(setting.levels, setting.copies))
    terms = staged.staged_chain(size, setting.levels, setting.copies, chunks)
    return Priced("host_staged", terms, size / chunks)


def _chain(reduces: bool) -> Form:
    def form(size: float, setting: Setting) -> Priced:
        adding = setting.reduction if reduces else 0.0
        chunks = trees.best_chunks(size, trees.chain_hops(setting.levels), adding)
        return Priced("chain", trees.chain(size, setting.levels, chunks, adding), size / chunks)

    return form


def _rooted(reduces: bool) -> dict[str, Form]:
    def knomial(radix: Callable[[Setting], int]) -> Callable[[float, Setting], Terms]:
        return lambda size, s: trees.knomial(size, s.levels, radix(s), s.reduction if reduces else 0.0)

    return {
        "direct": _plain("direct", knomial(lambda s: max(2, max(level.fanout for level in s.levels)))),
        "binomial": _plain("binomial", knomial(lambda s: 2)),
        "knomial4": _plain("knomial4", knomial(lambda s: 4)),
        "chain": _chain(reduces),
    }


ALGORITHMS: Mapping[Collective, Mapping[str, Form]] = {
    "all_reduce": {
        **{k: v for k, v in _gathers("all_reduce").items() if k != "bruck"},
        "overlapped": _overlapped,
        "doubling_on_top": _on_top("doubling_on_top"),
        "recursive_doubling": _plain(
            "recursive_doubling", lambda size, s: doubling.recursive_doubling(size, s.levels, s.reduction)
        ),
        "halving_doubling": _plain(
            "halving_doubling", lambda size, s: doubling.halving_doubling(size, s.levels, s.reduction)
        ),
        "tree": _plain("tree", lambda size, s: trees.tree_all_reduce(size, s.levels, 2, s.reduction)),
        "double_tree": _on_top("double_tree"),
        "host_staged": _staged_all_reduce,
    },
    "reduce_scatter": _gathers("reduce_scatter"),
    "all_gather": _gathers("all_gather"),
    "all_to_all": {
        "direct": _plain("direct", lambda size, s: exchange.direct(size, s.levels)),
        "pairwise": _plain("pairwise", lambda size, s: exchange.pairwise(size, s.levels)),
        "rail": _plain("rail", lambda size, s: exchange.by_level(["direct"] * len(s.levels), size, s.levels)),
        "rail_bruck": _plain(
            "rail_bruck", lambda size, s: exchange.by_level(["bruck"] * len(s.levels), size, s.levels)
        ),
    },
    "broadcast": {
        **_rooted(False),
        "scatter_allgather": _plain(
            "scatter_allgather", lambda size, s: trees.scatter_allgather(size, s.levels)
        ),
        "in_switch": _switched("broadcast"),
        "host_staged": _staged_broadcast,
    },
    "reduce": _rooted(True),
    "send_receive": {"direct": _plain("direct", lambda size, s: hop(size, used(s.levels)[-1]))},
}


def price(collective: Collective, algorithm: str, size: float, setting: Setting) -> Priced | None:
    """The cost of one algorithm; None where the network does not have what it needs.

    Args:
        collective: what is computed.
        algorithm: how; a name of the module's table.
        size: bytes of the whole buffer of one rank (all_gather: gathered; all_to_all: sent, own part included).
        setting: the network.

    Raises:
        InputError: no such algorithm; or a network without ranks or bandwidth.
    """
    check_levels(setting.levels)
    forms = ALGORITHMS[collective]
    if algorithm not in forms:
        raise InputError(f"{collective} has no algorithm {algorithm!r}; choose one of {', '.join(forms)}")
    if not used(setting.levels):
        return Priced(algorithm, Terms())
    return forms[algorithm](size, setting)


def ranked(collective: Collective, size: float, setting: Setting, names: Sequence[str] = ()) -> list[Priced]:
    """All algorithms that the network allows (or those in ``names``), the fastest first; raises InputError."""
    found = [price(collective, name, size, setting) for name in names or ALGORITHMS[collective]]
    return sorted((priced for priced in found if priced is not None), key=lambda priced: priced.seconds)
