"""The one-process parts of context parallelism: placement, mask geometry, kernels, merging."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from codegen.runtime.context_parallel import KVCache, balanced, contiguous, empty, merge, round_robin
from codegen.runtime.context_parallel.kernels import Blockwise, FlashCpu, FlashCuda, choose
from codegen.runtime.context_parallel.pieces import Piece, between, split
from codegen.runtime.context_parallel.placement import Placement
from ir.errors import InputError

torch.set_num_threads(1)

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=5)
ranks = st.integers(1, 5)
positions = st.sets(st.integers(0, 30), max_size=20).map(lambda found: np.array(sorted(found), np.int64))


@given(lengths, ranks)
def test_balanced_placement_is_a_partition_and_ranks_differ_by_one_token(sizes: list[int], size: int) -> None:
    placement = balanced(sizes, size)
    together = np.concatenate([placement.index(rank) for rank in range(size)])
    assert sorted(together) == list(range(sum(sizes)))
    rows = [placement.rows(rank) for rank in range(size)]
    assert max(rows) - min(rows) <= 1
    for sequence, length in enumerate(sizes):
        held = [placement.positions(rank, sequence) for rank in range(size)]
        assert sorted(np.concatenate(held)) == list(range(length))


@given(st.integers(1, 60), ranks)
def test_rank_i_holds_chunks_i_and_2n_less_1_less_i(chunk: int, size: int) -> None:
    placement = balanced([chunk * 2 * size], size)
    for rank in range(size):
        mirror = 2 * size - 1 - rank
        wanted = [*range(chunk * rank, chunk * (rank + 1)), *range(chunk * mirror, chunk * (mirror + 1))]
        assert placement.positions(rank, 0).tolist() == wanted


def pairs(queries: Placement, rank: int) -> int:
    """Visible pairs that a rank computes in a whole round, by the pieces."""
    rounds = (between(queries, rank, queries, other) for other in range(queries.world_size))
    return sum(piece.pairs for found in rounds for _, parts in found for piece in parts)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_causal_work_is_equal_between_ranks_where_contiguous_parts_are_not(size: int) -> None:
    length = 2 * size * 50
    work = [pairs(balanced([length], size), rank) for rank in range(size)]
    assert sum(work) == length * (length + 1) // 2
    assert max(work) == min(work)
    uneven = [pairs(contiguous([length], size), rank) for rank in range(size)]
    assert max(uneven) > 1.45 * sum(uneven) / size  # 2 - 1/N in the limit


@given(positions, positions, st.booleans())
def test_pieces_cover_each_visible_pair_once(queries: np.ndarray, keys: np.ndarray, causal: bool) -> None:
    cover = np.zeros((len(queries), len(keys)), int)
    total = 0
    for piece in split(queries, keys, causal):
        a, b, c, d = *piece.rows, *piece.keys
        if piece.mask == "square":
            shape = np.tril(np.ones((b - a, d - c), int))
        elif piece.mask == "positions":
            assert piece.query_positions is not None
            assert piece.key_positions is not None
            shape = (piece.key_positions[None] <= piece.query_positions[:, None]).astype(int)
        else:
            shape = np.ones((b - a, d - c), int)
        cover[a:b, c:d] += shape
        total += piece.pairs
    wanted = keys[None] <= queries[:, None] if causal else np.ones_like(cover, bool)
    assert (cover == wanted).all()
    assert total == wanted.sum()


@given(st.integers(0, 12), st.integers(0, 4), st.integers(0, 12), ranks, st.booleans())
def test_pieces_between_ranks_see_every_visible_pair(
    before: int, new: int, later: int, size: int, causal: bool
) -> None:
    """Queries in the middle of their keys: tokens come before and after them."""
    queries = balanced([new], size, [before])
    keys = balanced([before], size).extend(queries).extend(balanced([later], size, [before + new]))
    seen = sum(
        piece.pairs
        for mine in range(size)
        for other in range(size)
        for _, parts in between(queries, mine, keys, other, causal)
        for piece in parts
    )
    whole = new * (before + new + later)
    assert seen == (sum(range(before + 1, before + new + 1)) if causal else whole)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), ranks, st.integers(1, 12))
def test_decoding_fills_ranks_evenly(starts: list[int], size: int, steps: int) -> None:
    keys = balanced(starts, size)
    before = keys.counts.copy()
    for step in range(steps):
        keys = keys.extend(round_robin(keys.lengths, size, step))
    grown = keys.counts - before  # per rank and sequence
    assert grown.sum(axis=0).tolist() == [steps] * len(starts)
    assert (grown.max(axis=0) - grown.min(axis=0) <= 1).all()
    recounted = [[np.count_nonzero(owner == rank) for owner in keys.owners] for rank in range(size)]
    assert keys.counts.tolist() == recounted


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float):
    """Attention by its definition in fp64; q (t, H, D), k and v (s, G, D), visible (t, s)."""
    each = q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(each, dim=1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q.double(), keys) * scale
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    shares = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
    return torch.einsum("hts,shd->thd", shares, values), lse.T


CASES = [
    Piece((0, 7), (0, 9), "full"),
    Piece((0, 1), (0, 40), "full"),
    Piece((0, 23), (0, 23), "square"),
    Piece((0, 1), (0, 1), "square"),
    Piece((0, 4), (0, 6), "positions", np.array([3, 5, 9, 20]), np.array([4, 5, 8, 10, 19, 30])),
]


@pytest.mark.parametrize("kernel", [FlashCpu(), Blockwise(), Blockwise(tile_scores=64, key_tile=4)])
@pytest.mark.parametrize("piece", CASES, ids=lambda piece: f"{piece.mask}{piece.rows[1]}x{piece.keys[1]}")
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (4, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_equal_the_definition(kernel, piece, heads, dtype) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(1)
    t, s, dim = piece.rows[1], piece.keys[1], 12
    q = torch.randn(t, heads[0], dim, generator=generator, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(s, heads[1], dim, generator=generator, dtype=dtype, requires_grad=True) for _ in range(2)
    )
    visible = torch.ones(t, s, dtype=torch.bool)
    if piece.mask == "square":
        visible = visible.tril()
    elif piece.mask == "positions":
        visible = (
            torch.as_tensor(piece.key_positions)[None] <= torch.as_tensor(piece.query_positions)[:, None]
        )
    wanted, wanted_lse = reference(q, k, v, visible, 0.37)
    grad = torch.randn(t, heads[0], dim, generator=generator, dtype=torch.float64)
    wanted_gradients = torch.autograd.grad(wanted, (q, k, v), grad)
    with torch.no_grad():
        out, lse = kernel.forward(q, k, v, piece, 0.37)
        found = kernel.backward(grad.to(dtype), q, k, v, out, lse, piece, 0.37)
    bound = 2e-6 if dtype == torch.float32 else 1e-12
    assert (out.double() - wanted).abs().max() < bound
    seen = wanted_lse > -torch.inf
    assert torch.equal(seen, lse > -torch.inf)
    assert (lse.double() - wanted_lse)[seen].abs().max() < bound
    for mine, theirs in zip(found, wanted_gradients, strict=True):
        assert (mine.double() - theirs.double()).abs().max() < 10 * bound


@pytest.mark.parametrize("piece", CASES[:4], ids=lambda piece: f"{piece.mask}{piece.rows[1]}x{piece.keys[1]}")
def test_the_cuda_kernel_is_called_as_its_schema_says(piece: Piece) -> None:
    """Shapes and types on the meta device; values need a GPU."""
    q = torch.empty(piece.rows[1], 6, 64, dtype=torch.bfloat16, device="meta")
    kv = torch.empty(piece.keys[1], 2, 2, 64, dtype=torch.bfloat16, device="meta")
    out, lse = FlashCuda().forward(q, kv[:, 0], kv[:, 1], piece, 0.1)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:2], torch.float32)


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        for part in found if isinstance(found, tuple | list) else (found,):
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.numel())
        return found


def test_blockwise_holds_one_tile_of_scores() -> None:
    t, heads, dim, tile = 2000, 2, 4, 40_000
    q, k, v = (torch.randn(t, heads, dim) for _ in range(3))
    kernel, piece = Blockwise(tile_scores=tile, key_tile=100), Piece((0, t), (0, t), "square")
    with Largest() as seen:
        out, lse = kernel.forward(q, k, v, piece, 0.5)
        kernel.backward(q, q, k, v, out, lse, piece, 0.5)
    assert seen.elements <= max(tile, t * heads * dim)  # the score matrix would be 8,000,000
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=0.5
    )
    assert (out - wanted.transpose(0, 1)).abs().max() < 2e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 9), min_size=2, max_size=5))
def test_merging_parts_of_the_keys_gives_attention_over_all(seed: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(sizes)
    q = torch.randn(5, 2, 4, generator=generator) * 6
    k, v = (torch.randn(total, 1, 4, generator=generator) * 6 for _ in range(2))
    visible = torch.rand(5, total, generator=generator) < 0.5  # some queries see nothing of some parts
    wanted, wanted_lse = reference(q, k, v, visible, 1.0)
    parts = [
        reference(q, k[a : a + n], v[a : a + n], visible[:, a : a + n], 1.0)
        for a, n in zip(np.cumsum([0, *sizes[:-1]]).tolist(), sizes, strict=True)
    ]
    out, lse = merge(torch.stack([o for o, _ in parts]), torch.stack([s for _, s in parts]))
    assert torch.allclose(out, wanted, atol=1e-10)
    assert torch.allclose(lse, wanted_lse, atol=1e-10)


def test_a_cache_keeps_what_it_was_given() -> None:
    cache, rows = KVCache(3, 2, 4), [torch.zeros(0, 2, 2, 4)] * 3
    placement = empty(3, 2)
    for step, sizes in enumerate([(5, 0, 2), (1, 7, 0), (1, 1, 1), (1, 1, 1)]):
        new = balanced(sizes, 2, starts=placement.lengths)
        placement = placement.extend(new)
        k, v = (torch.full((new.rows(0), 2, 4), float(10 * step + side)) for side in (0, 1))
        cache.append(new, 0, k, v)
        parts = torch.stack((k, v), 1).split(new.counts[0].tolist())
        rows = [torch.cat(pair) for pair in zip(rows, parts, strict=True)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(cache.local, rows, strict=True))
    assert cache.bytes == sum(x.numel() for x in rows) * 4


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: balanced([3, -1], 2), "sequence 1 has length -1"),
        (lambda: balanced([3], 0), "at least one rank"),
        (lambda: balanced([3], 2, starts=[1, 2]), "1 sequences have 2 starts"),
        (lambda: balanced([3], 2, starts=[-4]), "start -4"),
        (lambda: round_robin([3], 2, -1), "not step -1"),
        (lambda: Placement(2, (np.array([0, 2], np.int32),), (0,)), "token on rank 2; ranks go from 0 to 1"),
        (lambda: balanced([3], 2).extend(balanced([1], 2)), "has 3 tokens but its new tokens start at 0"),
        (lambda: balanced([3], 2).extend(balanced([1], 4)), "on 4 ranks"),
        (lambda: choose("flsh", torch.float32, torch.device("cpu"), 8), "did you mean 'flash'"),
        (
            lambda: choose("flash", torch.float32, torch.device("cuda"), 8),
            "no flash attention for torch.float32",
        ),
        (
            lambda: KVCache(1, 2, 4).append(balanced([4], 2), 0, torch.zeros(3, 2, 4), torch.zeros(2, 2, 4)),
            r"gives rank 0 \(2, 2, 4\)",
        ),
    ],
)
def test_errors_say_what_is_wrong(call, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=says):
        call()
