"""The step: what overlaps, what waits, and what a faster machine does to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models.calibration import GPU
from cost_models.embedding import PHASES
from cost_models.step import step_timeline
from ir.ops import EmbeddingTable, Op
from ir.plan import Timeline
from ir.program import Model
from ir.topology import Topology
from ir.workload import Workload
from planner.presets import preset

MS = dict.fromkeys(PHASES, 1e-3)


def linear(name: str, k: int, n: int, phase: str) -> Op:
    return Op(
        name, "gemm", flops=2.0 * k * n, params=k * n, activation_bytes=4.0 * n, phase=phase, gemm=(k, n)
    )


MODEL = Model(
    "m",
    (EmbeddingTable("t", 1000, 64, ("f",)),),
    (
        linear("bottom", 13, 512, "bottom"),
        Op("lookup", "lookup", activation_bytes=256.0),
        linear("top0", 4096, 4096, "top"),
        linear("top1", 4096, 4096, "top"),
    ),
)


def run(
    topo: Topology, phases: dict[str, float] | None = None, mode: str = "train", model: Model = MODEL
) -> Timeline:
    return step_timeline(model, phases or MS, topo, Workload(65536, {}), GPU, mode)  # type: ignore[arg-type]


def spans(timeline: Timeline) -> dict[str, tuple[float, float]]:
    return {event.name: (event.start, event.start + event.duration) for event in timeline.events}


def test_training_waits_where_data_flows() -> None:
    at = spans(run(preset("h100-2x8")))
    assert at["output_dist"][0] == at["lookup_forward"][1]
    assert at["top_forward"][0] >= max(at["output_dist"][1], at["bottom_forward"][1])
    assert at["gradient_dist"][0] >= max(
        end for name, (_, end) in at.items() if name.startswith("top_backward")
    )
    assert at["lookup_backward"][0] >= at["gradient_dist"][1]
    assert at["dense_update"][0] >= max(end for name, (_, end) in at.items() if name.startswith("all_reduce"))


def test_dense_work_hides_the_exchanges_it_does_not_need() -> None:
    at = spans(run(preset("h100-2x8")))
    assert at["bottom_forward"][0] == at["lookup_forward"][1]  # while the outputs travel
    assert at["input_dist_next"][0] < at["top_forward"][1]  # the next batch's ids travel under the GEMMs
    # 67 MB of gradients a layer: a bucket each, the first one reduced while the second layer goes back
    assert at["all_reduce_0"][0] < at["top_backward_1"][1]


def test_inference_exchanges_ids_first_and_has_no_backward() -> None:
    at = spans(run(preset("h100-2x8"), mode="inference"))
    assert list(at) == ["input_dist", "lookup_forward", "bottom_forward", "output_dist", "top_forward"]
    assert at["lookup_forward"][0] == at["input_dist"][1]


def test_the_host_works_before_it_starts_the_exchange_of_ids() -> None:
    """One thread of a CPU rank does both, so that the host's work is all on the critical path."""
    work, machine = Workload(65536, {}), preset("h100-2x8")
    constants = replace(GPU, ids_ahead=False)
    plain, hosted = (
        step_timeline(MODEL, MS, machine, work, constants, "train", host_seconds=seconds)
        for seconds in (0.0, 5e-3)
    )
    at = spans(hosted)
    assert at["input_dist"][0] == at["framework"][1] == 5e-3
    assert at["lookup_forward"][0] == at["input_dist"][1]
    assert hosted.step == pytest.approx(plain.step + 5e-3)


def test_one_rank_reduces_nothing() -> None:
    assert not [name for name in spans(run(preset("h100-1x1"))) if name.startswith("all_reduce")]


def test_tables_without_a_network_still_make_a_step() -> None:
    bare = Model("tables", MODEL.tables, ())
    timeline = run(preset("h100-1x8"), model=bare)
    # four phases in a row; the ids of the next batch fill the free slot of the network
    assert timeline.step == pytest.approx(5e-3)
    assert spans(timeline)["lookup_backward"][1] == timeline.step


def test_dense_seconds_are_the_sum_of_their_ops() -> None:
    for event in run(preset("h100-2x8")).events:
        if event.name.endswith(("forward", "backward_0")) and event.terms:
            assert event.duration == pytest.approx(sum(event.terms.values()))


@given(
    st.fixed_dictionaries({phase: st.floats(0, 0.1) for phase in PHASES}),
    st.sampled_from(PHASES),
    st.floats(0, 0.1),
    st.sampled_from(["train", "inference"]),
)
def test_a_slower_phase_never_shortens_the_step(
    phases: dict[str, float], which: str, extra: float, mode: str
) -> None:
    topo = preset("h100-2x8")
    slower = {**phases, which: phases[which] + extra}
    assert run(topo, slower, mode).step >= run(topo, phases, mode).step


@given(st.floats(1.0, 10.0))
def test_a_faster_network_never_lengthens_the_step(factor: float) -> None:
    topo = preset("h100-2x8")
    faster = tuple(
        replace(lv, link=replace(lv.link, bandwidth=lv.link.bandwidth * factor)) for lv in topo.levels
    )
    assert run(replace(topo, levels=faster)).step <= run(topo).step
