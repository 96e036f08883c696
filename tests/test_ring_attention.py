"""Ring attention on real gloo processes equals single-process attention, and hides its messages.

Properties run inside the ranks: every rank draws the same cases from Hypothesis (derandomised, no clock),
and the largest error of any rank is what fails a case, so that ranks stay in step while it shrinks.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codegen.runtime.context_parallel import (
    KVCache,
    Placement,
    Ring,
    Trace,
    balanced,
    empty,
    pass_kv,
    pass_q,
    ring_attention,
    round_robin,
)
from codegen.runtime.context_parallel.kernels import Blockwise
from codegen.runtime.launch import Rank, launch
from ir.errors import InputError

TOLERANCE = 1e-5  # fp32
IN_STEP = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), max_examples=40
)
HEADS = st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2), (3, 3)])
LENGTHS = st.lists(
    st.one_of(st.just(1), st.integers(0, 9), st.integers(10, 70)), min_size=1, max_size=4
).filter(any)


# ------------------------------------------------------------------------------- in the ranks


def whole(seed: int, tokens: int, heads: tuple[int, int], dim: int) -> tuple[torch.Tensor, ...]:
    """The same q, k, v on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, h, dim, generator=generator) for h in (heads[0], heads[1], heads[1]))


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, causal: bool) -> torch.Tensor:
    """One sequence in fp64 by the definition; queries are at positions first, first + 1, ..."""
    each = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(each, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), keys) * q.shape[2] ** -0.5
    if causal:
        hidden = torch.arange(len(k))[None] > torch.arange(first, first + len(q))[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), values)


def packed_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], causal: bool = True
) -> torch.Tensor:
    """A packed batch, sequence by sequence."""
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([reference(*part, 0, causal) for part in parts])


