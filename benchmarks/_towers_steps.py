"""Steps of benchmarks/towers.py: flat and tower plans on the emulated cluster, predicted and measured."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import planner
from benchmarks._cluster_run import calibrate, run_worker
from benchmarks._report import Report
from benchmarks._towers_worker import FLAT, LINK, STREAM, model
from benchmarks.cluster import Cluster
from cost_models.calibration import Calibration
from ir.compression import CompressionRequest
from ir.constraints import Constraints
from ir.topology import Level, Link, Topology
from ir.towers import TowerDecision, TowerRequest
from ir.units import parse_bandwidth
from ir.workload import Workload

BATCH = 1024  # samples of a rank
SHARES = (0.3, 0.5, 0.7)  # of the flat step that the slow link is to take
BUDGET = 0.02  # of the embeddings' energy that tower modules may lose; the planner chooses their widths by it
CODEC = ("eb_entropy", 0.1)  # error bound over the root mean square: 25 dB, as in compressed_training.py
FAST = "20Gbps"  # more than the cores move: the links cost nothing but their processing
WITHIN = 0.2  # of the measured step: how far predictions may be off
PUBLISHED = 1.9  # at most, on 64 H100 (arXiv 2403.00877, abstract)
WORKER = Path(__file__).with_name("_towers_worker.py")
SPTT, MODULES, CODED = "SPTT", "SPTT+TM", "SPTT+TM+codec"


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


def measure(cluster: Cluster, made: Mapping[str, planner.Plan], **how: Any) -> Any:
    """What the ranks measured of each plan; ``how``: settings of :mod:`benchmarks._towers_worker`."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "plans": {name: plan.to_dict() for name, plan in made.items()},
            "batch": BATCH,
            "answers": folder,
            "fast": parse_bandwidth(FAST),
            "slow": cluster.link.bandwidth,
            **how,
        }
        return run_worker(cluster, WORKER, settings, on_line=_links_of(cluster, Path(folder)))


def _links_of(cluster: Cluster, folder: Path) -> Callable[[str], None]:
    """Does what a worker asks for in a line of text: another speed of all links, answered by an empty file."""

    def heard(line: str) -> None:
        if LINK in line:
            number, speed = line.split(LINK, 1)[1].split()
            cluster.network.set_bandwidth(float(speed))
            (folder / number).touch()

    return heard


def steps_at_speeds(
    report: Report, setting: Setting, shares: Sequence[float], links: Sequence[str], quick: bool
) -> None:
    """Rows of every speed and variant of one cluster, and the claims; raises ClusterUnavailable.

    ``shares`` are of the flat step that the slow link is to take; unused where speeds are given as ``links``.
    """
    decision = setting.decision()
    amount = {"turns": 2, "steps": 4} if quick else {"turns": 3, "steps": 5}
    probed: dict[str, Any] = {"speeds": sorted(parse_bandwidth(link) for link in links), "probes": []}
    if not links:
        flat = setting.plan(FLAT, setting.unmeasured(), None)
        # fast at first, so that connections agree on the largest frames
        with Cluster(setting.hosts, setting.ranks, FAST) as cluster:
            probed = measure(cluster, {FLAT: flat}, shares=sorted(shares, reverse=True), **amount)
    sizes = " + ".join(str(len(tower.features)) for tower in decision.towers)
    tried = ", ".join(f"{8 * speed / 1e6:.0f} Mbit/s {share:.0%}" for speed, share in probed["probes"])
    report.note(
        f"{setting.name}: {BATCH} samples a rank, {STREAM.dense} dense features, {len(STREAM.rows)} tables of "
        f"{decision.towers[0].dim} columns, towers of {sizes} tables that send {decision.towers[0].columns_out} columns; "
        f"shares tried: {tried or 'none'}; published for other hardware: at most {PUBLISHED}x"
    )
    print(f"done: {report.notes[-1]}", file=sys.stderr, flush=True)
    found = [_at_speed(report, setting, speed, decision, amount) for speed in probed["speeds"]]
    report.claim(f"{setting.name}_speed_up_slowest", found[0]["faster"], PUBLISHED, ">=")
    apart = max(one["apart"] for one in found)
    report.claim(f"{setting.name}_exchange_alone_loss_difference", apart, 1e-5, "<=")
    report.claim(f"{setting.name}_furthest_prediction", max(one["off"] for one in found), WITHIN, "<=")


def _at_speed(
    report: Report, setting: Setting, speed: float, decision: TowerDecision, amount: Mapping[str, int]
) -> dict[str, float]:
    """Rows of one speed; the speed-up with codec, SPTT's difference in loss to flat, the furthest prediction."""
    inter = f"{8 * speed / 1e6:.0f}Mbps"
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster(setting.hosts, setting.ranks, inter) as cluster,
    ):
        topology, calibration = calibrate(cluster, Path(folder) / "cluster.yaml", repeats=2)
        made = setting.plans(topology, calibration)
        found = measure(cluster, made, **amount)
    section, codecs = made[CODED].decisions.towers, made[CODED].decisions.compression
    assert section is not None
    assert codecs is not None
    same = {(frozenset(t.features), t.width_out) for t in section.towers} == {
        (frozenset(t.features), t.width_out) for t in decision.towers
    }
    flat = found[FLAT]
    share = 1 - flat["fast"] / flat["step"]
    for name, one in found.items():
        report.row(
            cluster=setting.name,
            link=inter,
            share=share,
            variant=name,
            step_ms=1e3 * one["step"],
            faster=flat["step"] / one["step"],
            predicted_ms=1e3 * made[name].timeline.step,
            predicted_faster=made[FLAT].timeline.step / made[name].timeline.step,
            slow_link_MB=one["sent"] / 1e6,
        )
        print(f"done: {report.rows[-1]}", file=sys.stderr, flush=True)
    used = [way for way in ("forward", "backward") if codecs.uses(way)]  # type: ignore[arg-type]
    report.note(
        f"{setting.name}, {inter}: the slow link takes {share:.0%} of the flat step, which is "
        f"{1e3 * flat['fast']:.0f} ms on fast links; the plan uses its codec {' and '.join(used) or 'nowhere'}, ratio "
        f"{found[CODED]['ratio']:.1f}, predicted {codecs.tables[0].ratio:.1f}; towers and widths "
        f"{'are those of' if same else 'DIFFER FROM those of'} the accuracy part"
    )
    apart = max(abs(a - b) for a, b in zip(flat["loss"], found[SPTT]["loss"], strict=True))
    off = max(abs(made[name].timeline.step / one["step"] - 1) for name, one in found.items())
    return {"faster": flat["step"] / found[CODED]["step"], "apart": apart, "off": off}
