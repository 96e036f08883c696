"""Steps of benchmarks/towers.py: flat and tower plans on the emulated cluster, predicted and measured."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import planner
from benchmarks._cluster_run import calibrate, run_worker
from benchmarks._report import Report
from benchmarks._towers_worker import STREAM, model
from benchmarks.cluster import Cluster
from cost_models.calibration import Calibration
from cost_models.embedding import phase_overheads
from cost_models.towers import tower_seconds, tower_timeline
from ir.constraints import Constraints
from ir.topology import Level, Link, Topology
from ir.towers import TowerDecision, TowerRequest
from ir.workload import Workload
from passes.towers import planned_reduction

BATCH = 1024  # samples of a rank
SHARES = (0.3, 0.5, 0.7)  # of the flat step that the slow link is to take
BUDGET = 0.02  # of the embeddings' energy that tower modules may lose; the planner chooses their widths by it
CODEC = ("eb_entropy", 0.1)  # error bound over the root mean square: 25 dB, as in compressed_training.py
FAST = "20Gbps"  # more than the cores move: the links cost nothing but their processing
NEAR, TRIES = 0.05, 3  # of the share of the flat step that the link really takes
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
        """The planner's plan of a variant: flat, or towers without or with modules."""
        towers = None
        if name != FLAT:
            towers = TowerRequest(interactions=str(self.sample), always=True)
        if name in (MODULES, CODED):
            assert towers is not None
            towers = replace(towers, module="projection", accuracy_budget=BUDGET)
        return planner.compile(
            model("meta"),
            topology,
            self.workload(),
            constraints=Constraints(towers=towers),
            calibration=calibration,
            time_limit=2.0,
        )

    def plans(self, topology: Topology, calibration: Calibration) -> dict[str, planner.Plan]:
        """Those of all variants; a codec between peers changes nothing in the plan."""
        made = {name: self.plan(name, topology, calibration) for name in (FLAT, SPTT, MODULES)}
        return {**made, CODED: made[MODULES]}

    def decision(self) -> TowerDecision:
        """Towers and widths that the modules of the accuracy part are made of."""
        section = self.plan(MODULES, self.unmeasured(), None).decisions.towers
        assert section is not None
        return section


def predicted(name: str, plan: planner.Plan, calibration: Calibration, codec: Mapping[str, float]) -> float:
    """Modelled seconds of a step; the pass does not model a codec between peers, this adds it.

    A codec divides the exchange between peers by its ratio and adds the seconds of coding what a rank
    sends and decoding what it receives, forward and backward.
    """
    section = plan.decisions.towers
    if name != CODED or section is None:
        return plan.timeline.step
    from planner.zoo.multi_tower import over_arch_model

    work, topology, towers = plan.workload, plan.topology, section.towers
    overheads = phase_overheads(topology, work, calibration, "train")
    phases = dict(
        tower_seconds(
            plan.table_plans, towers, section.module, topology, work, calibration, "train", overheads
        ).phases
    )
    widest = max(tower.width_out for tower in towers)
    # (B / G) O x (T - 1) / T bytes leave a rank, and as many arrive where towers are alike
    size = work.global_batch / towers[0].ranks * widest * 4 * (len(towers) - 1) / len(towers)
    coding = size * (1 / codec["encode"] + 1 / codec["decode"])
    for phase in ("peer", "peer_gradient"):
        phases[phase] = phases[phase] / codec["ratio"] + coding
    above = over_arch_model(model("meta"), sum(tower.vectors_out for tower in towers), towers[0].columns_out)
    reduction = planned_reduction(topology, calibration, plan.decisions, plan.constraints)
    return tower_timeline(above, phases, topology, work, calibration, "train", reduction).step


def codec_speed(columns: int, ranks: int) -> dict[str, float]:
    """Ratio, and bytes/s one way and the other of so many ranks at once, on normal vectors of so many columns."""
    import torch

    from codegen.runtime.codecs import absolute_bound, encode
    from codegen.runtime.codecs.sampling import measure_speeds

    torch.set_num_threads(1)
    name, relative = CODEC
    vectors = torch.randn(BATCH * 8, columns, generator=torch.Generator().manual_seed(0))
    (speed,) = measure_speeds([vectors], ("eb_entropy",), relative=relative, ranks=ranks)
    sent = len(encode(vectors, name, absolute_bound(vectors, relative)))
    return {"ratio": vectors.nbytes / sent, "encode": speed.encode, "decode": speed.decode}


def measure(
    cluster: Cluster, made: Mapping[str, planner.Plan], turns: int, steps: int
) -> dict[str, dict[str, Any]]:
    """What the ranks measured of each plan."""
    settings = {
        "plans": {name: plan.to_dict() for name, plan in made.items()},
        "codecs": {CODED: CODEC},
        "batch": BATCH,
        "turns": turns,
        "steps": steps,
    }
    found: dict[str, dict[str, Any]] = run_worker(cluster, WORKER, settings)
    return found