def agree(error: float) -> None:
    """Fail on every rank when it is too large on any."""
    worst = torch.tensor([error], dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    assert worst.item() <= TOLERANCE, f"error {worst.item():.2e}"


def gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference; 0 for no rows."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).abs().max()) if found.numel() else 0.0


def property_prefill(counter: list[int]) -> Callable[[], None]:
    """Prompts without a cache, by each algorithm."""

    @IN_STEP
    @given(LENGTHS, HEADS, st.sampled_from([3, 8]), st.booleans(), st.sampled_from(["auto", "blockwise"]))
    def check(lengths: list[int], heads: tuple[int, int], dim: int, causal: bool, kernel: str) -> None:
        counter[0] += 1
        size, rank = dist.get_world_size(), dist.get_rank()
        q, k, v = whole(sum(lengths), sum(lengths), heads, dim)
        placement = balanced(lengths, size)
        ring = Ring(placement, heads=heads[0], kv_heads=heads[1], head_dim=dim, causal=causal, kernel=kernel)
        if kernel == "blockwise":
            ring.kernel = Blockwise(tile_scores=40, key_tile=3)
        mine = placement.index(rank)
        kv = ring.split_keys(torch.stack((k, v), 1)[mine], rank)
        wanted = packed_reference(q, k, v, tuple(lengths), causal)[mine]
        found = [
            pass_kv(ring, q[mine], kv)[0],
            pass_q(ring, q[mine], kv)[0],
            pass_q(ring, q[mine], kv, returns="eager")[0],
        ]
        agree(max(gap(out, wanted) for out in found))

    return check


def property_rounds(counter: list[int]) -> Callable[[], None]:
    """Prompt, more prompts on the cache (some sequences idle), then decoding: each against all tokens so far."""
    rounds = st.lists(st.lists(st.integers(0, 30), min_size=2, max_size=2), min_size=1, max_size=3)

    @settings(IN_STEP, max_examples=25)
    @given(rounds, HEADS, st.integers(0, 4), st.integers(0, 1000))
    def check(sizes: list[list[int]], heads: tuple[int, int], decoded: int, seed: int) -> None:
        counter[0] += 1
        size, rank = dist.get_world_size(), dist.get_rank()
        total = [sum(column) + decoded for column in zip(*sizes, strict=True)]
        tensors = [whole(seed + s, length, heads, 4) for s, length in enumerate(total)]
        cache = KVCache(2, heads[1], 4)
        ring: Ring | None = None
        error = 0.0
        for step in range(len(sizes) + decoded):
            seen = (0, 0) if ring is None else ring.keys.lengths
            if step < len(sizes):
                new = balanced(sizes[step], size, starts=seen)
            else:
                new = round_robin(seen, size, step - len(sizes))
            if ring is None:
                keys = empty(2, size).extend(new)
                ring = Ring(new, keys, heads=heads[0], kv_heads=heads[1], head_dim=4)
            else:
                ring = ring.advance(new)
            error = max(error, one_round(ring, new, cache, tensors, rank))
        agree(error)

    return check


def one_round(
    ring: Ring, new: Placement, cache: KVCache, tensors: list[tuple[torch.Tensor, ...]], rank: int
) -> float:
    """Append the new tokens, attend by each algorithm, return the largest error."""
    spans = [(first, first + n) for first, n in zip(new.starts, new.lengths, strict=True)]
    q, k, v = (
        torch.cat([t[which][a:b] for t, (a, b) in zip(tensors, spans, strict=True)]) for which in range(3)
    )
    mine = new.index(rank)
    cache.append(new, rank, k[mine], v[mine])
    wanted = torch.cat(
        [reference(t[0][a:b], t[1][:b], t[2][:b], a, True) for t, (a, b) in zip(tensors, spans, strict=True)]
    )[mine]
    found = [
        pass_kv(ring, q[mine], cache.local),
        pass_q(ring, q[mine], cache.local),
        pass_q(ring, q[mine], cache.local, returns="eager"),
    ]
    error = max(gap(out, wanted) for out, _ in found)
    return max(error, *(gap(lse, found[0][1]) for _, lse in found[1:]))


def property_training(counter: list[int]) -> Callable[[], None]:
    """Output and gradients of q, k and v."""

    @settings(IN_STEP, max_examples=30)
    @given(LENGTHS, HEADS, st.sampled_from([3, 8]), st.booleans(), st.sampled_from(["auto", "blockwise"]))
    def check(lengths: list[int], heads: tuple[int, int], dim: int, causal: bool, kernel: str) -> None:
        counter[0] += 1
        size, rank = dist.get_world_size(), dist.get_rank()
        full = [x.requires_grad_() for x in whole(7, sum(lengths), heads, dim)]
        weight = torch.randn(sum(lengths), heads[0], dim, generator=torch.Generator().manual_seed(3))
        wanted = packed_reference(full[0], full[1], full[2], tuple(lengths), causal)
        gradients = torch.autograd.grad(wanted, full, weight.double())
        placement = balanced(lengths, size)
        ring = Ring(placement, heads=heads[0], kv_heads=heads[1], head_dim=dim, causal=causal, kernel=kernel)
        mine = placement.index(rank)
        local = [x.detach()[mine].requires_grad_() for x in full]
        out = ring_attention(ring, local[0], local[1], local[2])
        out.backward(weight[mine])
        pairs = [(out.detach(), wanted.detach()[mine])]
        pairs += [(x.grad, g[mine]) for x, g in zip(local, gradients, strict=True) if x.grad is not None]
        assert len(pairs) == 4
        agree(max(gap(a, b) for a, b in pairs))

    return check


PROPERTIES = {"prefill": property_prefill, "rounds": property_rounds, "training": property_training}


def subgroup_error(rank: int, size: int) -> float:
    """A ring of every other rank, whose numbers in the group differ from those in the world."""
    members = list(range(1, size, 2)) or [0]
    group = dist.new_group(members)
    error = 0.0
    if rank in members:
        q, k, v = whole(5, 19, (4, 2), 4)
        placement = balanced([19], len(members))
        ring = Ring(placement, heads=4, kv_heads=2, head_dim=4, group=group)
        mine = placement.index(ring.rank)
        kv = ring.split_keys(torch.stack((k, v), 1)[mine], ring.rank)
        wanted = packed_reference(q, k, v, (19,))[mine]
        outs = [pass_kv(ring, q[mine], kv)[0], pass_q(ring, q[mine], kv)[0]]
        outs += [
            pass_q(ring, q[mine], kv, returns="eager")[0],
            ring_attention(ring, q[mine], k[mine], v[mine]),
        ]
        error = max(gap(out, wanted) for out in outs)
    return error


def low_precision_error(rank: int, size: int) -> float:
    """bf16 in and out, against fp64 of the same rounded inputs."""
    q, k, v = (x.bfloat16() for x in whole(6, 150, (4, 2), 16))
    placement = balanced([150], size)
    ring = Ring(placement, heads=4, kv_heads=2, head_dim=16, dtype=torch.bfloat16)
    mine = placement.index(rank)
    kv = ring.split_keys(torch.stack((k, v), 1)[mine], rank)
    wanted = packed_reference(q, k, v, (150,))[mine]
    return max(gap(pass_kv(ring, q[mine], kv)[0], wanted), gap(pass_q(ring, q[mine], kv)[0], wanted))


def disagreements(rank: int, size: int) -> list[str]:
    """What each rank says when the last rank was given something else."""
    odd = rank == size - 1
    usual: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 4}
    said = []
    for lengths, change in (
        ([8, 5 if odd else 4], {}),
        ([5, 8] if odd else [8, 5], {}),
        ([8], {"heads": 8 if odd else 4}),
        ([8], {"dtype": torch.bfloat16 if odd else torch.float32}),
        ([8], {"dtype": torch.bfloat16 if odd else torch.float16}),
        ([8], {"causal": not odd}),
    ):
        try:
            Ring(balanced(lengths, size), **{**usual, **change})
            said.append("")
        except InputError as error:
            said.append(str(error))
    return said


