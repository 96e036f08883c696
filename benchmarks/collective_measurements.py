"""Measured collectives as the closed forms see them: machines, the fit of their constants, and the errors.

Bandwidths of links are published ones (NCCL's own constants); what is fitted is listed in :data:`NAMES`.
A series is predicted by the algorithm that the model finds fastest among those that NCCL has; which one NCCL ran is
stated for few of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from benchmarks.mlperf_replay import read
from cost_models.collective.algorithms import Setting
from cost_models.collective.library import FITTED, Library
from cost_models.collective.terms import NetworkLevel
from ir.schedules import Collective

SMALLEST = 65536  # bytes; below, launch overhead and protocol switches decide

# bytes/s: links x NCCL's bandwidth of one (src/graph/topo.h, v2.30.7): 12 x 20, 18 x 20.6, 18 x 40.1 GB/s
FABRIC = {"ampere": 240e9, "hopper": 370.8e9, "blackwell": 721.8e9}
# NCCL's nvlsEfficiency (src/graph/tuning.cc, v2.30.7)
SWITCH = {"ampere": 0.0, "hopper": 0.85, "blackwell": 0.74}
SWITCH_LATENCY = 25e-6  # seconds, NVLS over NVLink: NCCL tuner v2.30.7, hwLat
# bytes/s of one GPU's share of the NICs that a series states; OCI's documentation does not state it: 8 x 400 Gbit/s
NIC = {
    "p4de_2n_ar": 6.25e9,
    "a3mega_2n_ag": 25e9,
    "a3ultra_2n_ag": 50e9,
    "a3high_2n_ag": 12.5e9,
    "cw_h100_64_sharp_ar": 50e9,
    "oci_h100_2n_ar": 50e9,
}
PLATEAU = ("cw_h100_64_sharp_ar", "oci_h100_2n_ar")  # 512 MiB and more only: nothing but a bandwidth to see
RING_HOP = 2.7e-6  # seconds, network ring hop of the LL protocol: NCCL tuner v2.30.7, hwLat
START = {"launch": 20e-6, "ramp": 4e-6, "hop": 2e-6, "copy": 6e-13, "efficiency": 0.9}  # the fit begins here
NAMES = tuple(FITTED)


@dataclass(frozen=True, slots=True)
class Series:
    """One collective on one machine by size."""

    id: str
    collective: Collective
    generation: str
    hosts: int
    host_size: int
    fit: tuple[tuple[float, float], ...]  # (bytes, seconds)
    judge: tuple[tuple[float, float], ...]

    @property
    def xla(self) -> bool:
        """Measured through XLA, which copies its buffers."""
        return self.id.startswith("xla_")


def _generation(gpu: str) -> str:
    names = {"A100": "ampere", "H100": "hopper", "H200": "hopper", "B200": "blackwell"}
    return next(generation for name, generation in names.items() if name in gpu)


@cache
def series() -> tuple[Series, ...]:
    """The measured series with their points of :data:`SMALLEST` bytes and more."""

    def points(row: Mapping[str, list[list[float]]], use: str) -> tuple[tuple[float, float], ...]:
        return tuple((size, us * 1e-6) for size, us in row[use] if size >= SMALLEST)

    return tuple(
        Series(
            row["id"],
            row["collective"],
            _generation(row["gpu"]),
            row["nodes"],
            row["gpus_per_node"],
            points(row, "fit"),
            points(row, "judge"),
        )
        for row in read("measured/collectives.json")["series"]
    )


def machine(one: Series, constants: Mapping[str, float]) -> tuple[Library, Setting]:
    """The library and the network of a series under ``constants``."""
    kind = one.generation
    host = NetworkLevel(one.host_size, FABRIC[kind], constants["hop nvlink"], SWITCH[kind], SWITCH_LATENCY)
    library = Library(
        launch=constants[f"launch {kind}"],
        exchange_launch=constants["launch exchange"],
        ramp=constants[f"ramp {kind}"],
        copy=constants["copy"] if one.xla else 0.0,
        adding_copy=constants[f"copy adding {kind}"] if one.xla else 0.0,
    )
    if one.hosts == 1:
        return library, Setting((host,))
    sharp = SWITCH[kind] if "sharp" in one.id else 0.0
    plateau = one.id in PLATEAU
    hop = RING_HOP if plateau else constants[f"hop {one.id}"]
    between = NetworkLevel(one.hosts, NIC[one.id], hop, sharp, hop)
    ramp = constants.get(f"ramp {one.id}", 0.0)
    efficiency = constants[f"efficiency {one.id}"]
    return Library(library.launch, ramp=ramp, efficiency=efficiency), Setting((host, between))


def errors(
    one: Series, points: Sequence[tuple[float, float]], library: Library, setting: Setting
) -> list[float]:
    """(modelled - measured) / measured of each point."""
    return [library.best(one.collective, size, setting).seconds / seconds - 1 for size, seconds in points]


def mean_error(use: str, constants: Mapping[str, float]) -> dict[str, float]:
    """Mean absolute relative error of each series on its rows marked ``use``."""
    return {
        one.id: float(np.mean(np.abs(errors(one, getattr(one, use), *machine(one, constants)))))
        for one in series()
    }


def fit(huber: float = 0.1) -> dict[str, float]:
    """The constants that minimise Huber's loss of the relative errors of the rows marked "fit".

    Levenberg-Marquardt on the logarithms of the constants, from :data:`START` and not from what is stored;
    an error above ``huber`` counts linearly, so that single bad points do not decide.
    """
    logs = np.log([next(v for k, v in START.items() if name.startswith(k)) for name in NAMES])

    def at(x: np.ndarray) -> dict[str, float]:
        found = dict(zip(NAMES, np.exp(x).tolist(), strict=True))
        return {k: min(v, 1.0) if k.startswith("efficiency") else v for k, v in found.items()}

    @cache
    def of(one: Series, library: Library, setting: Setting) -> np.ndarray:
        return np.array(errors(one, one.fit, library, setting))

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([of(one, *machine(one, at(x))) for one in series()])

    def loss(r: np.ndarray) -> float:
        size = np.abs(r)
        return float(np.where(size < huber, r * r, 2 * huber * size - huber * huber).sum())

    damping, here = 1e-2, residuals(logs)
    for _ in range(60):
        steps = 1e-5 * np.eye(len(logs))
        slopes = np.stack([(residuals(logs + step) - here) / 1e-5 for step in steps], axis=1)
        weight = np.minimum(1.0, huber / np.maximum(np.abs(here), 1e-12))
        normal, gradient = slopes.T @ (weight[:, None] * slopes), slopes.T @ (weight * here)
        while damping < 1e8:
            damped = normal + damping * np.diag(np.diag(normal) + 1e-6 * normal.max())
            move = np.clip(-np.linalg.solve(damped, gradient), -0.7, 0.7)
            tried = residuals(logs + move)
            if loss(tried) < loss(here):
                break
            damping *= 4
        else:
            break
        gained = loss(here) - loss(tried)
        logs, here, damping = logs + move, tried, max(damping / 3, 1e-9)
        if gained < 1e-9 * loss(here):
            break
    return at(logs)
