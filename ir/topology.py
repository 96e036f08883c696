"""Where a model runs: a tree of devices with memory tiers, and a link model on each level.

A :class:`Topology` is symmetric: ``levels`` lists the levels from the inside out (the first is the
host), each with its fan-out and the link by which its members talk to each other. World size is the
product of the fan-outs, and rank ``r`` sits in host ``r // host_size``.

Units: bytes, seconds, FLOP/s, or text such as ``"80 GiB"`` and ``"400 Gbps"``; what cannot be (no capacity, a negative
bandwidth, NaN) is an InputError wherever a noun is made. Every bandwidth is per direction; a link's is what one
device can send through it. Peaks are data-sheet figures; how much of a peak a kernel reaches is a
constant of the cost models, not of the topology.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from html import escape
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from ir.reading import STRICT, check_fields, digest, dump_record, parse_record
from ir.units import format_bandwidth, format_bytes, parse_bandwidth, parse_bytes, parse_flops, parse_seconds

Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(gt=0)]
Bandwidth = Annotated[float, BeforeValidator(parse_bandwidth), Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(ge=0)]
Flops = Annotated[float, BeforeValidator(parse_flops), Field(gt=0)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


@dataclass(frozen=True, slots=True)
class MemoryTier:
    """One kind of memory of a device or a host."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Name  # "hbm", "ddr", "pmem", "ssd", ...
    capacity: Bytes
    read_bandwidth: Bandwidth
    write_bandwidth: Bandwidth
    latency: Seconds = 0.0
    granule: Bytes = 64  # smallest number of bytes one access moves
    iops: Annotated[float, Field(gt=0)] | None = None  # random reads of one granule per second
    write_iops: Annotated[float, Field(gt=0)] | None = None  # random writes of one granule; None: as reads
    dwpd: Annotated[float, Field(gt=0)] | None = None  # endurance, drive writes per day
    price_per_gb: Annotated[float, Field(ge=0)] | None = None  # US dollars per 1e9 bytes
    watt_per_gb: Annotated[float, Field(ge=0)] | None = None
    source: str = ""
    processors: Annotated[int, Field(ge=1)] | None = None  # in the memory, which pool rows where they lie

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Link:
    """What one device sees of a network level."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Name  # "nvlink4", "ib-ndr-400", "pcie5", "loopback"
    bandwidth: Bandwidth  # bytes/s, one device, one direction
    latency: Seconds = 0.0  # seconds for a message of zero bytes
    source: str = ""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or one CPU rank)."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Name
    kind: Annotated[str, Field(pattern="^(gpu|cpu)$")]
    flops: dict[str, Flops]  # dense peak per element type: {"fp32": ..., "tf32": ..., "bf16": ...}
    tiers: Annotated[tuple[MemoryTier, ...], Field(min_length=1)]  # fastest first
    source: str = ""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Level:
    """One level of the tree: ``fanout`` members joined by ``link``."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Name  # "host", "pod", "cluster"
    fanout: Annotated[int, Field(ge=1, le=1_000_000)]
    link: Link

    def __post_init__(self) -> None:
        check_fields(self)


MAX_RANKS = 1_000_000  # ten times the largest cluster; plans list every rank


def _countable(levels: tuple[Level, ...]) -> tuple[Level, ...]:
    ranks = math.prod(level.fanout for level in levels)
    if ranks > MAX_RANKS:
        raise ValueError(f"the fan-outs multiply to {ranks} ranks; at most {MAX_RANKS} are planned")
    return levels


@dataclass(frozen=True, slots=True)
class Topology:
    """The cluster: ``levels[0]`` is the host, the last one the whole cluster.

    >>> import planner
    >>> planner.topology("h100-16x8").world_size
    128
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    name: Name
    device: Device
    levels: Annotated[tuple[Level, ...], Field(min_length=1, max_length=4), AfterValidator(_countable)]
    host_tiers: tuple[MemoryTier, ...] = ()  # shared by all devices of one host
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def world_size(self) -> int:
        """Number of devices (ranks)."""
        size = 1
        for level in self.levels:
            size *= level.fanout
        return size

    @property
    def host_size(self) -> int:
        """Devices per host."""
        return self.levels[0].fanout

    @property
    def hosts(self) -> int:
        """Number of hosts."""
        return self.world_size // self.host_size

    @property
    def intra_link(self) -> Link:
        """The link inside a host."""
        return self.levels[0].link

    @property
    def inter_link(self) -> Link:
        """The narrowest link between hosts; the link inside the host when there is only one."""
        outer = [level.link for level in self.levels[1:] if level.fanout > 1]
        return min(outer, key=lambda link: link.bandwidth) if outer else self.intra_link

    def host_of(self, rank: int) -> int:
        """The host that holds ``rank``."""
        return rank // self.host_size

    def tier(self, name: str) -> MemoryTier:
        """The tier called ``name``, of the device or the host; raises KeyError."""
        for tier in (*self.device.tiers, *self.host_tiers):
            if tier.name == name:
                return tier
        raise KeyError(name)

    def with_hosts(self, hosts: int) -> Topology:
        """The same machine with another number of hosts (two-level topologies)."""
        outer = replace(self.levels[-1], fanout=hosts)
        return replace(self, levels=(*self.levels[:-1], outer))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; :meth:`from_dict` reads it back."""
        return dump_record(self)

    def _repr_html_(self) -> str:
        """The machine as a table, for notebooks."""
        rows = [
            (level.name, f"{level.fanout} x, {level.link.name}", format_bandwidth(level.link.bandwidth))
            for level in self.levels
        ]
        rows += [
            (tier.name, format_bytes(tier.capacity), format_bandwidth(tier.read_bandwidth))
            for tier in (*self.device.tiers, *self.host_tiers)
        ]
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        what = f"{self.name}: {self.hosts} x {self.host_size} {self.device.name}"
        return f"<table><caption>{escape(what)}</caption><tbody>{body}</tbody></table>"

    @classmethod
    def from_dict(cls, data: object, what: str = "topology") -> Topology:
        """Read plain data; raises InputError that names each bad key."""
        return parse_record(cls, data, what)

    @property
    def digest(self) -> str:
        """Content digest, for the provenance of a plan."""
        return digest(self.to_dict())
