"""What each process of a decoder's run does: train in parallel, then compare with the whole model."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

from codegen.runtime.launch import Rank
from codegen.runtime.llm.engine import ParallelDecoder
from codegen.runtime.models import ModelSpec
from codegen.runtime.spans import profiled
from ir.plan import Plan

Batch = tuple[Tensor, Tensor]


def batches(seed: int, steps: int, sequences: int, sequence: int, vocab: int) -> Iterator[Batch]:
    """Random token ids and the ids that follow them, the same on every rank."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(vocab, (sequences, sequence + 1), generator=random)
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def train_and_compare(
    place: Rank,
    plan: dict[str, Any],
    model: dict[str, Any],
    steps: int,
    seed: int,
    lr: float,
    spans: bool = False,
) -> dict[str, Any]:
    """Train ``steps`` steps of SGD as the plan says; on the first rank of each pipeline stage also the whole model.

    Returns:
        JSON data: seconds of each step, losses, peak memory, and differences of losses, of the first step's
        gradients and of the weights after the last step (on the comparing ranks).
    """
    loaded = Plan.from_dict(plan)
    made, fed = loaded.decisions.parallelism, loaded.workload.llm
    assert made is not None
    assert fed is not None
    whole = ModelSpec(**model).build(seed)[0]
    decoder = ParallelDecoder(made, whole, fed.sequence)
    optimizer = torch.optim.SGD(list(decoder.parameters()), lr=lr)
    losses, seconds = [], []
    gradients: dict[str, Tensor] = {}
    for number, batch in enumerate(batches(seed, steps, fed.sequences, fed.sequence, made.model.vocab)):
        started = time.perf_counter()
        loss = decoder.step(*batch)
        seconds.append(time.perf_counter() - started)
        if number == 0:
            gradients = {name: _whole(p.grad) for name, p in decoder.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        if place.rank == 0:
            place.report([number, loss])
    weights = {name: _whole(p.detach()) for name, p in decoder.named_parameters()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found: dict[str, Any] = {"seconds": seconds, "losses": losses, "peak_rss": peak}
    if spans:  # one step more, which is not compared

        def again() -> None:
            decoder.step(*batch)
            optimizer.step()

        found["spans"] = profiled(place.rank, again)
    if all(decoder.meshes.index(name) == 0 for name in ("data", "context", "tensor")):
        data = batches(seed, steps, fed.sequences, fed.sequence, made.model.vocab)
        reference = _reference(whole, list(data), lr)
        found |= {
            "gradients": _difference(gradients, reference["gradients"]),
            "weights": _difference(weights, reference["weights"]),
            "reference_losses": reference["losses"],
            "reference_seconds": reference["seconds"],
            "tensors": sorted(weights),
            "changed": reference["changed"],
        }
    return found


def _reference(whole: nn.Module, data: list[Batch], lr: float) -> dict[str, Any]:
    """The whole model on whole batches in this process."""
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    optimizer = torch.optim.SGD(whole.parameters(), lr=lr)
    losses, seconds = [], []
    gradients: dict[str, Tensor] = {}
    for number, (tokens, targets) in enumerate(data):
        started = time.perf_counter()
        loss = functional.cross_entropy(whole(tokens).flatten(0, 1).float(), targets.flatten(0, 1))
        loss.backward()  # type: ignore[no-untyped-call]
        if number == 0:
            gradients = {name: p.grad.clone() for name, p in whole.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss.item()))
    after = {name: p.detach() for name, p in whole.named_parameters()}
    changed = [name for name, weight in after.items() if not torch.equal(weight, before[name])]
    return {
        "losses": losses,
        "seconds": seconds,
        "gradients": gradients,
        "weights": after,
        "changed": changed,
    }


def _difference(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, Any]:
    """Largest |a - b| and largest |a - b| / max |b| over the tensors, b of the whole model."""
    absolute, relative, where = 0.0, 0.0, ""
    for name, tensor in mine.items():
        other = theirs[name]
        gap = float((tensor - other).abs().max())
        scale = float(other.abs().max())
        ratio = gap / scale if scale else (0.0 if gap == 0 else float("inf"))
        # not <=: a NaN is the worst of all
        if not ratio <= relative or not where:
            relative, where = ratio, name
        absolute = max(absolute, gap)
    return {"absolute": absolute, "relative": relative, "where": where}


def _whole(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError("a parameter has no gradient after a step")
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.clone()
