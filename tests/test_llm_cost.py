"""Costs of a decoder's training: networks against counted flows, memory against autograd, published rows."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cost_models.calibration import GPU
from cost_models.llm import LLM_GPU, Training, data_seconds, kv_width
from cost_models.llm_memory import layer_activation, stage_memory
from cost_models.llm_network import ring
from cost_models.llm_step import step_bound, step_cost, work_bound
from cost_models.pipeline import ChunkSeconds
from ir.decoder import DecoderShape
from ir.parallelism import Layout, ParallelismConstraints
from ir.topology import Level, Link, Topology
from passes.llm_layouts import degrees, divisors, head_layers, layouts, stage_layers
from passes.llm_search import fits, search
from planner.presets import preset

ROWS = json.loads((Path(__file__).parent.parent / "planner/data/measured/llama3.json").read_text())["table4"]
B405 = DecoderShape(126, 16384, 53248, True, 128, 8, 128, 128256, False, 32768, 16384)
B8 = DecoderShape(32, 4096, 14336, True, 32, 8, 128, 128256, False, 8192, 4096)
PLAIN = replace(GPU, fabric_efficiency=1.0, network_efficiency=1.0, collective_seconds=0.0)


def tree(*levels: tuple[int, float]) -> Topology:
    device = preset("h100-1x8").device
    made = tuple(Level(f"l{i}", n, Link(f"nvlink{i}", bandwidth)) for i, (n, bandwidth) in enumerate(levels))
    return Topology("tree", device, made)


def shared_bandwidth(topology: Topology, stride: int, size: int) -> float:
    """The slowest flow when every ring of the mesh dimension runs at once and each domain's uplink is shared.

    Rank after rank sends to the next of its ring; a flow that leaves a domain of level l shares with all others
    that leave it the domain's uplink, (ranks of the domain) x (bandwidth of the level). A ring of m ranks in a
    domain uses m channels, rotated so that each rank sends across once: its flow is the sum of them.
    """
    world = topology.world_size
    block = stride * size
    rates = []
    domain = 1
    for level in topology.levels:
        crossing: Counter[int] = Counter()
        for first in range(world):
            if first % block // stride:
                continue
            members = [first + i * stride for i in range(size)]
            for a, b in zip(members, members[1:] + members[:1], strict=True):
                outer = domain * level.fanout
                if a // domain != b // domain and a // outer == b // outer:
                    crossing[a // domain] += 1
        rates += [domain * level.link.bandwidth / flows for flows in crossing.values()]
        domain *= level.fanout
    return min(rates)


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_ring_bandwidth_is_that_of_the_flows_that_share_the_uplinks(stride: int, size: int) -> None:
    topology = tree((4, 400.0), (4, 50.0), (8, 7.0))  # 128 ranks, oversubscribed 1:7
    if stride * size <= topology.world_size:
        flow = shared_bandwidth(topology, stride, size)
        assert ring(((size, stride),), topology, PLAIN).bandwidth == pytest.approx(flow)


def test_oversubscription_costs_only_groups_that_are_thin_in_a_pod() -> None:
    cluster = preset("llama3-roce-1024x8")
    assert [level.fanout for level in cluster.levels] == [8, 256, 4]
    assert ring(((64, 128),), cluster, PLAIN).bandwidth == 50e9  # 16 of its ranks in each pod
    assert ring(((4, 2048),), cluster, PLAIN).bandwidth == pytest.approx(50e9 / 7)
    assert ring(((8, 1),), cluster, PLAIN).bandwidth == 450e9
    assert ring(((16, 1),), cluster, PLAIN).bandwidth == 400e9  # eight ports of each host, below NVLink
    fat = replace(
        cluster, levels=(*cluster.levels[:2], replace(cluster.levels[2], link=cluster.levels[1].link))
    )
    assert ring(((4, 2048),), fat, PLAIN).bandwidth == 50e9


def training(shape: DecoderShape, cluster: str, sequence: int, tokens: int, **changes: Any) -> Training:
    return Training(shape, sequence, tokens // sequence, preset(cluster), LLM_GPU, **changes)


def published(row: dict[str, Any]) -> tuple[Training, Layout]:
    tokens = row["sequence"] * row["sequences_per_replica"] * row["data"]
    made = Layout(
        *(row[name] for name in ("tensor", "context", "pipeline", "data")),
        1, row["sequences_per_replica"], "interleaved_1f1b", 8, 16, "elementwise", 2, 8,
    )  # fmt: skip
    return training(B405, f"llama3-roce-{row['gpus'] // 8}x8", row["sequence"], tokens), made


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['gpus']}-{row['sequence']}-{row['use']}")
def test_published_configurations_fit_and_reach_their_throughput(row: dict[str, Any]) -> None:
    problem, made = published(row)
    stages = stage_layers(126, 16, 8, 8, head_layers(B405))
    assert fits(problem, made, stages, int(0.85 * 80e9)) is not None
    cost = step_cost(problem, made, stages)
    assert cost.step == pytest.approx(sum(cost.terms.values()))
    tflops = problem.flops / cost.step / row["gpus"] / 1e12
    assert tflops == pytest.approx(row["tflops"], rel=0.001 if row["use"] == "fit" else 0.07)


def test_llama3s_stages() -> None:
    """126 layers in 128 slots: the first chunk has only the embedding, the last only the projection."""
    stages = stage_layers(126, 16, 8, 8, head_layers(B405))
    assert stages[0] == (0, *[1] * 7)
    assert stages[15] == (*[1] * 7, 0)
    assert set(stages[1:15]) == {(1,) * 8}


@given(st.integers(1, 130), st.integers(1, 16), st.integers(1, 4), st.integers(0, 1), st.floats(0, 3))
def test_stages_hold_every_layer_once_and_are_balanced(
    layers: int, pipeline: int, stages: int, more: int, head: float
) -> None:
    slots = -(-layers // pipeline) + more
    if slots % stages or pipeline == 1:
        return
    made = stage_layers(layers, pipeline, stages, slots, head)
    assert sum(map(sum, made)) == layers
    assert max(map(sum, made)) <= slots
    assert min(map(min, made)) >= 0
    if more and pipeline * (slots - 1) >= layers + head:
        assert max(sum(own) for own in made[1:-1] or made[:1]) <= slots - 1 or head > 1


@pytest.fixture(scope="module")
def saved() -> float:
    """Bytes that autograd keeps for one layer of a small Llama, run for real."""
    torch = pytest.importorskip("torch")
    from planner.zoo.llama import build_llama

    made, _ = build_llama(layers=1, hidden=128, ffn=448, heads=4, kv_heads=2, vocab=8, sequence=64,
                          global_tokens=64, device="cpu")  # fmt: skip
    layer, x = made.layers[0], torch.randn(1, 64, 128, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in made.parameters()}
    own |= {made.cos.untyped_storage().data_ptr(), made.sin.untyped_storage().data_ptr()}
    kept: dict[int, int] = {}

    def note(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held = []

    def pack(tensor: Any) -> Any:
        held.append(tensor)  # so that no storage is used twice
        return note(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x, made.cos, made.sin)
    return float(sum(kept.values()))


def test_activations_of_a_layer_are_what_autograd_keeps(saved: float) -> None:
    """Eager PyTorch keeps one feed-forward tensor more (silu's output) and copies of grouped keys and values."""
    shape = DecoderShape(1, 128, 448, True, 4, 2, 32, 8, False, 256, 128)
    problem = training(shape, "h100-1x8", 64, 64, dtype="fp32")
    made = Layout(1, 1, 1, 1, 1, 1, "1f1b", 1, 1, "none", 1, 1)
    formula = layer_activation(problem, made, "none")
    eager_extra = (
        64 * 4 * (448 + 2 * 128 + 128)
    )  # silu(gate); keys and values at all heads; the transposed output
    assert formula * 0.98 <= saved <= formula + eager_extra * 1.05


def test_recomputation_and_tensor_parallelism_keep_less() -> None:
    problem = training(B405, "h100-1024x8", 8192, 2**24)
    base = Layout(8, 1, 16, 64, 1, 32, "interleaved_1f1b", 8, 16, "none", 1, 8)
    sizes = [layer_activation(problem, base, name) for name in ("none", "elementwise", "full")]
    assert sizes == sorted(sizes, reverse=True)
    half = layer_activation(problem, replace(base, tensor=4), "none")
    assert half == pytest.approx(2 * sizes[0], rel=1e-3)
    assert kv_width(B405, 16) == 128  # more ranks than key-value heads: each still holds one head


@pytest.mark.parametrize("rank", [0, 1, 15])
def test_zero_levels_shard_what_they_say(rank: int) -> None:
    problem = training(B405, "h100-1024x8", 8192, 2**24)
    stages = stage_layers(126, 16, 8, 8, head_layers(B405))
    base = Layout(8, 1, 16, 64, 1, 32, "interleaved_1f1b", 8, 16, "elementwise", 1, 8)
    one, two, three = (stage_memory(problem, replace(base, zero=z), stages, rank) for z in (1, 2, 3))
    layers = sum(stages[rank])
    params = layers * 3187671040 / 8 + layers * 32768
    params += 128256 * 16384 / 8 * (rank in (0, 15)) + 16384 * (rank == 15)
    assert one["weights"] == pytest.approx(2 * params)
    assert one["gradients"] == pytest.approx(4 * params)
    assert one["optimizer"] == pytest.approx(12 * params / 64)
    assert two["weights"] == one["weights"]
    assert two["gradients"] < one["gradients"] / 2
    assert three["weights"] < two["weights"] / 2


def test_hybrid_sharding_by_hand() -> None:
    """Four copies over four hosts: gathers stay in the host, an all-reduce of the shard crosses them."""
    problem = training(B8, "h100-4x8", 8192, 8192 * 64)
    one = Layout(1, 1, 1, 32, 1, 2, "1f1b", 1, 1, "full", 3, 32)
    four = replace(one, replicate=4)
    assert (one.shards, four.shards) == (32, 8)
    idle = ChunkSeconds(0.0, 0.0, 0.0)  # nothing hides
    params = problem.shape.layer_params * 32.0
    inside, across, whole = problem.ring((8, 1)), problem.ring((4, 8)), problem.ring((32, 1))

    def exposed(made: Layout) -> float:
        return data_seconds(problem, made, params, idle).exposed

    def runs(gather: float, scatter: float) -> float:
        return 2 * (
            2 * gather + scatter
        )  # two micro-batches, each: gathered forward and backward, then scattered

    reduce = inside.gather(4 * params) + 2 * across.gather(4 * params / 8)
    assert exposed(four) == pytest.approx(runs(inside.gather(2 * params), reduce))
    assert exposed(one) == pytest.approx(runs(whole.gather(2 * params), whole.gather(4 * params)))
    held = [stage_memory(problem, made, ((32,),), 0) for made in (one, four)]
    assert held[1]["optimizer"] == pytest.approx(4 * held[0]["optimizer"], rel=1e-6)
    assert held[1]["activations"] == held[0]["activations"]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Training, Layout]:
    shape = replace(B8, layers=draw(st.sampled_from([4, 6, 9])))
    problem = training(shape, draw(st.sampled_from(["h100-1x8", "h100-4x8"])), 2048, 2048 * 64)
    rules = ParallelismConstraints()
    made = draw(st.sampled_from(list(degrees(shape, 2048, 64, problem.topology.world_size, rules))))
    copies_of_state = draw(st.sampled_from(divisors(made[3])))
    return problem, draw(st.sampled_from(list(layouts(shape, 64, made, rules, (copies_of_state,)))))


