"""What the composition tests run in other processes: a plan that joins everything beside the unsharded model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from codegen.composed import transport_of
from codegen.formats import apply_formats, narrow_optimizer, sites
from codegen.runtime.compare_rank import unsharded_model
from codegen.runtime.composed.batch import split_batch
from codegen.runtime.dense.shard import whole
from codegen.runtime.gather import gather_rows
from codegen.runtime.launch import Rank
from codegen.towers import TowerModel, whole_tables
from ir.compression import codec_of
from ir.plan import Plan
from ir.towers import sent_name
from planner.plan import Plan as Verbs
from planner.zoo import build
from planner.zoo.multi_tower import with_towers

LR, EPS = 0.1, 1e-3  # eps: Adagrad divides by it where gradients vanish, and so magnifies their rounding
SESSION = 8  # samples that share the values of deduplicated features


def batch(model: Any, plan: Plan, size: int, seed: int) -> tuple[Tensor, Any, Tensor]:
    """A global batch in which the samples of a session share the ids of deduplicated features."""
    from torchrec import KeyedJaggedTensor

    dense, ids, labels = model.random_batch(size, plan.workload, seed)
    section = plan.decisions.dedup
    shared = {f for group in section.chosen for f in group.features} if section is not None else set()
    jagged, values, lengths = ids.to_dict(), [], []
    for key in ids.keys():  # noqa: SIM118 - not a mapping
        one = list(torch.split(jagged[key].values(), jagged[key].lengths().tolist()))
        if key in shared:
            one = [one[i - i % SESSION] for i in range(size)]
        values += one
        lengths += [len(v) for v in one]
    keyed = KeyedJaggedTensor(list(ids.keys()), torch.cat(values), lengths=torch.tensor(lengths).int())
    return dense, keyed, labels


def cut(whole_batch: tuple[Tensor, Any, Tensor], rank: int, world: int) -> tuple[Tensor, Any, Tensor]:
    from codegen.runtime.batches import cut as slice_of

    dense, ids, labels = whole_batch
    each = len(labels) // world
    parts = [slice_of(value, rank * each, each) for value in (dense, ids, labels)]
    return parts[0], parts[1], parts[2]


def compare(
    place: Rank, plan: dict[str, Any], model: str, options: dict[str, Any], size: int, steps: int, **how: Any
) -> dict[str, Any]:
    """Largest differences to the unsharded model, and errors as fractions of what codecs' bounds allow."""
    decided = Verbs.from_dict(plan)
    torch.manual_seed(7)
    module = build(model, device="cpu", **options).module
    towers = decided.decisions.towers
    if towers is not None and towers.applied:
        module = with_towers(module, towers)
    alone = copy.deepcopy(module)
    batches = [batch(alone, decided, size, seed) for seed in range(steps)]
    shapes = {t.name: (t.rows, t.dim) for t in decided.table_plans}
    made = decided.apply(
        module, torch.distributed.group.WORLD, lr=LR, dense_optimizer="sgd", dense_lr=LR, eps=EPS, **how
    )
    assert isinstance(made, TowerModel)
    reference = unsharded_model(decided, alone, decided.workload.optimizer, LR, ("sgd", LR), EPS)
    formats = decided.decisions.formats
    if formats is not None:
        chosen = {t.name: t.format for t in formats.tensors if t.kind != "traffic"}
        known = sites(alone)
        apply_formats(alone, chosen, training=True, inplace=True, known=known)
        narrow_optimizer(reference.optimizers[0], alone, chosen, known)
    worst: dict[str, float] = {"outputs": 0.0, "vectors": 0.0, "allowed": 0.0, "loss": 0.0}
    seen: dict[str, Any] = {}
    made.lookup.register_forward_hook(lambda _, __, out: seen.update(found=out))
    for whole_batch in batches:
        pooled: list[Any] = []
        hooks = [alone.ebc.register_forward_hook(lambda _, __, out, pooled=pooled: _tracked(out, pooled))]
        sent: list[Tensor] = []  # by tower, where modules are
        for module in getattr(alone, "towers", ()):
            hooks.append(module.register_forward_hook(lambda _, __, out, sent=sent: sent.append(out)))
        expected = alone(*whole_batch[:2])
        for hook in hooks:
            hook.remove()
        mine = cut(whole_batch, place.rank, place.world_size)
        found = made(*mine[:2])
        from_peers = {sent_name(n): out for n, out in enumerate(sent) if n != made.lookup.tower}
        _judge(worst, decided, found.detach(), expected, pooled[0], mine[1], place, from_peers)
        loss = F.binary_cross_entropy_with_logits(expected, whole_batch[2])
        own = F.binary_cross_entropy_with_logits(found, mine[2])
        for one, value in ((reference, loss), (made, own)):
            one.zero_grad()
            value.backward()
            one.step()
    tables = whole_tables(made, shapes)
    copies = {t.name: p for t, p in zip(_copied(decided), made.lookup.copies.parameters(), strict=True)}
    tables |= {name: whole(p) for name, p in copies.items()}
    final = {name: bag.weight.detach() for name, bag in alone.ebc.embedding_bags.items()}
    worst["tables"] = max(_worst(tables[name], final[name]) for name in final)
    dense = {n: p for n, p in alone.named_parameters() if not n.startswith(("ebc.", "towers."))}
    trained = {n.removeprefix("module."): p for n, p in made.module.named_parameters()}
    worst["dense"] = max(_worst(whole(trained[n]), p.detach()) for n, p in dense.items())
    if made.moved:
        twins = alone.towers[made.lookup.tower].parameters()
        own_module = made.lookup.module.parameters()
        worst["modules"] = max(_worst(a.detach(), b.detach()) for a, b in zip(own_module, twins, strict=True))
    forward, backward = made.lookup.traffic
    return {
        "worst": worst,
        "moved": len(made.moved),
        "split": int(
            any(hasattr(p, "full_tensor") and p.to_local().numel() < p.numel() for p in trained.values())
        ),
        "raw": forward.raw + backward.raw,
        "sent": forward.sent + backward.sent,
        "files": len([r for r in made.lookup.lookup.rows if hasattr(r, "counters")]),
        "fetched": sum(r.counters.fetched for r in made.lookup.lookup.rows if hasattr(r, "counters")),
    }


