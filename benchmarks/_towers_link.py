"""The speed of the slow link at which it takes a share of a step that is asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

NEAR, TRIES = 0.03, 6  # of the share; probes for one share
START = 25e6  # bytes/s: 200 Mbit/s, where the first search starts


@dataclass(frozen=True)
class Probe:
    """A speed of the slow link, bytes/s, and the share of the step that it takes."""

    speed: float
    share: float

    @property
    def odds(self) -> float:
        """Log of the seconds that the link adds over those of the rest; of a share of 1 % at least."""
        share = min(max(self.share, 0.01), 0.99)
        return math.log(share / (1 - share))


def slow_link(share: float, seen: list[Probe], share_at: Callable[[float], float]) -> float:
    """Bytes/s at which the link takes ``share`` of the step, within :data:`NEAR`, or as near as was found.

    The share falls as the link gets faster. The search keeps the closest speeds on both sides and interpolates the odds of
    the share between them, which are about inverse to the speed, both in logarithms.

    Args:
        share: to be reached.
        seen: probes so far, those of other shares too; those made here are added.
        share_at: measures the share at a speed.
    """
    wanted = Probe(0.0, share).odds
    for _ in range(TRIES):
        if any(abs(probe.share - share) <= NEAR for probe in seen):
            break
        slower = max((p for p in seen if p.odds >= wanted), key=lambda p: p.speed, default=None)
        faster = min((p for p in seen if p.odds < wanted), key=lambda p: p.speed, default=None)
        speed = _between(wanted, slower, faster)
        seen.append(Probe(speed, share_at(speed)))
    return min(seen, key=lambda probe: abs(probe.share - share)).speed


def _between(wanted: float, slower: Probe | None, faster: Probe | None) -> float:
    """The speed at which the odds should be ``wanted``, from a probe on either side or from one alone."""
    if slower is None or faster is None:
        one = slower or faster
        return START if one is None else one.speed * math.exp(min(max(one.odds - wanted, -2.0), 2.0))
    part = (slower.odds - wanted) / max(slower.odds - faster.odds, 1e-9)
    part = min(max(part, 0.1), 0.9)  # noise must not stall the search at an end
    return float(slower.speed * (faster.speed / slower.speed) ** part)
