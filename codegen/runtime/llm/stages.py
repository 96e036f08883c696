"""The part of a decoder that one pipeline rank holds, chunk by chunk, under the model's own parameter names."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ir.errors import InputError

_PARTS = ("embedding", "layers", "norm", "output", "cos", "sin")


class Stage(nn.Module):
    """Consecutive layers, with the embedding before the first and the projection after the last.

    Token ids (batch, tokens) or hidden states (batch, tokens, hidden) to hidden states or logits. Names of
    parameters are those of the whole model: layers keep their numbers.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, whole: nn.Module, layers: Sequence[int], first: bool, last: bool) -> None:
        super().__init__()
        source: Any = whole
        self.embedding = copy.deepcopy(source.embedding) if first else None
        self.layers = nn.ModuleDict({str(i): copy.deepcopy(source.layers[i]) for i in layers})
        self.norm = copy.deepcopy(source.norm) if last else None
        self.output = copy.deepcopy(source.output) if last else None
        self.register_buffer("cos", source.cos.clone(), persistent=False)
        self.register_buffer("sin", source.sin.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """One micro-batch through the chunk."""
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers.values():
            x = layer(x, self.cos, self.sin)
        if self.norm is not None and self.output is not None:
            x = self.output(self.norm(x))
        return x


def make_stages(whole: nn.Module, stages: Sequence[Sequence[int]], rank: int) -> list[tuple[int, Stage]]:
    """The chunks of pipeline rank ``rank`` with their stage numbers; ``stages`` is [rank][chunk] layers.

    Raises:
        InputError: the model is not laid out as the zoo's Llama, or has another number of layers.
    """
    lacking = [name for name in _PARTS if not hasattr(whole, name)]
    if lacking:
        raise InputError(
            f"{type(whole).__name__} has no {lacking[0]!r}; decoders are run that are built as planner.zoo.llama.Llama is"
        )
    ranks, chunks = len(stages), len(stages[0])
    layers: Any = whole.layers
    if sum(sum(own) for own in stages) != len(layers):
        raise InputError(f"the plan places {sum(map(sum, stages))} layers, the model has {len(layers)}")
    found, start = [], 0
    for chunk in range(chunks):
        for owner in range(ranks):
            count, number = stages[owner][chunk], chunk * ranks + owner
            if owner == rank:
                part = Stage(whole, range(start, start + count), number == 0, number == ranks * chunks - 1)
                found.append((number, part))
            start += count
    return found
