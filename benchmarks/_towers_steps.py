"""Steps of benchmarks/towers.py: flat and tower plans on the emulated cluster, predicted and measured."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import planner
from benchmarks._cluster_run import calibrate, run_worker
from benchmarks._report import Report
from benchmarks._towers_worker import STREAM, model
from benchmarks.cluster import Cluster
from cost_models.calibration import Calibration
from ir.compression import CompressionRequest
from ir.constraints import Constraints
from ir.topology import Level, Link, Topology
from ir.towers import TowerDecision, TowerRequest
from ir.workload import Workload

BATCH = 1024  # samples of a rank
SHARES = (0.3, 0.5, 0.7)  # of the flat step that the slow link is to take
BUDGET = 0.02  # of the embeddings' energy that tower modules may lose; the planner chooses their widths by it
CODEC = ("eb_entropy", 0.1)  # error bound over the root mean square: 25 dB, as in compressed_training.py
FAST = "20Gbps"  # more than the cores move: the links cost nothing but their processing
NEAR, TRIES = 0.03, 6  # of the share of the flat step that the link really takes
WITHIN = 0.2  # of the measured step: how far predictions may be off
PUBLISHED = 1.9  # at most, on 64 H100 (arXiv 2403.00877, abstract)
WORKER = Path(__file__).with_name("_towers_worker.py")
FLAT, SPTT, MODULES, CODED = "flat TorchRec", "SPTT", "SPTT+TM", "SPTT+TM+codec"


@dataclass(frozen=True)
class Setting:
    """A cluster, and the pooled embeddings that its towers and their widths are learned from."""

    hosts: int
    ranks: int
    sample: Path

    @property
    def name(self) -> str:
        """As in the rows."""
        return f"{self.hosts}x{self.ranks}"

    def workload(self) -> Workload:
        """Statistics of batches that nobody trains on."""
        batches = [STREAM.samples(BATCH, 900 + n).batch(slice(None))[1] for n in range(4)]
        measured = Workload.from_batches(batches, world_size=self.hosts * self.ranks)
        return replace(measured, optimizer="sgd")

    def unmeasured(self) -> Topology:
        """The cluster before it is calibrated; the plan that runs on fast links is made for it."""
        link = Link("cluster", 125e6 / self.ranks, 60e-6, "1 Gbit/s over the ranks of a host")
        base = planner.topology(f"local-{self.ranks}")
        return replace(base, name="cluster", levels=(base.levels[0], Level("cluster", self.hosts, link)))

    def plan(self, name: str, topology: Topology, calibration: Calibration | None) -> planner.Plan:
        """The planner's plan of a variant: flat, or towers without or with modules and codecs."""
        towers = None
        if name != FLAT:
            towers = TowerRequest(interactions=str(self.sample), always=True)
        if name in (MODULES, CODED):
            assert towers is not None
            towers = replace(towers, module="projection", accuracy_budget=BUDGET)
        compression = None
        if name == CODED:
            codec, bound = CODEC
            error = bound**2 / 3  # of errors that are uniform within the bound
            compression = CompressionRequest(
                codecs=("none", codec), error_budget=error, gradient_budget=error
            )
        return planner.compile(
            model("meta"),
            topology,
            self.workload(),
            constraints=Constraints(towers=towers, compression=compression),
            calibration=calibration,
            time_limit=2.0,
        )

    def plans(self, topology: Topology, calibration: Calibration) -> dict[str, planner.Plan]:
        """Those of all variants."""
        return {name: self.plan(name, topology, calibration) for name in (FLAT, SPTT, MODULES, CODED)}

    def decision(self) -> TowerDecision:
        """Towers and widths that the modules of the accuracy part are made of."""
        section = self.plan(MODULES, self.unmeasured(), None).decisions.towers
        assert section is not None
        return section


def measure(
    cluster: Cluster, made: Mapping[str, planner.Plan], turns: int, steps: int
) -> dict[str, dict[str, Any]]:
    """What the ranks measured of each plan."""
    settings = {
        "plans": {name: plan.to_dict() for name, plan in made.items()},
        "batch": BATCH,
        "turns": turns,
        "steps": steps,
    }
    found: dict[str, dict[str, Any]] = run_worker(cluster, WORKER, settings)
    return found


def steps_at_speeds(report: Report, setting: Setting, shares: Sequence[float], quick: bool) -> None:
    """Rows of every speed and variant of one cluster, and the claims; raises ClusterUnavailable.

    ``shares`` are of the flat step that the slow link is to take.
    """
    decision = setting.decision()
    amount = (2, 4) if quick else (3, 5)
    flat = setting.plan(FLAT, setting.unmeasured(), None)
    fast = _flat_step(setting, flat, FAST, amount)
    sizes = " + ".join(str(len(tower.features)) for tower in decision.towers)
    report.note(
        f"{setting.name}: {BATCH} samples a rank, {STREAM.dense} dense features, {len(STREAM.rows)} tables of "
        f"{decision.towers[0].dim} columns, towers of {sizes} tables that send {decision.towers[0].columns_out} columns; "
        f"on fast links the flat step is {1e3 * fast['step']:.1f} ms and a host sends {fast['sent'] / 1e6:.2f} MB; "
        f"published for other hardware: at most {PUBLISHED}x"
    )
    seen: list[Probe] = []
    found: list[dict[str, float]] = []
    for share in sorted(shares, reverse=True):
        speed = slow_link(
            share, fast, seen, lambda at: _flat_step(setting, flat, f"{8 * at / 1e6:.0f}Mbps", amount)["step"]
        )
        found.append(_at_speed(report, setting, speed, flat, decision, amount))
    report.claim(f"{setting.name}_speed_up_slowest", found[0]["faster"], PUBLISHED, ">=")
    apart = max(one["apart"] for one in found)
    report.claim(f"{setting.name}_exchange_alone_loss_difference", apart, 1e-5, "<=")
    report.claim(f"{setting.name}_furthest_prediction", max(one["off"] for one in found), WITHIN, "<=")


