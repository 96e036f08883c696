"""Serving plans: published latencies and facts, fewest devices, the independent check, vLLM's file."""

from __future__ import annotations

import json
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from benchmarks.context_parallel import (
    DATA,
    H100_500W,
    LLAMA,
    RDMA,
    TCP,
    TCP_SHARE,
    errors,
    fit,
    layout,
    rows,
)
from codegen.vllm import emit_vllm
from cost_models.calibration import CPU
from cost_models.serving import Server, ServingRates
from cost_models.serving_calibration import AttentionTime, fit_attention, serving_rates
from ir.errors import InfeasibleError, InputError
from ir.llm import DecoderModel
from ir.serving import Serving, ServingRequest
from ir.topology import Level, Link, Topology
from planner.cli import cli
from planner.models import resolve
from planner.plan import Plan

FIELDS: dict[str, Any] = json.loads(
    (Path(planner.__file__).parent / "data" / "emit_fields.json").read_text()
)["vllm"]


@pytest.fixture(scope="module")
def big() -> DecoderModel:
    found = resolve("llama3-405b").model
    assert isinstance(found, DecoderModel)
    return found


def served(model: DecoderModel, topology: str = "h100-8x8", **request: Any) -> Plan:
    constraints = planner.Constraints(serving=ServingRequest(**request))
    return planner.compile(model, topology, mode="inference", constraints=constraints)


def section(plan: Plan) -> Serving:
    assert plan.decisions.serving is not None
    return plan.decisions.serving


def faults(plan: Plan) -> list[str]:
    return [fault for finding in planner.verify(plan) for fault in finding.faults]


def test_published_latencies_within_a_tenth() -> None:
    table = rows(json.loads(DATA.read_text()))
    rates = fit(table)
    judged = [error for row in table if row.use == "judge" for error in errors(row, rates)]
    assert len(judged) == 22
    assert max(map(abs, judged)) <= 0.10


def test_bf16_needs_two_hosts_and_fp8_one(big: DecoderModel) -> None:
    """Llama 3, arXiv 2407.21783, sections 6.1 and 6.2: bf16 over 16 GPUs of two hosts; FP8 fits one host."""
    wide = section(served(big, new=4000, weights=("bf16",)))
    assert wide.chosen.layout.ranks == 16
    assert section(served(big, new=4000)).chosen.layout.ranks == 8


def test_tighter_targets_never_need_fewer_devices(big: DecoderModel) -> None:
    counts, times = [], []
    for ttft in (60.0, 25.0, 12.0, 8.0):
        made = section(served(big, ttft=ttft))
        assert made.chosen.ttft <= ttft
        counts.append(made.chosen.layout.ranks)
        times.append(made.chosen.ttft)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    with pytest.raises(InfeasibleError, match="no layout of up to 64 devices meets ttft") as caught:
        served(big, ttft=0.5)
    assert caught.value.conflict == ("serving.ttft",)


def test_fp8_cache_holds_longer_sequences(big: DecoderModel) -> None:
    wide, narrow = (section(served(big, new=8000, tensor=8, cache=(kind,))) for kind in ("bf16", "fp8"))
    assert narrow.memory["cache"] * 2 == wide.memory["cache"]
    assert narrow.longest > 1.9 * wide.longest
    # 126 layers x 2 x 8 heads x 128 x 2 bytes = 516,096 bytes a token over 8 devices
    tokens = 8000 + 1024
    assert wide.memory["cache"] == 516_096 // 8 * tokens


def test_decision_table(big: DecoderModel) -> None:
    made = section(served(big, new=1280, cached=126_720, context=4, tensor=8))
    assert made.chosen.exchange in ("pass_q", "pass_q_eager")
    assert section(served(big, context=4, tensor=8)).chosen.exchange == "pass_kv"
    starts = [row.pass_kv_from for row in made.crossovers]
    assert None not in starts
    assert starts == sorted(starts, key=lambda start: start or 0)  # longer caches favour pass-Q longer
    assert all(row.full == "pass_kv" and row.one.startswith("pass_q") for row in made.crossovers)


def test_verifier_finds_what_is_wrong(big: DecoderModel) -> None:
    plan = served(big, ttft=20.0)
    assert faults(plan) == []
    assert Plan.from_dict(plan.to_dict()).digest == plan.digest
    made = section(plan)

    def changed(**fields: Any) -> list[str]:
        other = replace(made, **fields)
        return faults(replace(plan, decisions=replace(plan.decisions, serving=other)))

    def chosen(**fields: Any) -> list[str]:
        return changed(chosen=replace(made.chosen, **fields))

    assert any("devices do not fit" in fault for fault in changed(replicas=99))
    assert any("is below" in fault for fault in chosen(ttft=1e-3))
    assert any("weights and cache need" in fault for fault in chosen(memory=10**9))
    assert any("does not go with exchange" in fault for fault in chosen(exchange="none"))
    assert any("does not divide" in fault for fault in chosen(layout=replace(made.chosen.layout, tensor=48)))
    slower = {name: 10 * seconds for name, seconds in made.prefill.items()}
    late = changed(prefill=slower, chosen=replace(made.chosen, ttft=sum(slower.values())))
    assert any("the target" in fault for fault in late)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 10**6), st.integers(0, 10**6), st.sampled_from([1, 2, 4, 8, 16]))
