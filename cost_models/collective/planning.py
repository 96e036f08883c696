"""The network of a topology as collectives see it, and the library that runs on it.

Bandwidths are what the calibration says that collectives reach. On GPUs, launch, hop and ramp are the constants
fitted on NCCL (:data:`cost_models.collective.library.FITTED`); a hop is never above the link's own latency. On
CPUs they are the calibration's and the link's, which ``planner calibrate`` measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.calibration import Calibration
from cost_models.collective.algorithms import Priced, Setting
from cost_models.collective.library import FITTED, NCCL_ALGORITHMS, Library
from cost_models.collective.terms import NetworkLevel, ranks_of, used
from cost_models.step import DenseReduction
from ir.errors import InputError
from ir.schedules import Collective
from ir.topology import Link, Topology

# NCCL's nvlsEfficiency (src/graph/tuning.cc, v2.30.7), by the NVLink generation that came with the switch
_SWITCH = {"nvlink4": 0.85, "nvlink5": 0.74}
_SWITCH_LATENCY = 25e-6  # seconds, NVLS over NVLink: NCCL tuner v2.30.7, hwLat
_GENERATIONS = {"A100": "ampere", "V100": "ampere", "B200": "blackwell", "GB200": "blackwell"}

# What frameworks get without asking: NCCL's algorithms on GPUs, gloo's ring on CPUs.
_LIBRARY: dict[Collective, dict[str, tuple[str, ...]]] = {
    "all_reduce": {"gpu": tuple(NCCL_ALGORITHMS), "cpu": ("ring",)},
    "all_to_all": {"gpu": ("direct",), "cpu": ("direct",)},
    "reduce_scatter": {"gpu": ("channel_ring",), "cpu": ("ring",)},
    "all_gather": {"gpu": ("channel_ring",), "cpu": ("ring",)},
}
# What codegen.runtime.collectives sends as point-to-point messages.
SCHEDULED: dict[Collective, tuple[str, ...]] = {
    "all_reduce": (
        "ring",
        "hierarchical",
        "doubling_on_top",
        "recursive_doubling",
        "halving_doubling",
        "direct",
        "tree",
    ),
    "all_to_all": ("direct", "pairwise", "rail", "rail_bruck"),
    "reduce_scatter": ("ring", "hierarchical", "direct"),
    "all_gather": ("ring", "hierarchical", "bruck", "direct"),
}
# Members up to which everybody to everybody is offered: the forms know no cost of posting a message and no incast,
# so that it would always win. 8 GPUs behind NVLink switches are where it is used (NCCL, vLLM's two-shot all-reduce).
_DIRECT = 8
_ONE_LEVEL: tuple[str, ...] = (
    "hierarchical",
    "doubling_on_top",
    "rail",
)  # on one level, others by another name


@dataclass(frozen=True, slots=True)
class Communication:
    """A network and a library on it."""

    kind: str  # of device: "gpu" or "cpu"
    library: Library
    setting: Setting

    @property
    def ranks(self) -> int:
        """Ranks on the network."""
        return ranks_of(self.setting.levels)

    def candidates(self, collective: Collective, scheduled: bool) -> tuple[str, ...]:
        """Names of the algorithms that can run: the library's, or with ``scheduled`` the project's own."""
        if not scheduled:
            return _LIBRARY[collective][self.kind]
        levels = used(self.setting.levels)
        left_out = _ONE_LEVEL if len(levels) == 1 else ()
        if collective != "all_to_all" and max((level.fanout for level in levels), default=1) > _DIRECT:
            left_out += ("direct",)
        return tuple(name for name in SCHEDULED[collective] if name not in left_out)

    def ranked(
        self, collective: Collective, size: float, scheduled: bool = False, only: str = ""
    ) -> list[Priced]:
        """The algorithms that can run ``size`` bytes (or ``only`` that one), the fastest first.

        Raises:
            InputError: ``only`` names an algorithm that this engine does not run on this network.
        """
        names = self.candidates(collective, scheduled)
        if only:
            known = SCHEDULED[collective] if scheduled else names
            if only not in known:
                raise InputError(
                    f"{collective} by {only!r} is not run by {'schedules' if scheduled else 'the library'}; choose one "
                    f"of {', '.join(known)}, or the other dense_engine"
                )
            names = (only,)
        found = self.library.ranked(collective, size, self.setting, names)
        if not found:
            raise InputError(
                f"{collective} by {only!r} needs what this network lacks; choose another algorithm"
            )
        return found


def _hop(link: Link, gpu: bool) -> float:
    if not gpu:
        return link.latency
    fabric = link.name.startswith(("nvlink", "xgmi", "pcie"))
    return min(link.latency, FITTED["hop nvlink" if fabric else "hop a3ultra_2n_ag"])


def communication(topology: Topology, calibration: Calibration) -> Communication:
    """How the ranks of ``topology`` communicate; levels that one link joins are one level."""
    gpu = topology.device.kind == "gpu"
    levels: list[NetworkLevel] = []
    last = None
    for level in topology.levels:
        link = level.link
        fanout = levels.pop().fanout * level.fanout if last == link else level.fanout
        levels.append(
            NetworkLevel(
                fanout,
                calibration.link_bandwidth(link),
                _hop(link, gpu),
                _SWITCH.get(link.name, 0.0) if gpu else 0.0,
                _SWITCH_LATENCY,
            )
        )
        last = link
    if not gpu:
        return Communication("cpu", Library(calibration.collective_seconds), Setting(tuple(levels)))
    kind = next((v for k, v in _GENERATIONS.items() if topology.device.name.startswith(k)), "hopper")
    ramp = FITTED[f"ramp {kind}"] if topology.hosts == 1 else FITTED["ramp a3ultra_2n_ag"]
    library = Library(FITTED[f"launch {kind}"], FITTED["launch exchange"], ramp)
    return Communication("gpu", library, Setting(tuple(levels)))


def dense_reduction(
    net: Communication, bucket_bytes: float, scheduled: bool, only: str = ""
) -> DenseReduction:
    """Dense gradients in buckets of that size, each summed by the fastest algorithm that can run, or by one."""

    def price(size: float) -> dict[str, float]:
        return net.ranked("all_reduce", size, scheduled, only)[0].terms.to_dict()

    return DenseReduction(bucket_bytes, price)
