"""The search for the link speed at which the link takes a share of the step."""

from __future__ import annotations

import pytest

from benchmarks._towers_link import NEAR, TRIES, Probe, slow_link


@pytest.mark.parametrize("rest", [0.03, 0.15, 0.6])
@pytest.mark.parametrize("hidden", [0.0, 0.05])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_shares_are_reached_from_anywhere(rest: float, hidden: float, noise: float) -> None:
    """Steps of ``rest`` seconds plus 7.6 MB over the link, of which ``hidden`` seconds cost nothing."""
    calls: list[float] = []

    def share_at(speed: float) -> float:
        calls.append(speed)
        step = rest + max(0.0, 7.6e6 / speed - hidden)
        return 1 - rest / step + noise * (-1) ** len(calls)

    seen: list[Probe] = []
    for share in (0.7, 0.5, 0.3):
        before = len(calls)
        speed = slow_link(share, seen, share_at)
        exact = 1 - rest / (rest + max(0.0, 7.6e6 / speed - hidden))
        assert abs(exact - share) <= NEAR + noise
        assert len(calls) - before <= TRIES
    assert len(calls) <= 14
