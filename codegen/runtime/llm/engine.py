"""One rank's share of a training step: micro-batches, pipeline schedule, gradients summed over replicas.

What is planned and what runs:

============ ====================================================================================
tensor       DTensor, sequence parallel, loss split over the vocabulary
context      ring attention (pass-KV), 2N chunks
pipeline     ``torch.distributed.pipelining``; GPipe, 1F1B, interleaved 1F1B, interleaved zero bubble
data         FSDP2 over context x data: ZeRO-3 frees weights after the forward pass, ZeRO-2 keeps them,
             ZeRO-1 also sums gradients of a step's micro-batches before it scatters them; with several copies
             (hybrid sharding) over the shards of one, gradients are then summed over the copies
recompute    whole layers, or all of a layer but its matrix products ("elementwise")
============ ====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional

from codegen.runtime.llm.context import held_tokens, split_context
from codegen.runtime.llm.limits import check_runs
from codegen.runtime.llm.mesh import Meshes, make_meshes
from codegen.runtime.llm.recompute import recompute_layers
from codegen.runtime.llm.stages import Stage, make_stages
from codegen.runtime.llm.tensor import split_tensors
from ir.errors import InputError
from ir.parallelism import Layout, Parallelism


class ParallelDecoder:
    """A decoder on this rank, as the plan lays it out.

    Args:
        made: the plan's section.
        whole: the model with real weights, the same on every rank; it is not changed.
        sequence: tokens of a sequence.

    Raises:
        InputError: a model or a process group that the plan is not for, or a layout that is not run.
    """

    def __init__(self, made: Parallelism, whole: nn.Module, sequence: int) -> None:
        layout = made.layout
        check_runs(made)
        self.layout, self.sequence = layout, sequence
        self.meshes: Meshes = make_meshes(layout)
        self.stages: list[tuple[int, Stage]] = make_stages(whole, made.stages, self.meshes.index("pipeline"))
        for _, stage in self.stages:
            if layout.tensor > 1:
                split_tensors(stage, self.meshes.root["tensor"])
            if layout.context > 1:
                split_context(stage, sequence, self.meshes.group("context"))
            recompute_layers(stage, layout.recompute)
            if self.meshes.replicas is not None:
                _shard(stage, layout, self.meshes)
        self._schedule = _schedule(self) if layout.pipeline > 1 else None

    @property
    def is_last(self) -> bool:
        """This rank holds the output projection and sees the loss."""
        return self.meshes.index("pipeline") == self.layout.pipeline - 1

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, for an optimizer."""
        for _, stage in self.stages:
            yield from stage.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The same by their names in the whole model."""
        for _, stage in self.stages:
            yield from stage.named_parameters()

    def local_batch(self, tokens: Tensor) -> Tensor:
        """This rank's part of a global batch (sequences, tokens): its replica's sequences, its chunks of each."""
        per_replica = self.layout.micro_batch * self.layout.micro_batches
        if tokens.shape[0] != per_replica * self.layout.data or tokens.shape[1] != self.sequence:
            raise InputError(
                f"a step of this plan is {per_replica * self.layout.data} sequences of {self.sequence} tokens, not "
                f"{tuple(tokens.shape)}"
            )
        start = self.meshes.index("data") * per_replica
        own = tokens[start : start + per_replica]
        if self.layout.context > 1:
            held = held_tokens(self.sequence, self.layout.context, self.meshes.index("context"))
            own = own[:, held]
        return own.contiguous()

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """Forward and backward over a global batch; gradients are left in the parameters.

        Returns:
            The mean loss over the global batch, on every rank.
        """
        mine, wanted = self.local_batch(tokens), self.local_batch(targets)
        with loss_parallel() if self.layout.tensor > 1 else nullcontext():
            loss = self._piped(mine, wanted) if self._schedule is not None else self._plain(mine, wanted)
        total = torch.tensor([loss / self.layout.replicas if self._counts else 0.0], dtype=torch.float64)
        dist.all_reduce(total)
        return float(total.item())

    @property
    def _counts(self) -> bool:
        """One rank of each replica reports the loss."""
        return self.is_last and self.meshes.index("tensor") == 0

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A micro-batch's share of its replica's mean loss; flattened as the targets are."""
        each = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(0, 1))
        return each / self.layout.micro_batches

    def _plain(self, tokens: Tensor, targets: Tensor) -> float:
        _, stage = self.stages[0]
        total, size = 0.0, self.layout.micro_batch
        for number in range(self.layout.micro_batches):
            last = number == self.layout.micro_batches - 1
            if self.layout.zero == 1 and self.meshes.replicas is not None:
                sharded: Any = stage
                sharded.set_requires_gradient_sync(last)
            part = slice(number * size, (number + 1) * size)
            loss = self._loss(stage(tokens[part]), targets[part])
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(_whole(loss.detach()).item())
        return total

    def _piped(self, tokens: Tensor, targets: Tensor) -> float:
        losses: list[Tensor] = []
        schedule: Any = self._schedule
        first = self.meshes.index("pipeline") == 0
        inputs = (tokens,) if first else ()
        if self.is_last:
            schedule.step(*inputs, target=targets, losses=losses, return_outputs=False)
        else:
            schedule.step(*inputs, return_outputs=False)
        return sum(float(_whole(loss.detach()).item()) for loss in losses)


def _shard(stage: Stage, layout: Layout, meshes: Meshes) -> None:
    """FSDP2: each layer, then the rest of the stage."""
    free = layout.zero == 3
    for layer in stage.layers.values():
        fully_shard(layer, mesh=meshes.replicas, reshard_after_forward=free)
    fully_shard(stage, mesh=meshes.replicas, reshard_after_forward=free)


def _schedule(decoder: ParallelDecoder) -> Any:
    from torch.distributed import pipelining
    from torch.distributed.pipelining import schedules

    layout, meshes = decoder.layout, decoder.meshes
    group = meshes.group("pipeline")
    count = layout.pipeline * layout.virtual_stages
    built = [
        pipelining.PipelineStage(stage, number, count, torch.device("cpu"), group=group)
        for number, stage in decoder.stages
    ]
    kinds: dict[tuple[str, bool], Callable[..., Any]] = {
        ("gpipe", False): schedules.ScheduleGPipe,
        ("1f1b", False): schedules.Schedule1F1B,
        ("interleaved_1f1b", True): schedules.ScheduleInterleaved1F1B,
        ("zero_bubble", True): schedules.ScheduleInterleavedZeroBubble,
        ("zero_bubble", False): schedules.ScheduleInterleavedZeroBubble,
    }
    kind = kinds[layout.schedule, layout.virtual_stages > 1]
    several = layout.virtual_stages > 1 or layout.schedule == "zero_bubble"
    made = kind(
        built if several else built[0],
        n_microbatches=layout.micro_batches,
        loss_fn=decoder._loss,
        scale_grads=False,  # the loss is already divided by the micro-batches
    )
    return made


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