def steps_at_speeds(report: Report, setting: Setting, shares: Sequence[float], quick: bool) -> None:
    """Rows of every speed and variant of one cluster, and the claims; raises ClusterUnavailable.

    ``shares`` are of the flat step that the slow link is to take, the slowest link last.
    """
    decision = setting.decision()
    codec = codec_speed(decision.towers[0].columns_out, setting.hosts * setting.ranks)
    turns, steps = (2, 4) if quick else (3, 5)
    with Cluster(setting.hosts, setting.ranks, FAST) as cluster:
        flat = setting.plan(FLAT, setting.unmeasured(), None)
        fast = measure(cluster, {FLAT: flat}, turns, steps)[FLAT]
    sizes = " + ".join(str(len(tower.features)) for tower in decision.towers)
    report.note(
        f"{setting.name}: {BATCH} samples a rank, {STREAM.dense} dense features, {len(STREAM.rows)} tables of "
        f"{decision.towers[0].dim} columns, towers of {sizes} tables that send {decision.towers[0].columns_out} columns; "
        f"on fast links the flat step is {1e3 * fast['step']:.1f} ms and a host sends {fast['sent'] / 1e6:.2f} MB; "
        f"published for other hardware: at most {PUBLISHED}x"
    )
    found: dict[str, float] = {}
    for share in shares:
        speed = _speed(setting, flat, fast, share, (turns, steps))
        one = _at_speed(report, setting, speed, fast["step"], decision, codec, (turns, steps))
        found = {**one, "apart": max(one["apart"], found.get("apart", 0.0))}
    report.claim(f"{setting.name}_speed_up_slowest", found["faster"], PUBLISHED, ">=")
    report.claim(f"{setting.name}_exchange_alone_loss_difference", found["apart"], 1e-5, "<=")


def _speed(
    setting: Setting, flat: planner.Plan, fast: Mapping[str, Any], share: float, amount: tuple[int, int]
) -> float:
    """Bytes/s of the slow link at which it takes ``share`` of the flat step, within :data:`NEAR`.

    Sending also hides behind other work, so the bytes over the time to spare are a first guess only; the next
    ones keep what the last one showed to be hidden.
    """
    target = fast["step"] / (1 - share)
    speed = fast["sent"] / (target - fast["step"])
    for _ in range(TRIES):
        with Cluster(setting.hosts, setting.ranks, f"{8 * speed / 1e6:.0f}Mbps") as cluster:
            step = measure(cluster, {FLAT: flat}, *amount)[FLAT]["step"]
        if abs(1 - fast["step"] / step - share) <= NEAR:
            break
        rest = min(step - fast["sent"] / speed, 0.9 * target)
        speed = fast["sent"] / (target - rest)
    return speed


def _at_speed(
    report: Report,
    setting: Setting,
    speed: float,
    rest: float,
    decision: TowerDecision,
    codec: Mapping[str, float],
    amount: tuple[int, int],
) -> dict[str, float]:
    """Rows of one speed; the speed-up of modules with codec, and the difference in loss of SPTT and flat."""
    inter = f"{8 * speed / 1e6:.0f}Mbps"
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster(setting.hosts, setting.ranks, inter) as cluster,
    ):
        topology, calibration = calibrate(cluster, Path(folder) / "cluster.yaml", repeats=2)
        made = setting.plans(topology, calibration)
        found = measure(cluster, made, *amount)
    section = made[MODULES].decisions.towers
    assert section is not None
    same = {(frozenset(t.features), t.width_out) for t in section.towers} == {
        (frozenset(t.features), t.width_out) for t in decision.towers
    }
    model_steps = {name: predicted(name, plan, calibration, codec) for name, plan in made.items()}
    flat = found[FLAT]
    for name, one in found.items():
        report.row(
            cluster=setting.name,
            link=inter,
            variant=name,
            step_ms=1e3 * one["step"],
            faster=flat["step"] / one["step"],
            predicted_ms=1e3 * model_steps[name],
            predicted_faster=model_steps[FLAT] / model_steps[name],
            slow_link_MB=one["sent"] / 1e6,
        )
        print(f"done: {report.rows[-1]}", file=sys.stderr, flush=True)
    report.note(
        f"{setting.name}, {inter}: the slow link takes {1 - rest / flat['step']:.0%} of the flat step; codec ratio "
        f"{found[CODED]['ratio']:.1f}, predicted with {codec['ratio']:.1f}; towers and widths "
        f"{'are those of' if same else 'DIFFER FROM those of'} the accuracy part"
    )
    apart = max(abs(a - b) for a, b in zip(flat["loss"], found[SPTT]["loss"], strict=True))
    return {"faster": flat["step"] / found[CODED]["step"], "apart": apart}