def local_errors(rank: int, size: int) -> list[str]:
    """Errors that need no other rank."""
    ring = Ring(balanced([8], size), heads=4, kv_heads=2, head_dim=4)
    right = torch.zeros(ring.queries.rows(rank), 4, 4)
    kv = [torch.zeros(ring.keys.rows(rank), 2, 2, 4)]
    cached = Ring(balanced([1], size, [8]), balanced([9], size), heads=4, kv_heads=2, head_dim=4)
    calls: list[Callable[[], Any]] = [
        lambda: Ring(balanced([8], size), heads=6, kv_heads=4, head_dim=4, check=False),
        lambda: Ring(balanced([8], size + 1), heads=4, kv_heads=4, head_dim=4, check=False),
        lambda: Ring(
            balanced([8], size), balanced([8, 2], size), heads=4, kv_heads=4, head_dim=4, check=False
        ),
        lambda: pass_kv(ring, right[:-1], kv),
        lambda: pass_kv(ring, right.double(), kv),
        lambda: pass_q(ring, right, []),
        lambda: pass_q(ring, right, [kv[0][:, :1]]),
        lambda: pass_q(ring, right, kv, returns="all2all"),  # type: ignore[arg-type]
        lambda: ring_attention(cached, right, right, right),
        lambda: ring_attention(ring, right, right, right),
    ]
    said = []
    for call in calls:
        try:
            call()
            said.append("")
        except InputError as error:
            said.append(str(error))
    return said


def traces(rank: int, size: int) -> dict[str, Any]:
    """A traced call of each algorithm on a cached prompt, large enough to time."""
    cached, new, heads, kv_heads, dim = 1600, 480, 4, 2, 32
    old = balanced([cached], size)
    placement = balanced([new], size, [cached])
    ring = Ring(placement, old.extend(placement), heads=heads, kv_heads=kv_heads, head_dim=dim)
    rows = int(ring.keys.counts[rank, 0])
    q, kv = torch.randn(placement.rows(rank), heads, dim), [torch.randn(rows, 2, kv_heads, dim)]
    plain = Ring(placement := balanced([new], size), heads=heads, kv_heads=kv_heads, head_dim=dim)
    leaves = [
        torch.randn(placement.rows(rank), h, dim, requires_grad=True) for h in (heads, kv_heads, kv_heads)
    ]
    found = {}
    for name, call in {
        "pass_kv": lambda trace: pass_kv(ring, q, kv, trace),
        "pass_q": lambda trace: pass_q(ring, q, kv, trace),
        "eager": lambda trace: pass_q(ring, q, kv, trace, returns="eager"),
        "training": lambda trace: ring_attention(plain, *leaves, trace=trace).sum().backward(),
    }.items():
        trace = Trace()
        call(trace)
        found[name] = trace.chrome(rank)
    return {"q": q.numel() * 4, "kv": kv[0].numel() * 4, "rows": len(q), "traces": found}


