"""Collectives against port-by-port simulations and published bandwidths."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models import collectives as c
from cost_models.calibration import GPU
from planner.presets import preset

networks = st.builds(
    c.Network,
    host_size=st.integers(1, 8),
    hosts=st.integers(1, 6),
    intra=st.floats(1e9, 1e12),
    inter=st.floats(1e9, 1e11),
    latency=st.just(0.0),
).filter(lambda net: net.ranks > 1)
sizes = st.floats(1.0, 1e9)


def busiest(ports: Counter[tuple[str, int]], net: c.Network) -> float:
    """Seconds until the slowest sending port is done; a port is a rank's fabric or its NIC."""
    speed = {"fabric": net.intra, "nic": net.inter}
    return max(load / speed[kind] for (kind, _), load in ports.items())


def send(ports: Counter[tuple[str, int]], source: int, target: int, size: float, net: c.Network) -> None:
    same = source // net.host_size == target // net.host_size
    ports["fabric" if same else "nic", source] += size  # type: ignore[assignment]


@given(networks, sizes)
def test_all_to_all_equals_every_pair_sending_its_part(net: c.Network, size: float) -> None:
    ports: Counter[tuple[str, int]] = Counter()
    for source in range(net.ranks):
        for target in range(net.ranks):
            if target != source:
                send(ports, source, target, size / net.ranks, net)
    assert c.all_to_all(size, net) == pytest.approx(busiest(ports, net))


@given(networks, sizes)
def test_reduce_scatter_equals_a_ring_with_one_channel_for_each_nic(net: c.Network, size: float) -> None:
    g, k, n = net.host_size, net.hosts, net.ranks
    ports: Counter[tuple[str, int]] = Counter()
    for channel in range(g):
        ring = [host * g + (channel + 1 + i) % g for host in range(k) for i in range(g)]
        for step in range(n):
            send(ports, ring[step], ring[(step + 1) % n], (n - 1) / n * size / g, net)
    simulated = busiest(ports, net)
    modelled = c.reduce_scatter(size, net)
    # between hosts the ring's fabric links carry one channel fewer than the model charges
    spare = 1.0 if k == 1 or g == 1 else g / (g - 1)
    assert simulated <= modelled * (1 + 1e-9)
    assert modelled <= simulated * spare * (1 + 1e-9)
    assert c.all_reduce(size, net) == pytest.approx(2 * modelled)
    assert c.all_gather(size, net) == modelled


@pytest.mark.parametrize(
    ("net", "collective", "bus", "published", "tolerance"),
    [
        # 4x8 B200, 8 NICs of 48 GB/s, 682 GB/s in the host: stas00/ml-engineering, network
        (c.Network(8, 4, 682e9, 48e9, 0.0), "all_reduce", lambda n: 2 * (n - 1) / n, 381.8e9, 0.02),
        # 2x8 H200, 46 GB/s a NIC, 370 GB/s in the host: public log, 1 GiB
        (c.Network(8, 2, 370e9, 46e9, 0.0), "all_to_all", lambda n: (n - 1) / n, 85e9, 0.03),
        # 2x8 H100, 8 NICs of 23.5 GB/s: GoogleCloudPlatform/cluster-toolkit, A3 Mega, 189 GB/s
        (c.Network(8, 2, 370e9, 23.5e9, 0.0), "all_gather", lambda n: (n - 1) / n, 189e9, 0.02),
    ],
)
def test_plateaus_are_the_published_bus_bandwidths(net, collective, bus, published, tolerance) -> None:  # type: ignore[no-untyped-def]
    size = 2.0**30
    busbw = bus(net.ranks) * size / getattr(c, collective)(size, net)
    assert busbw == pytest.approx(published, rel=tolerance)


# XLA's collective calibration table: 8 H100 in one host, (bytes, measured us)
XLA_ALL_TO_ALL = [(33554432, 132.51), (134217728, 412.64)]
XLA_REDUCE_SCATTER = [(33554432, 133.54), (134217728, 411.52)]


@pytest.mark.parametrize(
    ("collective", "points"), [(c.all_to_all, XLA_ALL_TO_ALL), (c.reduce_scatter, XLA_REDUCE_SCATTER)]
)
def test_calibrated_h100_host_matches_xla_table(collective, points) -> None:  # type: ignore[no-untyped-def]
    net = c.network(preset("h100-1x8"), GPU)
    for size, microseconds in points:
        assert collective(size, net) + c.latency(net) == pytest.approx(microseconds * 1e-6, rel=0.1)


@given(networks, sizes, st.floats(1.0, 10.0), st.sampled_from(["intra", "inter"]))
def test_more_bandwidth_is_never_slower(net: c.Network, size: float, factor: float, which: str) -> None:
    from dataclasses import replace

    faster = replace(net, **{which: getattr(net, which) * factor})
    for name in ("all_to_all", "reduce_scatter", "all_reduce", "cross_host_all_to_all"):
        assert getattr(c, name)(size, faster) <= getattr(c, name)(size, net) * (1 + 1e-12)


def test_one_rank_exchanges_nothing() -> None:
    net = c.network(preset("h100-1x1"), GPU)
    assert c.all_to_all(1e6, net) == c.all_reduce(1e6, net) == c.latency(net) == 0.0
