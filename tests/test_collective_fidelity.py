"""The fitted constants of collectives, and what they predict for sizes they were not fitted on."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import collective_measurements as m
from benchmarks.collective_designs import all_reduce_ratios, broadcast_ratios


def test_no_judged_point_is_fitted() -> None:
    assert sum(len(one.judge) for one in m.series()) == 140
    for one in m.series():
        assert not {size for size, _ in one.fit} & {size for size, _ in one.judge}


def test_judged_sizes_are_predicted_within_12_percent_on_average() -> None:
    counts = [len(one.judge) for one in m.series()]
    errors = m.mean_error("judge", m.FITTED)
    assert np.average(list(errors.values()), weights=counts) <= 0.12
    assert max(errors.values()) <= 0.20


def test_stored_constants_cannot_be_moved_to_a_better_fit() -> None:
    """Each constant a tenth up or down makes the fitted rows worse or no better than by rounding."""

    def loss(constants: dict[str, float]) -> float:
        found = [m.errors(one, one.fit, *m.machine(one, constants)) for one in m.series()]
        size = np.abs(np.concatenate(found))
        return float(np.where(size < 0.1, size * size, 0.2 * size - 0.01).sum())

    here = loss(m.FITTED)
    for name, value in m.FITTED.items():
        for factor in (0.9, 1.1):
            if name.startswith("efficiency") and value * factor > 1:
                continue
            assert loss({**m.FITTED, name: value * factor}) >= here, name


def test_in_switch_is_chosen_where_it_was_measured() -> None:
    """H200: ring up to 1 MiB and NVLS from 2 MiB on, as NCCL logged; no switch for 2 GPUs."""
    series = {one.id: one for one in m.series()}
    library, setting = m.machine(series["h200_1n_ar"], m.FITTED)
    assert library.best("all_reduce", 2.0**17, setting).algorithm == "channel_ring"
    assert library.best("all_reduce", 2.0**21, setting).algorithm == "in_switch"
    library, setting = m.machine(series["xla_h100_all_reduce_2"], m.FITTED)
    assert library.best("all_reduce", 2.0**30, setting).algorithm == "channel_ring"


def test_published_directions() -> None:
    for ratios in broadcast_ratios().values():
        assert ratios == pytest.approx(
            sorted(ratios), rel=1e-6
        )  # the larger the message, the more the chain gains
        assert ratios[0] < 1 < ratios[-1]
    ratios = all_reduce_ratios()
    for name in ("NCCL ring, LL", "NCCL ring, Simple"):
        assert ratios[name] == pytest.approx(sorted(ratios[name], reverse=True), rel=1e-6)
        assert ratios[name][0] > 5  # arXiv 1810.11112: 5x to 17x for small and medium messages
        assert ratios[name][-1] == pytest.approx(1.0, abs=0.4)  # and 29 % less at large ones
