"""What an implementation adds to the closed forms: launch, hop, ramp, copies; fitted on measurements.

A collective of a library costs::

    launch + closed form(hop, bandwidth * efficiency) + 2 sqrt(transfer * ramp) + copied * bytes

The ramp is the price of slices: with K slices of a transfer t, and o seconds a slice and stage over d
stages, t (1 + d/K) + K o is least at K = sqrt(d t / o) and then t + 2 sqrt(t * d o); ramp = d o. It is the
optimum of the pipelined chain in another guise. Local copies: an all-gather or reduction copies the part
that it keeps, 1/n of the buffer; a collective in the switch passes all of it through registered buffers.

The constants below are fitted by ``benchmarks/fidelity.py collectives`` on the rows of
``planner/data/measured/collectives.json`` marked "fit"; it prints the errors on those marked "judge".
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cost_models.collective.algorithms import Priced, Setting, ranked
from cost_models.collective.terms import Terms, ranks_of
from ir.schedules import Collective

# what NCCL runs by itself, with the value of NCCL_ALGO that asks for it
NCCL_ALGORITHMS = {"channel_ring": "Ring", "overlapped": "Tree", "in_switch": "NVLS"}


@dataclass(frozen=True, slots=True)
class Library:
    """The constants of one implementation on one kind of machine.

    Attributes:
        launch: seconds before the first byte.
        exchange_launch: seconds that an all-to-all takes on top.
        ramp: seconds; see the module.
        copy: seconds a byte copied inside the device.
        adding_copy: the same where the copy adds.
        efficiency: fraction of the bottleneck that is reached when hosts take part.
    """

    launch: float
    exchange_launch: float = 0.0
    ramp: float = 0.0
    copy: float = 0.0
    adding_copy: float = 0.0
    efficiency: float = 1.0

    def terms(self, collective: Collective, priced: Priced, size: float, setting: Setting) -> Terms:
        """The cost of a priced algorithm as this library runs it."""
        n = ranks_of(setting.levels)
        if n == 1:
            return Terms()
        launch = self.launch + (self.exchange_launch if collective == "all_to_all" else 0.0)
        across = sum(level.fanout > 1 for level in setting.levels[1:])
        moved = priced.terms.bandwidth / (self.efficiency if across else 1.0)
        return replace(
            priced.terms,
            latency=priced.terms.latency + launch,
            bandwidth=moved,
            ramp=2 * math.sqrt(moved * self.ramp),
            local=self._copied(collective, priced.algorithm, size, n),
        )

    def _copied(self, collective: Collective, algorithm: str, size: float, n: int) -> float:
        if algorithm == "in_switch":
            return size * self.copy
        if collective in ("all_reduce", "reduce_scatter"):
            return size / n * self.adding_copy
        return size / n * self.copy if collective == "all_gather" else 0.0

    def ranked(
        self, collective: Collective, size: float, setting: Setting, names: tuple[str, ...] = ()
    ) -> list[Priced]:
        """The algorithms as this library runs them, the fastest first."""
        found = [
            replace(priced, terms=self.terms(collective, priced, size, setting))
            for priced in ranked(collective, size, setting, names)
        ]
        return sorted(found, key=lambda priced: priced.seconds)

    def best(self, collective: Collective, size: float, setting: Setting) -> Priced:
        """What the library itself would run: its fastest algorithm."""
        names = {
            "all_reduce": tuple(NCCL_ALGORITHMS),
            "all_to_all": ("direct",),
            "all_gather": ("channel_ring",),
            "reduce_scatter": ("channel_ring",),
        }[collective]
        return self.ranked(collective, size, setting, names)[0]


# Seconds, seconds a byte, or fractions; each fitted on the rows of collectives.json marked "fit" that it names.
FITTED: dict[str, float] = {
    "launch ampere": 2.1e-05,  # fitted on A100, one host
    "launch hopper": 9.847e-06,  # fitted on H100 and H200, one host
    "launch blackwell": 2.056e-05,  # fitted on B200, one host
    "launch exchange": 1.464e-05,  # fitted on the all-to-all series of H100
    "hop nvlink": 1.647e-06,  # fitted on all series of one host (NCCL's tuner: 0.6 LL, 1.9 LL128, 3.4 Simple)
    "ramp ampere": 2.033e-05,  # fitted on A100, one host
    "ramp hopper": 4.603e-06,  # fitted on H100 and H200, one host
    "ramp blackwell": 4.601e-06,  # fitted on B200, one host
    "copy": 6.238e-13,  # fitted on the series taken through XLA
    "copy adding hopper": 2.124e-12,  # fitted on the series taken through XLA on H100
    "copy adding blackwell": 7.32e-13,  # fitted on the series taken through XLA on B200
    "hop p4de_2n_ar": 6.843e-05,  # fitted on AWS p4de, 2 hosts
    "ramp p4de_2n_ar": 1.925e-04,  # fitted on AWS p4de, 2 hosts
    "efficiency p4de_2n_ar": 1.0,  # fitted on AWS p4de, 2 hosts
    "hop a3mega_2n_ag": 7.094e-06,  # fitted on GCP A3 Mega, 2 hosts
    "ramp a3mega_2n_ag": 6.28e-07,  # fitted on GCP A3 Mega, 2 hosts
    "efficiency a3mega_2n_ag": 0.9481,  # fitted on GCP A3 Mega, 2 hosts
    "hop a3ultra_2n_ag": 3.274e-06,  # fitted on GCP A3 Ultra, 2 hosts
    "ramp a3ultra_2n_ag": 3.296e-06,  # fitted on GCP A3 Ultra, 2 hosts
    "efficiency a3ultra_2n_ag": 0.8695,  # fitted on GCP A3 Ultra, 2 hosts
    "hop a3high_2n_ag": 6.07e-05,  # fitted on GCP A3 High, 2 hosts, whose TCP shows no ramp
    "efficiency a3high_2n_ag": 1.0,  # fitted on GCP A3 High, 2 hosts
    "efficiency cw_h100_64_sharp_ar": 0.6769,  # fitted on CoreWeave H100, 8 hosts
    "efficiency oci_h100_2n_ar": 0.8851,  # fitted on OCI H100, 2 hosts
}
