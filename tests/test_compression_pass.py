"""The compression pass: predictions against measured messages, break-even against first principles."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import planner
from codegen.runtime.codecs import absolute_bound, decode, encode
from codegen.runtime.codecs.sampling import measure_speeds, sample_messages, sample_traffic
from cost_models.codecs import message_bytes, predicted_ratio
from ir.compression import (
    CODECS,
    CodecName,
    CodecSpeed,
    CompressionRequest,
    Decay,
    EmbeddingSample,
)
from ir.constraints import Constraints, TableConstraint
from ir.errors import InputError
from ir.plan import Plan
from ir.program import Model
from ir.tables import capture_tables
from ir.topology import Device, Level, Link, MemoryTier, Topology
from ir.workload import FeatureStats, Workload
from planner.verification import verify

ROWS, DIM, WORLD = 512, 16, 4
FAST = {name: CodecSpeed(name, 1e9, 2e9, 20e-6, "test") for name in CODECS}


def machine(bandwidth: float) -> Topology:
    device = Device("cpu", "cpu", {"fp32": 1e11}, (MemoryTier("ddr", 2**34, 1e10, 1e10),))
    levels = (Level("host", 2, Link("loopback", 1e10)), Level("cluster", 2, Link("slow", bandwidth)))
    return Topology("test", device, levels)


def vectors(spread: float = 1.0, tables: int = 300, seed: int = 0) -> list[Tensor]:
    """Messages of rows of a table drawn by a Zipf law."""
    random = np.random.default_rng(seed)
    table = (random.standard_normal((tables, DIM)) * 0.1).astype(np.float32)
    table = table.mean() + (table - table.mean()) * np.float32(spread)
    weight = np.arange(1, tables + 1) ** -1.0
    ids = random.choice(tables, (4, ROWS), p=weight / weight.sum())
    return [torch.from_numpy(table[row]) for row in ids]


@functools.lru_cache(maxsize=1)
def samples() -> tuple[EmbeddingSample, ...]:
    random = torch.Generator().manual_seed(0)
    grads = [torch.randn(ROWS, DIM, generator=random) * 1e-4 for _ in range(2)]
    return tuple(
        made
        for name in ("a", "b")
        for made in (
            sample_messages(name, "forward", vectors()),
            sample_messages(name, "backward", grads),
        )
    )


def compiled(bandwidth: float = 2e8, **asked: Any) -> Plan:
    tables = [{"name": name, "rows": 300, "dim": DIM} for name in ("a", "b")]
    model, _ = capture_tables(tables, "two")
    request = CompressionRequest(**{"samples": samples(), "speeds": tuple(FAST.values()), **asked})
    constraints = Constraints(
        tables={"*": TableConstraint(sharding_types=("table_wise",))}, compression=request
    )
    work = Workload(global_batch=ROWS * WORLD, features={n: FeatureStats() for n in ("a", "b")})
    return planner.compile(model, machine(bandwidth), work, constraints=constraints)


@functools.lru_cache(maxsize=1)
def movielens() -> tuple[dict[tuple[str, str], EmbeddingSample], dict[tuple[str, str], list[Tensor]]]:
    """Samples of some batches of a DLRM trained on MovieLens, and the messages of later ones."""
    from examples import _movielens

    torch.manual_seed(0)
    data = _movielens.load()
    model = _movielens.build(data.rows, data.dense.shape[1])
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.03)
    random = np.random.default_rng(0)

    def batch() -> Any:
        return data.batch(np.sort(random.integers(0, data.train, ROWS)))

    def loss(module: nn.Module, one: Any) -> Tensor:
        dense, ids, labels = one
        return nn.functional.binary_cross_entropy_with_logits(module(dense, ids), labels)

    for _ in range(60):
        optimizer.zero_grad()
        loss(model, batch()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    sampled = sample_traffic(model, [batch() for _ in range(4)], loss)
    later: dict[tuple[str, str], list[Tensor]] = {}
    for _ in range(3):
        kept: list[Any] = []
        hook = model.ebc.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out))
        value = loss(model, batch())
        hook.remove()
        kept[0].values().retain_grad()
        value.backward()  # type: ignore[no-untyped-call]
        at = 0
        for key, width in zip(kept[0].keys(), kept[0].length_per_key(), strict=True):
            for direction, of in (
                ("forward", kept[0].values().detach()),
                ("backward", kept[0].values().grad),
            ):
                later.setdefault((f"t_{key}", direction), []).append(of[:, at : at + width].clone())
            at += width
    return {(s.table, s.direction): s for s in sampled}, later


@pytest.mark.parametrize("codec", [name for name in CODECS if name != "none"])
def test_ratio_and_error_are_predicted_on_real_embeddings(codec: CodecName) -> None:
    """Within 15 % of messages of other batches, at the size sampled and at another; the error within 15 %."""
    from cost_models.codecs import predicted_error

    known, later = movielens()
    assert len(known) == 16
    for key, messages in later.items():
        for bound in (0.06, 0.25) if CODECS[codec].bounded else (0.0,):
            for rows in (ROWS, 200):
                cut = [m[:rows].contiguous() for m in messages]
                payloads = [encode(m, codec, absolute_bound(m, bound) if bound else 0.0) for m in cut]
                found = sum(m.nbytes for m in cut) / sum(map(len, payloads))
                assert predicted_ratio(known[key], codec, bound, rows) == pytest.approx(found, rel=0.15), key
            noise = sum(
                float((decode(p, *m.shape) - m).double().square().sum())
                for p, m in zip(payloads, cut, strict=True)
            )
            power = sum(float(m.double().square().sum()) for m in cut)
            assert predicted_error(known[key], codec, bound) == pytest.approx(
                noise / power, rel=0.2, abs=1e-12
            )


def test_nothing_asked_nothing_decided() -> None:
    plan = compiled()
    assert plan.decisions.compression is not None
    without = replace(plan.constraints, compression=None)
    model, _ = capture_tables([{"name": n, "rows": 300, "dim": DIM} for n in ("a", "b")], "two")
    bare = planner.compile(model, machine(2e8), plan.workload, constraints=without)
    assert bare.decisions.compression is None
    assert "compression" not in bare.to_dict()["decisions"]


def test_a_slow_link_is_compressed_and_a_fast_one_is_not() -> None:
    slow, fast = compiled(1e7).decisions.compression, compiled(1e11).decisions.compression
    assert slow is not None
    assert fast is not None
    assert {t.codec for t in slow.tables if t.direction == "forward"} <= {"eb_lz", "eb_lz_entropy"}
    assert all(t.codec != "none" for t in slow.tables)
    assert all(exchange.used for exchange in slow.exchanges)
    assert {t.codec for t in fast.tables} == {"none"}
    assert not any(exchange.used for exchange in fast.exchanges)


def test_the_step_has_the_compressed_exchange() -> None:
    """Link seconds: messages of the holder over the slow link, re-added here from bytes and bandwidth."""
    plan, bare = compiled(1e7), compiled(1e7, codecs=("none",))
    section = plan.decisions.compression
    assert section is not None
    assert plan.timeline.step < bare.timeline.step
    durations = {e.name: e.duration for e in plan.timeline.events}
    before = {e.name: e.duration for e in bare.timeline.events}
    for exchange in section.exchanges:
        change = exchange.link + exchange.coding - exchange.uncompressed
        assert durations[exchange.phase] - before[exchange.phase] == pytest.approx(change, rel=1e-6)
    # gloo reaches half of a link (uncalibrated); half of the batch goes to the other host
    sent = ROWS * WORLD * DIM * 4 * 0.5 / (0.5 * 1e7)
    row = section.of("a", "forward")
    assert row is not None
    assert row.uncompressed == pytest.approx(sent, rel=1e-6)
    assert row.link == pytest.approx(sent / (row.ratio * 0.85), rel=1e-6)


def test_errors_stay_within_the_budget_and_formats_use_it_up() -> None:
    free = compiled(1e7, error_budget=4e-3)
    spent = compiled(1e7, error_budget=4e-3, format_error={"a": 3.9e-3, "b": 5e-3})
    for plan in (free, spent):
        section = plan.decisions.compression
        assert section is not None
        for row in section.tables:
            assert row.error <= row.budget
            for message in vectors() if row.direction == "forward" and row.bound else ():
                y = decode(encode(message, row.codec, absolute_bound(message, row.bound)), *message.shape)
                assert float((y - message).square().sum() / message.square().sum()) <= 1.1 * row.budget
    section = spent.decisions.compression
    assert section is not None
    wide, left, none = free.decisions.compression, section.of("a", "forward"), section.of("b", "forward")
    assert wide is not None
    assert left is not None
    assert none is not None
    assert left.budget == pytest.approx(1e-4)
    assert none.budget == 0
    assert none.codec in ("none", "lz")  # only what is exact
    assert left.bound < wide.tables[0].bound


def test_vectors_that_fall_together_get_a_narrower_bound() -> None:
    near = vectors(spread=1.0)
    table = near[0][:1] + 0.02 * near[1]  # all within a fiftieth of one vector
    alike = tuple(sample_messages(n, d, [table]) for n in ("a", "b") for d in ("forward", "backward"))  # type: ignore[arg-type]
    one = compiled(1e7, samples=alike, error_budget=1e-2).decisions.compression
    other = compiled(1e7, error_budget=1e-2).decisions.compression
    assert one is not None
    assert other is not None
    assert {t.table_class for t in one.tables} == {"narrow"}
    assert {t.table_class for t in other.tables if t.direction == "forward"} == {"wide"}
    assert one.tables[0].bound < other.tables[0].bound


def test_torchrec_gets_one_fixed_rate_codec() -> None:
    section = compiled(1e7, engine="torchrec", error_budget=1e-4, gradient_budget=1e-4).decisions.compression
    assert section is not None
    assert {t.codec for t in section.tables} == {"int8"}
    section = compiled(1e7, engine="torchrec", error_budget=1e-6, gradient_budget=1e-6).decisions.compression
    assert section is not None
    assert {t.codec for t in section.tables} == {"fp16"}


def test_the_fastest_engine_is_the_faster_of_both() -> None:
    slow, quick = CodecSpeed("fp16", 5e7, 5e7, 1e-3, "test"), CodecSpeed("eb_lz", 1e10, 1e10, 1e-6, "test")
    for speed, engine in ((slow, "torchrec"), (quick, "exchange")):
        codecs: tuple[CodecName, ...] = ("none", "fp16", speed.codec)
        made = {
            asked: compiled(
                2e7, engine=asked, codecs=codecs, speeds=(speed,), error_budget=1e-2
            ).timeline.step
            for asked in ("exchange", "torchrec", "fastest")
        }
        assert made["fastest"] == min(made.values())
        section = compiled(
            2e7, engine="fastest", codecs=codecs, speeds=(speed,), error_budget=1e-2
        ).decisions.compression
        assert section is not None
        assert section.engine == engine


def test_row_splits_are_left_uncompressed_with_the_reason() -> None:
    plan = compiled(1e7)
    rule = {"*": TableConstraint(sharding_types=("row_wise",))}
    model, _ = capture_tables([{"name": n, "rows": 300, "dim": DIM} for n in ("a", "b")], "two")
    split = planner.compile(
        model, machine(1e7), plan.workload, constraints=replace(plan.constraints, tables=rule)
    )
    section = split.decisions.compression
    assert section is not None
    assert {t.codec for t in section.tables} == {"none"}
    assert "row_wise" in section.tables[0].verdict
    assert all(finding.ok for finding in verify(split))


def test_the_plan_survives_its_file_and_is_explained(tmp_path: Any) -> None:
    plan = compiled(1e7, decay=Decay(4.0, 300, 3))
    plan.save(tmp_path / "plan.json")
    again = planner.Plan.load(tmp_path / "plan.json")
    assert again.decisions.compression == plan.decisions.compression
    assert again.digest == plan.digest
    text = again.explain()
    assert "output_dist" in text
    assert "decay over 300 steps" in text


def test_verify_finds_what_is_wrong() -> None:
    plan = compiled(1e7)
    assert all(finding.ok for finding in verify(plan)), [f for f in verify(plan) if not f.ok]
    section = plan.decisions.compression
    assert section is not None

    def faults(**changes: Any) -> str:
        row = replace(section.tables[0], **changes)
        changed = replace(section, tables=(row, *section.tables[1:]))
        broken = replace(plan, decisions=replace(plan.decisions, compression=changed))
        return " ".join(fault for finding in verify(broken) for fault in finding.faults)

    assert "over its budget" in faults(error=1.0)
    assert "no such table" in faults(table="zz")
    assert "with a bound" in faults(bound=0.0)
    assert "more than a bound" in faults(bound=1e-6)
    assert "has a ratio of 2.000" in faults(codec="fp16", bound=0.0, ratio=9.0, error=0.0)
    assert "decided twice" in faults(table=section.tables[1].table)
    torchrec = replace(section, engine="torchrec")
    broken = replace(plan, decisions=replace(plan.decisions, compression=torchrec))
    assert any("TorchRec does not run" in f for finding in verify(broken) for f in finding.faults)


def test_decay_falls_in_steps_to_one() -> None:
    decay = Decay(start=8.0, steps=30, stages=3)
    factors = [decay.factor(step) for step in range(40)]
    assert factors[0] == 8.0
    assert factors[10] == pytest.approx(4.0)
    assert factors[20] == pytest.approx(2.0)
    assert set(factors[30:]) == {1.0}
    assert factors == sorted(factors, reverse=True)
    assert Decay().factor(0) == 1.0


def test_speeds_are_measured_and_predictions_never_exceed_the_raw_size() -> None:
    (speed,) = measure_speeds(vectors(), ("eb_lz",), repeats=1)
    assert 1e6 < speed.encode < 1e11
    assert speed.message < 0.1
    for sample in samples():
        for codec in CODECS:
            assert message_bytes(sample, codec, 1e-6, 100) <= 32 + 100 * DIM * 4


def _two() -> tuple[Model, Topology, Workload]:
    model, _ = capture_tables([{"name": n, "rows": 300, "dim": DIM} for n in ("a", "b")], "two")
    return model, machine(1e7), Workload(global_batch=ROWS * WORLD, exchange_dtype="bf16")


def test_samples_must_fit_the_model() -> None:
    with pytest.raises(InputError, match="'c', which the model does not have"):
        compiled(samples=(replace(samples()[0], table="c"),))
    with pytest.raises(InputError, match="has 8 columns but the table has 16"):
        compiled(samples=(replace(samples()[0], dim=8),))
    with pytest.raises(InputError, match="exchanges bf16 already"):
        planner.compile(
            *_two(), constraints=Constraints(compression=CompressionRequest(samples=samples())), name="two"
        )
    with pytest.raises(InputError, match="no vectors"):
        sample_messages("a", "forward", [torch.empty(0, 4)])