def test_latencies_behave(new: int, cached: int, context: int) -> None:
    """More work never takes less time, and TCP is never faster than RDMA."""
    one = layout(8, context)
    server, slow = Server(LLAMA, RDMA), Server(LLAMA, TCP, replace(ServingRates(), **TCP_SHARE))
    exchange = server.exchange(one, new, cached)

    def seconds(machine: Server, more: int = 0) -> float:
        return sum(machine.prefill(one, new + more, cached, exchange).values())

    assert seconds(server) <= seconds(server, 1000) * (1 + 1e-12)
    assert seconds(server) <= seconds(slow) * (1 + 1e-12)
    assert sum(server.decode(one, new + cached, 1).values()) <= sum(
        server.decode(one, new + cached, 64).values()
    )


def test_a_machine_without_bf16_is_served_at_its_fp32_rate() -> None:
    plan = served(resolve("llama-tiny").model, "local-4", new=64, output=8, context=4, tensor=1)
    assert faults(plan) == []
    assert section(plan).chosen.exchange != "none"


def test_rates_of_a_calibrated_cluster() -> None:
    """Two hosts of two ranks that share a card of 100 B/s, which one rank alone gets whole."""
    host, card = Level("host", 2, Link("loopback", 1e4)), Level("cluster", 2, Link("ethernet", 50.0, 1e-3))
    topology = Topology("small", replace(H100_500W, kind="cpu", flops={"fp32": 1e12}), (host, card))
    calibration = replace(CPU, card_sharing=2.0, network_efficiency=0.8)
    # 1 ms and 2e11 FLOP/s, measured exactly
    times = [AttentionTime(flops, 1e-3 + flops / 2e11) for flops in (1e8, 1e9, 4e9)]
    under_mask = [AttentionTime(flops, 1e-3 + flops / 5e10, masked=True) for flops in (1e8, 1e9)]
    rates = serving_rates(topology, calibration, times + under_mask, merge_seconds=2e-9)
    assert astuple(fit_attention(times + under_mask)) == pytest.approx((1e-3, 2e11, 2e11, 5e10))
    assert fit_attention(times).masked == pytest.approx(2e11)
    ring = Server(LLAMA, topology, rates).ring_rates(layout(1, 4))[0]
    assert (ring.attention_flops, ring.masked_flops) == pytest.approx((2e11, 5e10))
    assert ring.merge_seconds == 2e-9
    assert ring.send_bandwidth == pytest.approx(100.0)  # one rank of a host sends to the next host
    # of 3 blocks 2 leave the host, and both ranks send: 4 blocks through 100 B/s
    assert 3 / ring.all_to_all_bandwidth == pytest.approx(4 / 100.0)
    assert (ring.message_seconds, ring.card_ranks) == (1e-3, 2)
    with pytest.raises(InputError, match="at least two sizes"):
        fit_attention(times[:1])


def test_vllm_names_and_rules(big: DecoderModel) -> None:
    for request in (
        {"context": 2, "tensor": 8},
        {"tensor": 16, "context": 2},
        {"weights": ("bf16",), "new": 4000},
    ):
        plan = served(big, **request)
        emitted = emit_vllm(plan)
        read = yaml.safe_load(emitted.text)
        for key, value in read.items():
            field = key.replace("-", "_")
            if field == "quantization":
                assert value in FIELDS["quantization"]
            elif field == "kv_cache_dtype":
                assert value in FIELDS["kv_cache_dtype"]
            else:
                assert field in FIELDS["parallel"] or field in FIELDS["cache"]
        # vLLM 0.33.0's rules for grouped-query attention, written out again
        tp, pcp, dcp = (
            read[f"{name}-parallel-size"] for name in ("tensor", "prefill-context", "decode-context")
        )
        assert 128 % tp == 0
        assert dcp == 1 or (tp > 8 and dcp <= tp // 8 and (128 // 8) % dcp == 0)
        assert dcp in (1, pcp, tp * pcp) if pcp > 1 else tp % dcp == 0
        made = section(plan).chosen.layout
        assert (tp, pcp) == (made.tensor, made.context)
        assert bool(made.weights == "fp8_row") == ("quantization" in read)
        assert all(f"# - {limit}" in emitted.text for limit in emitted.limits)
    training = planner.compile("llama3-8b", "h100-1x8")
    with pytest.raises(InputError, match="mode='inference'"):
        emit_vllm(training)


def test_command_line(tmp_path: Path) -> None:
    wishes, path = tmp_path / "serving.yaml", tmp_path / "plan.json"
    wishes.write_text("serving: {new: 32000, cached: 96000, ttft: 20.0, context: 2}\n")
    run = CliRunner()
    line = [
        "compile",
        "llama3-405b",
        "-t",
        "h100-4x8",
        "--mode",
        "inference",
        "-c",
        str(wishes),
        "-o",
        str(path),
    ]
    done = run.invoke(cli, line)
    assert done.exit_code == 0, done.output
    assert "TP8 CP2 PP1" in done.output
    assert run.invoke(cli, ["verify", str(path)]).exit_code == 0
    told = run.invoke(cli, ["explain", str(path)])
    assert "pass-KV from so many new" in told.output
    assert run.invoke(cli, ["emit", str(path), "--target", "vllm"]).exit_code == 0