def slow_link_overlap(rank: int, size: int) -> dict[str, float]:
    """Attention that lasts 40 ms a step while the neighbour is late to send by nothing: the wait is short."""
    placement = balanced([64 * size], size)
    ring = Ring(placement, heads=2, kv_heads=2, head_dim=64)
    q = torch.randn(placement.rows(rank), 2, 64)
    kv = [torch.randn(placement.rows(rank), 2, 2, 64)]
    forward = ring.kernel.forward

    class Slow(Blockwise):
        def forward(self, *args: Any) -> Any:  # a kernel that leaves the core to the transfer
            time.sleep(0.04)
            return forward(*args)

    ring.kernel = Slow()
    dist.barrier()
    trace = Trace()
    pass_kv(ring, q, kv, trace)
    return {name: trace.total(name) for name in ("attention", "transfer", "wait")}


def serve(place: Rank) -> dict[str, Any]:
    """All of the above in one launch."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"properties": {}}
    for name, make in PROPERTIES.items():
        counter = [0]
        try:
            make(counter)()
            failure = ""
        except Exception as error:
            failure = "".join(traceback.format_exception(error))[-3000:]
        found["properties"][name] = {"cases": counter[0], "failure": failure}
    rank, size = place.rank, place.world_size
    found["subgroup"] = subgroup_error(rank, size)
    found["bf16"] = low_precision_error(rank, size)
    found["disagreements"] = disagreements(rank, size)
    found["local_errors"] = local_errors(rank, size)
    found["traces"] = traces(rank, size)
    found["overlap"] = slow_link_overlap(rank, size)
    return found


# ------------------------------------------------------------------------------- in the test


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ran(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank reports."""
    return launch(f"{Path(__file__)}:serve", request.param, timeout=240)


@pytest.mark.parametrize("name", PROPERTIES)
def test_equals_single_process_attention(ran: list[dict[str, Any]], name: str) -> None:
    for rank in ran:
        assert rank["properties"][name]["failure"] == ""
        assert rank["properties"][name]["cases"] >= 25


def test_a_subgroup_has_its_own_ring(ran: list[dict[str, Any]]) -> None:
    assert max(rank["subgroup"] for rank in ran) < TOLERANCE


def test_bf16_is_as_exact_as_its_rounding(ran: list[dict[str, Any]]) -> None:
    assert max(rank["bf16"] for rank in ran) < 0.03  # outputs up to about 3, 2**-8 relative a rounding


def test_every_rank_names_a_disagreement(ran: list[dict[str, Any]]) -> None:
    wanted = [
        "new tokens (",
        "placement of the queries",
        "query heads (8 against 4)",
        "element size",
        "precision",
        "mask",
    ]
    for rank in ran:
        for said, what in zip(rank["disagreements"], wanted, strict=True):
            assert what in said
            assert f"rank {len(ran) - 1} and rank 0 disagree" in said


def test_errors_name_the_tensor_and_the_remedy(ran: list[dict[str, Any]]) -> None:
    size = len(ran)
    wanted = [
        "6 query heads of dimension 4 cannot share 4 key-value heads",
        f"on {size + 1} ranks",
        "keys of 2; give a sequence without new tokens length 0",
        "q on rank",
        "torch.float64",
        "kv has 0 sequences but the layout has 1",
        "kv of sequence 0",
        "'all2all' (did you mean 'all_to_all'?)",
        "without keys",
        "k on rank",
    ]
    for rank in ran:
        for said, what in zip(rank["local_errors"], wanted, strict=True):
            assert what in said


