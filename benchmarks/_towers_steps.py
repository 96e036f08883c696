"""Steps of benchmarks/towers.py: flat and tower plans on the emulated cluster, predicted and measured."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import planner
from benchmarks._cluster_run import calibrate, run_worker
from benchmarks._report import Report
from benchmarks._towers_worker import DIM, STREAM, model
from benchmarks.cluster import Cluster
from cost_models.calibration import Calibration
from cost_models.embedding import phase_overheads
from cost_models.towers import tower_seconds, tower_timeline
from ir.constraints import Constraints
from ir.topology import Level, Link, Topology
from ir.towers import TowerRequest
from ir.workload import Workload

HOSTS, RANKS = 2, 2
BATCH = 512  # samples of a rank
SHARES = (0.3, 0.5, 0.7)  # of the flat step that the slow link is to take
COMPRESSION = 4.0  # vectors in per vector out of a tower module
CODEC = ("eb_entropy", 0.1)  # error bound over the root mean square: 25 dB, as in compressed_training.py
FAST = "20Gbps"  # more than the cores move: the links cost nothing but their processing
PUBLISHED = 1.9  # at most, on 64 H100 (arXiv 2403.00877, abstract)
WORKER = Path(__file__).with_name("_towers_worker.py")
FLAT, SPTT, MODULES, CODED = "flat TorchRec", "SPTT", "SPTT+TM", "SPTT+TM+codec"


def workload() -> Workload:
    """Statistics of batches that nobody trains on."""
    batches = [STREAM.samples(BATCH, 900 + n).batch(slice(None))[1] for n in range(4)]
    return replace(Workload.from_batches(batches, world_size=HOSTS * RANKS), optimizer="sgd")


def unmeasured() -> Topology:
    """The cluster before it is calibrated; the plan that runs on fast links is made for it."""
    base = planner.topology(f"local-{RANKS}")
    link = Link("cluster", 125e6 / RANKS, 60e-6, "1 Gbit/s over the ranks of a host")
    return replace(base, name="cluster", levels=(base.levels[0], Level("cluster", HOSTS, link)))


def plans(topology: Topology, work: Workload, calibration: Calibration | None) -> dict[str, planner.Plan]:
    """The planner's flat plan, and its towers without and with modules."""
    asked = {
        FLAT: None,
        SPTT: TowerRequest(always=True),
        MODULES: TowerRequest(module="projection", compression=COMPRESSION, always=True),
    }
    module = model("meta")
    made = {
        name: planner.compile(
            module,
            topology,
            work,
            constraints=Constraints(towers=towers),
            calibration=calibration,
            time_limit=2.0,
        )
        for name, towers in asked.items()
    }
    return {**made, CODED: made[MODULES]}


def predicted(name: str, plan: planner.Plan, calibration: Calibration, codec: Mapping[str, float]) -> float:
    """Modelled seconds of a step; the pass does not model a codec between peers, this adds it.

    A codec divides the exchange between peers by its ratio and adds the seconds of coding what a rank
    sends and decoding what it receives, forward and backward.
    """
    section = plan.decisions.towers
    if name != CODED or section is None:
        return plan.timeline.step
    from planner.zoo.multi_tower import over_arch_model

    work, topology = plan.workload, plan.topology
    overheads = phase_overheads(topology, work, calibration, "train")
    phases = dict(
        tower_seconds(
            plan.table_plans,
            section.towers,
            section.module,
            topology,
            work,
            calibration,
            "train",
            overheads,
        ).phases
    )
    count = len(section.towers)
    widest = max(tower.width_out for tower in section.towers)
    # (B / G) O x (T - 1) / T bytes leave a rank, and as many arrive where towers are alike
    size = work.global_batch / section.towers[0].ranks * widest * 4 * (count - 1) / count
    coding = size * (1 / codec["encode"] + 1 / codec["decode"]) * calibration.core_sharing
    for phase in ("peer", "peer_gradient"):
        phases[phase] = phases[phase] / codec["ratio"] + coding
    above = over_arch_model(model("meta"), sum(tower.vectors_out for tower in section.towers))
    return tower_timeline(above, phases, topology, work, calibration, "train").step


def codec_speed() -> dict[str, float]:
    """Ratio, and bytes/s one way and the other, on normal vectors."""
    import torch

    from codegen.runtime.codecs import absolute_bound, encode
    from codegen.runtime.codecs.sampling import measure_speeds

    torch.set_num_threads(1)
    name, relative = CODEC
    vectors = torch.randn(BATCH * 4, DIM, generator=torch.Generator().manual_seed(0))
    (speed,) = measure_speeds([vectors], ("eb_entropy",), relative=relative)
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


def steps_at_speeds(report: Report, quick: bool) -> None:
    """Rows of every speed and variant, and the claims; raises ClusterUnavailable."""
    work, codec = workload(), codec_speed()
    turns, steps = (2, 4) if quick else (4, 5)
    with Cluster(HOSTS, RANKS, FAST) as cluster:
        flat = plans(unmeasured(), work, None)[FLAT]
        fast = measure(cluster, {FLAT: flat}, turns, steps)[FLAT]
    report.note(
        f"{HOSTS} hosts x {RANKS} ranks, {BATCH} samples a rank, {STREAM.dense} dense features, {len(STREAM.rows)} "
        f"tables of {DIM} columns; on fast links the flat step is {1e3 * fast['step']:.1f} ms and a host sends "
        f"{fast['sent'] / 1e6:.2f} MB; published for other hardware: at most {PUBLISHED}x"
    )
    best, gap = 0.0, 0.0
    for share in SHARES[-1:] if quick else SHARES:
        # bytes/s at which the card is busy for that share of the step
        speed = fast["sent"] * (1 - share) / (share * fast["step"])
        best, apart = _at_speed(report, speed, fast["step"], work, codec, (turns, steps))
        gap = max(gap, apart)
    report.claim("speed_up_slowest", best, PUBLISHED, ">=")
    report.claim("exchange_alone_loss_difference", gap, 1e-5, "<=")


def _at_speed(
    report: Report,
    speed: float,
    rest: float,
    work: Workload,
    codec: Mapping[str, float],
    amount: tuple[int, int],
) -> tuple[float, float]:
    """Rows of one speed; the best speed-up, and the largest difference in loss of SPTT and flat."""
    inter = f"{8 * speed / 1e6:.0f}Mbps"
    with tempfile.TemporaryDirectory() as folder, Cluster(HOSTS, RANKS, inter) as cluster:
        topology, calibration = calibrate(cluster, Path(folder) / "cluster.yaml", repeats=2)
        made = plans(topology, work, calibration)
        found = measure(cluster, made, *amount)
    model_steps = {name: predicted(name, plan, calibration, codec) for name, plan in made.items()}
    flat = found[FLAT]
    for name, one in found.items():
        report.row(
            link=inter,
            variant=name,
            step_ms=1e3 * one["step"],
            faster=flat["step"] / one["step"],
            predicted_ms=1e3 * model_steps[name],
            predicted_faster=model_steps[FLAT] / model_steps[name],
            slow_link_MB=one["sent"] / 1e6,
        )
    report.note(
        f"{inter}: the slow link takes {1 - rest / flat['step']:.0%} of the flat step; codec ratio "
        f"{found[CODED]['ratio']:.1f}, predicted with {codec['ratio']:.1f}"
    )
    apart = max(abs(a - b) for a, b in zip(flat["loss"], found[SPTT]["loss"], strict=True))
    return flat["step"] / min(one["step"] for one in found.values()), apart
