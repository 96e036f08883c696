"""The assignment problem: which option each table takes, and where its pieces go.

Plain records without behaviour, so that a cost model can state a problem and a pass can solve it.

``ranks = hosts * host_size`` identical ranks, ``host_size`` of them a host. A table takes exactly one of
its options; an option is a bag of pieces. The objective is the sum over phases of the largest load of
any rank in that phase: phases end in a collective, which waits for the slowest rank. With one phase it
is the largest load. Every rank holds at most ``capacity`` bytes.

Two further kinds of limits are optional. ``limits`` bounds other resources of every rank (bytes of a
slower memory tier, seconds that the tier is busy); pieces use them by ``extra``. ``budgets`` bounds sums
over the chosen options wherever they are placed (predicted loss of accuracy, stored bits); options use them
by ``cost``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scope = Literal["rank", "host", "all"]


@dataclass(frozen=True, slots=True)
class Piece:
    """``count`` identical pieces of a table.

    Attributes:
        scope: "rank" goes to one rank; "host" to one host and loads each rank of it equally; "all" is on
            every rank, wherever the rest goes.
        load: seconds per phase on EACH rank that the piece lands on.
        memory: bytes on each such rank.
        count: identical copies to place ("all" pieces have no place: their count multiplies the load).
        extra: of each further resource on each such rank; empty: none.
    """

    scope: Scope
    load: tuple[float, ...]
    memory: float
    count: int = 1
    extra: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Option:
    """One way to shard one table.

    Attributes:
        label: what people call it.
        pieces: what it puts on the machine.
        together: all pieces of scope "rank" must land in one host.
        distinct: no two pieces of the option may share a rank (scope "rank") or a host (scope "host").
        allowed_ranks: pieces of scope "rank" may only use these; None allows all.
        cost: share of each budget that the option takes; empty: none.
    """

    label: str
    pieces: tuple[Piece, ...]
    together: bool = False
    distinct: bool = False
    allowed_ranks: tuple[int, ...] | None = None
    cost: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """Tables with their options, and the machine.

    Attributes:
        names: of the tables.
        options: of each table, at least one.
        hosts, host_size: the machine; rank ``r`` lives in host ``r // host_size``.
        capacity: bytes a rank.
        phases: names of the K entries of every load.
        limits: of each further resource of a rank.
        budgets: of each sum over options.
    """

    names: tuple[str, ...]
    options: tuple[tuple[Option, ...], ...]
    hosts: int
    host_size: int
    capacity: float
    phases: tuple[str, ...]
    limits: tuple[float, ...] = ()
    budgets: tuple[float, ...] = ()

    @property
    def ranks(self) -> int:
        """Ranks of the machine."""
        return self.hosts * self.host_size