def spans(rank: dict[str, Any], algorithm: str, name: str, **args: Any) -> list[dict[str, Any]]:
    """Chrome events of one kind, by start."""
    events = [e for e in rank["traces"]["traces"][algorithm] if e["ph"] == "X" and e["name"] == name]
    events = [e for e in events if all(e["args"].get(key) == value for key, value in args.items())]
    return sorted(events, key=lambda event: event["ts"])


@pytest.mark.parametrize(("algorithm", "tag"), [("pass_kv", 1), ("pass_q", 3), ("eager", 3), ("training", 1)])
def test_the_next_block_is_requested_before_attention_begins(
    ran: list[dict[str, Any]], algorithm: str, tag: int
) -> None:
    for rank in ran:
        posts = spans(rank, algorithm, "post", tag=tag)
        waits = spans(rank, algorithm, "wait", tag=tag)
        work = spans(rank, algorithm, "attention")
        passes = 2 if algorithm == "training" else 1
        assert len(work) == passes * len(ran)
        assert len(posts) == len(waits) == passes * (len(ran) - 1)
        for event, wait in zip(posts, waits, strict=True):
            step = event["args"]["step"]  # of the block that is requested
            behind = [w for w in work if event["ts"] <= w["ts"] and w["ts"] + w["dur"] <= wait["ts"]]
            assert [w["args"]["step"] for w in behind] == [step - 1]


def test_gradients_travel_behind_the_next_steps_attention(ran: list[dict[str, Any]]) -> None:
    for rank in ran:
        transfers = spans(rank, "training", "transfer", tag=2)
        backward = spans(rank, "training", "attention", backward=True)
        assert len(transfers) == len(ran)
        for transfer, later in zip(transfers, backward[1:], strict=False):
            assert transfer["ts"] <= later["ts"]
            assert later["ts"] + later["dur"] <= transfer["ts"] + transfer["dur"]


def test_eager_partial_outputs_travel_behind_attention(ran: list[dict[str, Any]]) -> None:
    for rank in ran:
        transfers = spans(rank, "eager", "transfer", tag=4)
        assert len(transfers) == len(ran) - 1
        last = spans(rank, "eager", "attention")[-1]
        for transfer in transfers[:-1]:
            assert transfer["ts"] <= last["ts"]
        assert not spans(rank, "eager", "all_to_all")
        assert len(spans(rank, "pass_q", "all_to_all")) == 1


def test_bytes_on_the_wire(ran: list[dict[str, Any]]) -> None:
    size = len(ran)
    for place, rank in enumerate(ran):
        sent = {
            name: [e["args"]["bytes"] for e in spans(rank, name, "transfer", tag=tag)]
            for name, tag in (("pass_kv", 1), ("pass_q", 3), ("eager", 4))
        }
        # step s passes on what began s ranks back
        assert sent["pass_kv"] == [ran[(place - s) % size]["traces"]["kv"] for s in range(size - 1)]
        assert sent["pass_q"] == [ran[(place - s) % size]["traces"]["q"] for s in range(size - 1)]
        others = [ran[(place - s) % size]["traces"]["rows"] for s in range(1, size)]
        home = [rows * 4 * (32 * 4 + 4) for rows in others]  # 4 heads of 32 fp32 outputs and one fp32 sum
        assert sorted(sent["eager"]) == sorted(home)
        assert [e["args"]["bytes"] for e in spans(rank, "pass_q", "all_to_all")] == [sum(home)]


def test_transfers_run_while_attention_does(ran: list[dict[str, Any]]) -> None:
    for rank in ran:
        seconds = rank["overlap"]
        assert seconds["attention"] >= 0.04 * len(ran)
        hidden = seconds["transfer"] - seconds["wait"]
        assert hidden >= 0.04 * (len(ran) - 1)  # in flight for as long as the steps before it took
        assert seconds["wait"] < 0.5 * seconds["attention"]


def test_the_trace_is_chrome_json(ran: list[dict[str, Any]]) -> None:
    for place, rank in enumerate(ran):
        events = json.loads(json.dumps(rank["traces"]["traces"]["pass_kv"]))
        assert {event["pid"] for event in events} == {place}
        rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
        assert [rows[e["tid"]] for e in events if e["name"] == "attention"] == ["compute"] * len(ran)
        assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in events if event["ph"] == "X")