LIGHT_LAST_CHUNK = Layout(4, 1, 4, 2, 16, 2, "zero_bubble", 1, 1, "none", 1, 2)  # once above its step


@settings(max_examples=150, deadline=None)
@example((training(replace(B8, layers=6), "h100-4x8", 2048, 2048 * 64), LIGHT_LAST_CHUNK))
@given(problems())
def test_bounds_are_below_the_step(case: tuple[Training, Layout]) -> None:
    problem, made = case
    layers = problem.shape.layers
    stages = stage_layers(layers, made.pipeline, made.virtual_stages, made.slots, head_layers(problem.shape))
    step = step_cost(problem, made, stages).step
    layer = problem.layer(made.tensor, made.context, made.micro_batch).chunk(made.recompute)
    tight = step_bound(layers, made, layer)
    loose = work_bound(
        problem, made.tensor, made.context, made.pipeline, made.micro_batch, made.micro_batches
    )
    assert loose <= tight * (1 + 1e-12)
    assert tight <= step * (1 + 1e-12)


@pytest.mark.parametrize("limit", [int(68e9), int(20e9)])
def test_search_finds_what_pricing_every_layout_finds(limit: int) -> None:
    shape = replace(B8, layers=6)
    problem = training(shape, "h100-2x8", 4096, 4096 * 32)
    rules = ParallelismConstraints()
    ranked, report = search(problem, limit, rules)
    best: dict[str, float] = {}
    count = 0
    for made in degrees(shape, 4096, 32, 16, rules):
        # two hosts of eight: besides one copy, those whose shards lie in a host
        stride = made[0] * made[1] * made[2]
        inside = min(made[3], 8 // stride) if stride <= 8 else 0
        hybrid = {made[3] // inside} if inside and made[3] % inside == 0 and made[1] * inside > 1 else set()
        for layout in layouts(shape, 32, made, rules, tuple(sorted({1, *hybrid}))):
            count += 1
            stages = stage_layers(6, layout.pipeline, layout.virtual_stages, layout.slots, head_layers(shape))
            if fits(problem, layout, stages, limit) is not None:
                step = step_cost(problem, layout, stages).step
                best[layout.label] = min(step, best.get(layout.label, step))
    expected = sorted(best.values())[:5]
    assert [candidate.cost.step for candidate in ranked] == pytest.approx(expected)
    assert report.legal == count == report.evaluated + report.too_large + report.cut
    assert report.cut > 0
    assert report.bound <= expected[0]