@dataclass(frozen=True)
class Probe:
    """A speed of the slow link, bytes/s, and the share of the flat step that it takes."""

    speed: float
    share: float

    @property
    def odds(self) -> float:
        """Log of the seconds that the link adds over those of the rest; at least those of a share of 1 %."""
        share = min(max(self.share, 0.01), 0.99)
        return math.log(share / (1 - share))


def slow_link(
    share: float, fast: Mapping[str, float], seen: list[Probe], step_at: Callable[[float], float]
) -> float:
    """Bytes/s at which the link takes ``share`` of the flat step, within :data:`NEAR`.

    The share falls as the link gets faster, so the search keeps the closest speeds on both sides and interpolates the
    odds of the share between them, which are about inverse to the speed, both in logarithms.

    Args:
        share: to be reached.
        fast: ``step`` (seconds) and ``sent`` (bytes of a host) on links that cost nothing.
        seen: probes so far; those made here are added.
        step_at: measures the flat step at a speed.
    """
    wanted = Probe(0.0, share).odds
    if not seen:
        speed = fast["sent"] * (1 - share) / (share * fast["step"])
    for _ in range(TRIES):
        if seen:
            slower = max((p for p in seen if p.odds >= wanted), key=lambda p: p.speed, default=None)
            faster = min((p for p in seen if p.odds < wanted), key=lambda p: p.speed, default=None)
            speed = _between(wanted, slower, faster)
        seen.append(Probe(speed, 1 - fast["step"] / step_at(speed)))
        print(f"done: {8 * speed / 1e6:.0f} Mbit/s takes {seen[-1].share:.0%}", file=sys.stderr, flush=True)
        if abs(seen[-1].share - share) <= NEAR:
            break
    return min(seen, key=lambda probe: abs(probe.share - share)).speed


def _between(wanted: float, slower: Probe | None, faster: Probe | None) -> float:
    """The speed at which the odds should be ``wanted``, from a probe on either side or from one alone."""
    if slower is None or faster is None:
        one = slower or faster
        assert one is not None
        return one.speed * math.exp(min(max(one.odds - wanted, -2.0), 2.0))
    part = (slower.odds - wanted) / max(slower.odds - faster.odds, 1e-9)
    part = min(max(part, 0.1), 0.9)  # noise must not stall the search at an end
    return float(slower.speed * (faster.speed / slower.speed) ** part)


def _flat_step(setting: Setting, flat: planner.Plan, link: str, amount: tuple[int, int]) -> Mapping[str, Any]:
    with Cluster(setting.hosts, setting.ranks, link) as cluster:
        return measure(cluster, {FLAT: flat}, *amount)[FLAT]


def _at_speed(
    report: Report,
    setting: Setting,
    speed: float,
    flat_plan: planner.Plan,
    decision: TowerDecision,
    amount: tuple[int, int],
) -> dict[str, float]:
    """Rows of one speed; the speed-up of modules with codec, the difference in loss of SPTT and flat, the worst prediction.

    The step on fast links is measured again, so that all figures of a speed are of the same minutes.
    """
    inter = f"{8 * speed / 1e6:.0f}Mbps"
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster(setting.hosts, setting.ranks, inter) as cluster,
    ):
        topology, calibration = calibrate(cluster, Path(folder) / "cluster.yaml", repeats=2)
        made = setting.plans(topology, calibration)
        found = measure(cluster, made, *amount)
    fast = _flat_step(setting, flat_plan, FAST, amount)
    section, codecs = made[CODED].decisions.towers, made[CODED].decisions.compression
    assert section is not None
    assert codecs is not None
    same = {(frozenset(t.features), t.width_out) for t in section.towers} == {
        (frozenset(t.features), t.width_out) for t in decision.towers
    }
    flat = found[FLAT]
    for name, one in found.items():
        report.row(
            cluster=setting.name,
            link=inter,
            share=1 - fast["step"] / flat["step"],
            variant=name,
            step_ms=1e3 * one["step"],
            faster=flat["step"] / one["step"],
            predicted_ms=1e3 * made[name].timeline.step,
            predicted_faster=made[FLAT].timeline.step / made[name].timeline.step,
            slow_link_MB=one["sent"] / 1e6,
        )
        print(f"done: {report.rows[-1]}", file=sys.stderr, flush=True)
    used = [way for way in ("forward", "backward") if codecs.uses(way)]
    report.note(
        f"{setting.name}, {inter}: the slow link takes {1 - fast['step'] / flat['step']:.0%} of the flat step; the plan "
        f"uses its codec {' and '.join(used) or 'nowhere'}, ratio {found[CODED]['ratio']:.1f}, predicted "
        f"{codecs.tables[0].ratio:.1f}; towers and widths {'are those of' if same else 'DIFFER FROM those of'} the "
        "accuracy part"
    )
    apart = max(abs(a - b) for a, b in zip(flat["loss"], found[SPTT]["loss"], strict=True))
    off = max(abs(made[name].timeline.step / one["step"] - 1) for name, one in found.items())
    return {"faster": flat["step"] / found[CODED]["step"], "apart": apart, "off": off}