def _copied(plan: Plan) -> list[Any]:
    return [t for t in plan.table_plans if t.sharding_type == "data_parallel"]


def _tracked(out: Any, pooled: list[Any]) -> None:
    out.values().retain_grad()
    pooled.append(out)


def _judge(
    worst: dict[str, float],
    plan: Plan,
    found: Tensor,
    expected: Tensor,
    exact: Any,
    ids: Any,
    place: Rank,
    from_peers: dict[str, Tensor],
) -> None:
    """Outputs against the unsharded ones; with codecs, to first order in the errors that their bounds allow."""
    gap = (gather_rows(found) - expected.detach()).abs()
    worst["outputs"] = max(worst["outputs"], float(gap.max()))
    (gradient,) = torch.autograd.grad(expected.sum(), exact.values(), retain_graph=True)
    each = len(found)
    mine = slice(place.rank * each, (place.rank + 1) * each)
    allowed = torch.zeros(each)
    groups = [g.features for g in plan.decisions.dedup.chosen] if plan.decisions.dedup is not None else []
    parts = split_batch(ids, groups, frozenset())
    transport, start = transport_of(plan), 0
    for key, width in zip(exact.keys(), exact.length_per_key(), strict=True):
        rule = transport(key, "forward", 0)
        number = next((n + 1 for n, g in enumerate(groups) if key in g), 0)
        rows = exact[key].detach()[mine]
        inverse = parts.inverse[number]
        if inverse is not None:  # the message holds each distinct row once
            first = torch.stack([(inverse == row).nonzero()[0, 0] for row in range(parts.rows[number])])
            rows = rows[first]
        if codec_of(rule.codec).bounded:
            error = rule.bound * float(rows.square().mean().sqrt())
            allowed += error * gradient[mine, start : start + width].abs().sum(1)
        start += width
    for name, out in from_peers.items():
        rule = transport(name, "forward", 0)
        if codec_of(rule.codec).bounded:
            (gradient,) = torch.autograd.grad(expected.sum(), out, retain_graph=True)
            error = rule.bound * float(out.detach()[mine].square().mean().sqrt())
            allowed += error * gradient[mine].flatten(1).abs().sum(1)
    if float(allowed.max()):
        own = (found - expected.detach()[mine]).abs()
        worst["allowed"] = max(worst["allowed"], float(allowed.max()))
        worst["vectors"] = max(worst["vectors"], float((own / (allowed + 1e-6)).max()))


def _worst(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return (
        float((found - expected).abs().max() / max(1.0, float(expected.abs().max())))
        if expected.numel()
        else 0.0
    )
