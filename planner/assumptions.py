"""How the modelled step depends on each number that a plan rests on, the plan left as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import ir.plan
from ir.topology import Topology
from ir.units import format_bandwidth, format_seconds
from planner.assumption_prices import priced

if TYPE_CHECKING:
    from cost_models.calibration import Calibration

STEP = 0.10  # relative change of an assumption

Vary = Callable[[float], tuple[Topology, Any]]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Seconds of the same plan when one assumption is a tenth worse or better.

    ``of`` says which seconds: the modelled step, or of a served decoder the time to the first token or between tokens.
    """

    name: str
    value: str
    worse: float
    better: float
    of: str = "step"


@dataclass(frozen=True, slots=True)
class Sensitivities:
    """``seconds``: of the plan as it is, by name; ``rows``: by name, largest effect first."""

    seconds: dict[str, float]
    rows: tuple[Sensitivity, ...]

    def of(self, name: str) -> tuple[Sensitivity, ...]:
        """The rows about one of ``seconds``."""
        return tuple(row for row in self.rows if row.of == name)


def sensitivity(
    plan: ir.plan.Plan, *, model: Any = None, calibration: Calibration | None = None
) -> Sensitivities:
    """The plan's seconds under each assumption a tenth worse and better.

    Worse is a tenth less of a bandwidth, rate or efficiency, and a tenth more of a time. Decoders need no model, other
    plans that of which they were compiled.

    Raises:
        InputError: as :func:`planner.what_if.model_of`.
    """
    base, price, seconds = priced(plan, model, calibration)
    # against the price of today's model, which need not be the one that an older plan was made by
    today = price(plan.topology, base)
    found = []
    for name, value, vary in _assumptions(plan.topology, base):
        both = [price(*vary(factor)) for factor in (1 - STEP, 1 + STEP)]
        for of, as_it_is in seconds.items():
            steps = [one[of] + as_it_is - today[of] for one in both]
            found.append(Sensitivity(name, value, max(steps), min(steps), of))
    return Sensitivities(seconds, tuple(sorted(found, key=lambda s: s.better - s.worse)))


def _assumptions(topology: Topology, base: Any) -> Iterable[tuple[str, str, Vary]]:
    def constant(name: str) -> Vary:
        kept = getattr(base, name)

        def scaled(factor: float) -> tuple[Topology, Any]:
            made = tuple(v * factor for v in kept) if isinstance(kept, tuple) else kept * factor
            return topology, replace(base, **{name: made})

        return scaled

    def link(index: int) -> Vary:
        level = topology.levels[index]

        def scaled(factor: float) -> tuple[Topology, Any]:
            other = replace(level, link=replace(level.link, bandwidth=level.link.bandwidth * factor))
            levels = (*topology.levels[:index], other, *topology.levels[index + 1 :])
            return replace(topology, levels=levels), base

        return scaled

    def memory(factor: float) -> tuple[Topology, Any]:
        first, *rest = topology.device.tiers
        scaled = replace(
            first,
            read_bandwidth=first.read_bandwidth * factor,
            write_bandwidth=first.write_bandwidth * factor,
        )
        return replace(topology, device=replace(topology.device, tiers=(scaled, *rest))), base

    for index, level in enumerate(topology.levels):
        yield f"link.{level.name}", format_bandwidth(level.link.bandwidth), link(index)
    tier = topology.device.tiers[0]
    yield f"bandwidth.{tier.name}", format_bandwidth(tier.read_bandwidth), memory
    for field in fields(base):
        value = getattr(base, field.name)
        if isinstance(value, float) and value:
            yield field.name, _shown(field.name, value), constant(field.name)
        elif value and isinstance(value, tuple) and all(isinstance(v, float) for v in value):
            # the least and the most
            yield field.name, " to ".join(_shown(field.name, v) for v in value), constant(field.name)


def _shown(name: str, value: float) -> str:
    """A time with its unit (all constants of decoding are times), a share or a factor as it is."""
    return format_seconds(value) if name.endswith("_seconds") or name.startswith("decode_") else f"{value:g}"
