"""What the tests of the compressed exchange run in other processes: sharded against unsharded tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from codegen.runtime.codecs import absolute_bound
from codegen.runtime.compressed_exchange import Piece, ShardedEmbeddings, average_gradients
from codegen.runtime.launch import Rank
from ir.compression import Compression
from ir.reading import parse_record

TABLES: dict[str, tuple[int, int, tuple[str, ...], str]] = {  # rows, dim, features, pooling
    "a": (50, 8, ("f0",), "sum"),
    "b": (7, 4, ("f1", "f2"), "mean"),
    "c": (200, 16, ("f3",), "sum"),
    "d": (3, 4, ("f4",), "sum"),
}


def pieces(world: int) -> list[Piece]:
    """a and b whole, c in two column blocks, d on every rank; the last rank of four holds nothing."""
    made = []
    for number, (name, (rows, dim, features, pooling)) in enumerate(TABLES.items()):
        if name == "c":
            made += [Piece(name, rows, features, pooling, at % world, 8 * at, 8) for at in range(2)]
        else:
            rank = -1 if name == "d" else min(number + 1, 2) % world
            made.append(Piece(name, rows, features, pooling, rank, 0, dim))
    return made


def weights() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(5)
    return {name: torch.randn(rows, dim, generator=random) for name, (rows, dim, _, _) in TABLES.items()}


def batch(rank: int, step: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Uneven over ranks, with empty bags; rank 1 has no samples in step 1."""
    random = np.random.default_rng([rank, step])
    samples = 0 if (rank, step) == (1, 1) else 5 + 3 * rank
    found = {}
    for rows, _, features, _ in TABLES.values():
        for feature in features:
            lengths = random.integers(0, 4, samples)
            ids = random.integers(0, rows, int(lengths.sum()))
            found[feature] = (torch.from_numpy(ids), torch.from_numpy(lengths))
    return found


