"""What collectives see of a network, and what one of them costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ir.errors import InputError
from ir.schedules import Shape


@dataclass(frozen=True, slots=True)
class NetworkLevel:
    """One level: ``fanout`` members, and what one rank gets of the links that join them.

    Attributes:
        fanout: members.
        bandwidth: bytes/s of one rank, one direction.
        latency: seconds of a message of zero bytes.
        switch_efficiency: fraction of the bandwidth at which the switch of this level adds up and
            multicasts (NVLS, SHARP); 0 where it cannot.
        switch_latency: seconds of an in-switch collective of zero bytes.
    """

    fanout: int
    bandwidth: float
    latency: float
    switch_efficiency: float = 0.0
    switch_latency: float = 0.0


Levels = Sequence[NetworkLevel]


def check_levels(levels: Levels) -> Shape:
    """The fanouts of ``levels``; raises InputError for a level that nobody is on or nothing crosses."""
    for index, level in enumerate(levels):
        if level.fanout < 1 or level.bandwidth <= 0 or level.latency < 0:
            raise InputError(
                f"network level {index} has fanout {level.fanout}, {level.bandwidth:g} bytes/s and "
                f"{level.latency:g} s; give 1 or more members, a positive bandwidth and no negative latency"
            )
    if not levels:
        raise InputError("a network needs a level; give one with the number of ranks as fanout")
    return tuple(level.fanout for level in levels)


def used(levels: Levels) -> tuple[NetworkLevel, ...]:
    """The levels with more than one member."""
    return tuple(level for level in levels if level.fanout > 1)


def ranks_of(levels: Levels) -> int:
    """Ranks on the network."""
    total = 1
    for level in levels:
        total *= level.fanout
    return total


@dataclass(frozen=True, slots=True)
class Terms:
    """Seconds of a collective by cause.

    Attributes:
        latency: messages of zero bytes.
        bandwidth: bytes through links.
        reduction: adding up.
        ramp: what filling and draining the pipeline of slices costs (:func:`ramped`).
        local: bytes that are copied inside a device.
    """

    latency: float = 0.0
    bandwidth: float = 0.0
    reduction: float = 0.0
    ramp: float = 0.0
    local: float = 0.0

    @property
    def seconds(self) -> float:
        """The sum."""
        return self.latency + self.bandwidth + self.reduction + self.ramp + self.local

    def __add__(self, other: Terms) -> Terms:
        return Terms(
            self.latency + other.latency,
            self.bandwidth + other.bandwidth,
            self.reduction + other.reduction,
            self.ramp + other.ramp,
            self.local + other.local,
        )

    def times(self, count: float) -> Terms:
        """The same ``count`` times in a row."""
        return Terms(
            self.latency * count,
            self.bandwidth * count,
            self.reduction * count,
            self.ramp * count,
            self.local * count,
        )

    def to_dict(self) -> dict[str, float]:
        """The terms that are not zero."""
        named = {
            "latency": self.latency,
            "transfer": self.bandwidth,
            "reduction": self.reduction,
            "ramp": self.ramp,
            "copy": self.local,
        }
        return {name: seconds for name, seconds in named.items() if seconds}


def slowest(terms: Sequence[Terms]) -> Terms:
    """The largest of several things that happen at once; nothing if there are none."""
    return max(terms, key=lambda t: t.seconds, default=Terms())


def hop(size: float, level: NetworkLevel, reduction: float = 0.0) -> Terms:
    """One message of ``size`` bytes across ``level``, added up at ``reduction`` seconds a byte."""
    return Terms(level.latency, size / level.bandwidth, size * reduction)