def unsharded(whole: dict[str, Tensor], ids: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {
        f: F.embedding_bag(ids[f][0], whole[name], torch.cumsum(ids[f][1], 0) - ids[f][1], mode=pooling)
        for name, (_, _, features, pooling) in TABLES.items()
        for f in features
    }


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    return torch.stack([(out * torch.sin(out.detach() * 3 + 1)).sum() for out in outputs.values()]).sum()


def gradient_of(out: Tensor) -> Tensor:
    return torch.sin(out * 3 + 1)


def compare(rank: Rank, compression: dict[str, Any] | None, sparse: bool = False) -> dict[str, float]:
    """Largest differences from the unsharded model, and largest errors as fractions of what is allowed."""
    section = None if compression is None else parse_record(Compression, compression, "section")
    tables = pieces(rank.world_size)
    module = ShardedEmbeddings(tables, weights(), section, sparse=sparse)
    worst = {"forward": 0.0, "backward": 0.0, "forward_bound": 0.0, "backward_bound": 0.0}
    for step in range(3):
        factor = section.decay.factor(step) if section else 1.0
        ids = batch(rank.rank, step)
        pending = module.start(ids)
        outputs = pending.wait()
        whole = {name: w.requires_grad_() for name, w in weights().items()}
        expected = unsharded(whole, ids)
        for piece in tables:
            for feature in piece.features:
                block = slice(piece.col, piece.col + piece.cols)
                wanted = expected[feature].detach()[:, block].contiguous()
                error = (outputs[feature].detach()[:, block] - wanted).abs()
                _note(worst, "forward", error, _allowed(section, piece, "forward", wanted, factor, rank.rank))
        module.zero_grad()
        loss_of(outputs).backward()
        average_gradients(module.replicated())
        grads, slack = _reference(rank, step, section, tables, factor, outputs)
        for piece in tables:
            if piece.rank in (rank.rank, -1):
                grad = module.weights[piece.key].grad
                assert grad is not None
                block = slice(piece.col, piece.col + piece.cols)
                error = (grad.to_dense() - grads[piece.table][:, block]).abs()
                _note(worst, "backward", error, slack[piece.key])
    return {**worst, "sent": float(module.traffic[0].sent), "raw": float(module.traffic[0].raw)}


def _note(worst: dict[str, float], what: str, error: Tensor, allowed: Any) -> None:
    if error.numel():
        worst[what] = max(worst[what], float(error.max()))
        worst[f"{what}_bound"] = max(worst[f"{what}_bound"], float((error / (allowed + 1e-5)).max()))


def _allowed(
    section: Compression | None, piece: Piece, direction: Any, message: Tensor, factor: float, rank: int
) -> float:
    decided = section.of(piece.table, direction) if section else None
    if decided is None or piece.rank in (rank, -1) or not message.numel():
        return 0.0
    return absolute_bound(message, decided.bound * factor)


def _reference(
    rank: Rank,
    step: int,
    section: Compression | None,
    tables: list[Piece],
    factor: float,
    outputs: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean over ranks of the unsharded gradients of what each rank received, and what codecs may change in it.

    Gradients depend on the outputs, which differ by the forward codec, so ranks tell each other theirs.
    """
    import torch.distributed as dist

    received: list[Any] = [None] * rank.world_size
    dist.all_gather_object(received, {f: out.detach() for f, out in outputs.items()})
    grads = {name: torch.zeros_like(w) for name, w in weights().items()}
    slack = {piece.key: torch.zeros(piece.rows, piece.cols) for piece in tables}
    for other in range(rank.world_size):
        ids = batch(other, step)
        for name, (rows, _, features, pooling) in TABLES.items():
            for f in features:
                numbers, lengths = ids[f]
                bag = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
                share = 1.0 / lengths.clamp(min=1) if pooling == "mean" else torch.ones(len(lengths))
                grad = gradient_of(received[other][f])
                grads[name].index_add_(0, numbers, (grad * share[:, None])[bag] / rank.world_size)
                for piece in tables:
                    if piece.table == name:
                        message = grad[:, piece.col : piece.col + piece.cols].contiguous()
                        bound = _allowed(section, piece, "backward", message, factor, other)
                        touched = torch.bincount(numbers, weights=share[bag], minlength=rows)
                        slack[piece.key] += (touched * bound / rank.world_size)[:, None].float()
    return grads, slack


def damage(rank: Rank) -> str:
    """Rank 0 flips one bit of what it sends to rank 1."""
    from codegen.runtime import compressed_all_to_all as wire
    from ir.errors import InputError

    made = wire._coded

    def broken(outgoing: Any, rules: Any) -> Any:
        payload, sizes = made(outgoing, rules)
        if rank.rank == 0:
            payload[60] ^= 4
        return payload, sizes

    wire._coded = broken
    x = torch.randn(20, 4)
    rules = [[wire.Rule("eb_lz", 0.1)], [wire.Rule("eb_lz", 0.1)]]
    pending = wire.start([[x], [x]], [[(20, 4)], [(20, 4)]], rules, plain=False)
    try:
        pending.wait()
    except InputError as error:
        return str(error)
    return "fine"


def disagree(rank: Rank) -> str:
    """Each rank expects fewer samples than the other sends."""
    from codegen.runtime import compressed_all_to_all as wire
    from ir.errors import InputError

    x = torch.randn(20, 4)
    rules = [[wire.Rule("lz")], [wire.Rule("lz")]]
    shape = (2, 4)
    try:
        wire.start([[x], [x]], [[shape], [shape]], rules, plain=False)
    except InputError as error:
        return str(error)
    return "fine"


def train(rank: Rank, path: str, tables: list[Any]) -> dict[str, Any]:
    """Three steps of ``plan.apply`` beside the unsharded model on the whole batch."""
    import copy

    import torch.distributed as dist
    from torchrec import KeyedJaggedTensor

    import planner
    from codegen.runtime.batches import Batch
    from codegen.runtime.compare_rank import train_step, unsharded_model
    from codegen.runtime.gather import whole_weights
    from tests.torchrec_models import Small

    plan = planner.Plan.load(path)
    torch.manual_seed(7)
    module = Small(tables)
    alone = unsharded_model(plan, copy.deepcopy(module), "adagrad", 0.1, ("adagrad", 0.1), 1e-3)
    names = list(module.names)
    model = plan.apply(module, dist.group.WORLD, optimizer="adagrad", lr=0.1, eps=1e-3)
    found: dict[str, Any] = {"kind": type(model).__name__}
    rows = {feature: table[1] for table in tables for feature in table[3]}
    for step in range(3):
        random = torch.Generator().manual_seed(step)
        lengths = torch.randint(0, 3, (len(names), 16 * rank.world_size), generator=random)
        values = [
            torch.randint(0, rows[f], (int(n.sum()),), generator=random)
            for f, n in zip(names, lengths, strict=True)
        ]
        ids = KeyedJaggedTensor(keys=names, values=torch.cat(values), lengths=lengths.reshape(-1).int())
        samples = 16 * rank.world_size
        dense = torch.randn(samples, 3, generator=random)
        batch = Batch((dense, ids), torch.randint(0, 2, (samples,), generator=random).float())
        expected = train_step(alone, batch)[0]
        mine = train_step(model, batch.part(rank.rank, rank.world_size))[0]
        part = slice(16 * rank.rank, 16 * rank.rank + 16)
        found[f"outputs_{step}"] = max(float((mine[k] - expected[k][part]).abs().max()) for k in mine)
    reference = dict(alone.module.named_parameters())
    if found["kind"] == "CompressedModel":
        pairs = [
            (p, reference[f"ebc.embedding_bags.{piece.table}.weight"][:, piece.col : piece.col + piece.cols])
            for e in model.embeddings
            for piece, p in e.held()
        ]
        found["sent"], found["raw"] = (
            sum(getattr(t, k) for e in model.embeddings for t in e.traffic) for k in ("sent", "raw")
        )
    else:
        whole = whole_weights(model.module)
        pairs = [(whole[k], v) for k, v in reference.items() if "ebc" in k]
    found["weights"] = max([float((a - b).abs().max()) for a, b in pairs] or [0.0])
    return found


def narrow(rank: Rank, path: str, tables: list[Any], dtype: str) -> dict[str, float]:
    """A step of SGD with vectors in ``dtype`` on the wire, from tables of zeros, then a forward pass of longer bags.

    In units of the type's rounding, relative to the value: how far the update (a row a sample, so minus its gradient) and
    the output are from the unsharded model's, and how far from a value of the type.
    """
    import copy

    import torch.distributed as dist
    from torchrec import KeyedJaggedTensor

    import planner
    from codegen.runtime.gather import whole_weights
    from tests.torchrec_models import Small

    torch.manual_seed(3)
    module = Small(tables)
    for name, p in module.named_parameters():
        if name.startswith("ebc."):
            p.data.zero_()
    alone = copy.deepcopy(module)
    samples = 8 * rank.world_size
    mine = slice(8 * rank.rank, 8 * rank.rank + 8)
    model = planner.Plan.load(path).apply(module, dist.group.WORLD, optimizer="sgd", lr=1.0, dense_lr=0.0)
    rounding = torch.finfo(getattr(torch, dtype)).eps / 2
    random = torch.Generator().manual_seed(4)

    def ids(lengths: Tensor, part: slice) -> Any:
        rows = {feature: table[1] for table in tables for feature in table[3]}
        values = [torch.randperm(rows[f], generator=random) for f in alone.names]
        split = [v[: int(n.sum())].split(n.tolist())[part] for v, n in zip(values, lengths, strict=True)]
        return KeyedJaggedTensor(
            keys=list(alone.names),
            values=torch.cat([row for one in split for row in one]),
            lengths=lengths[:, part].reshape(-1).int(),
        )

    def both(lengths: Tensor) -> tuple[Any, Any]:
        state = random.get_state()
        whole = ids(lengths, slice(None))
        random.set_state(state)
        return whole, ids(lengths, mine)

    dense, labels = torch.randn(samples, 3, generator=random), torch.rand(samples, generator=random)
    one_each, few = torch.ones(len(alone.names), samples).long(), torch.full((len(alone.names), samples), 2)
    whole, part = both(one_each)
    scale = 1024.0  # keeps gradients above the subnormals of fp16
    (scale * F.binary_cross_entropy_with_logits(alone(dense, whole), labels)).backward()
    loss = F.binary_cross_entropy_with_logits(model(dense[mine], part), labels[mine])
    model.zero_grad()
    (scale * loss).backward()
    model.step()
    held = whole_weights(model.module)
    found = {"gradient": 0.0, "gradient_type": 0.0, "output": 0.0, "output_type": 0.0}

    def note(what: str, value: Tensor, wanted: Tensor) -> None:
        own = value.to(getattr(torch, dtype)).to(value.dtype)
        far = (value - wanted).abs().max() / wanted.abs().max() / rounding
        found[what] = max(found[what], float(far))
        found[f"{what}_type"] = max(found[f"{what}_type"], float((own - value).abs().max()))

    for name, p in alone.named_parameters():
        if name.startswith("ebc."):
            assert p.grad is not None
            note("gradient", held[name], -p.grad)
            # rows of full float32 precision from here on, the same in both models
            p.data = torch.randn(p.shape, generator=random)
    from codegen.torchrec import load_weights

    load_weights(model.module, alone.state_dict())
    whole, part = both(few)
    with torch.no_grad():
        expected, got = alone.ebc(whole), model.module.module.ebc(part).wait()
    for feature in alone.names:
        note("output", got[feature], expected[feature][mine])
    return found
