"""The two exchanges of vectors of a batch in parts, each one collective a direction, with a rule for each matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from codegen.runtime.compressed_all_to_all import Exchange, Rule, Traffic
from ir.compression import Direction

Rules = Callable[[str, Direction], Rule]
"""``rules(feature, direction)``: how the vectors of a feature travel now."""


@dataclass(frozen=True, slots=True)
class Carried:
    """One matrix that travels: its name for the rules, its part and its columns."""

    name: str
    part: int
    cols: int


def carry(
    matrices: Sequence[Tensor],
    sent: Sequence[Carried],
    received: Sequence[Sequence[Carried]],
    pieces: Sequence[Sequence[int]],
    mine: Sequence[int],
    rules: tuple[Rules, Sequence[bool]],
    group: Any,
    scale: float,
    traffic: tuple[Traffic, Traffic],
) -> list[list[Tensor]]:
    """Send each member its rows of every matrix; what each member sends this rank, ``[member][n]``.

    Args:
        matrices: of this rank, each (rows of all members' parts, columns), members one below the other.
        sent: what they are.
        received: what each member sends.
        pieces: ``pieces[member][part]`` rows that each member wants of a part.
        mine: rows that this rank wants of each part.
        rules: of each matrix, and whether all are plain (forward, backward), the same on all ranks.
        group: process group.
        scale: factor on gradients on their way back.
        traffic: bytes sent are added (forward, backward).
    """
    if dist.get_world_size(group) == 1 and scale == 1.0:
        return [list(matrices)]
    rule, plain = rules
    per_member = [
        torch.split(matrix, [rows[one.part] for rows in pieces])
        for matrix, one in zip(matrices, sent, strict=True)
    ]
    exchange = Exchange(
        send=[[(rows[one.part], one.cols) for one in sent] for rows in pieces],
        receive=[[(mine[one.part], one.cols) for one in row] for row in received],
        forward=[[rule(one.name, "forward") for one in sent] for _ in pieces],
        backward=[[rule(one.name, "backward") for one in row] for row in received],
        plain=(plain[0], plain[1]),
        group=group,
        scale=scale,
        traffic=traffic,
    )
    token = exchange.start([[split[member] for split in per_member] for member in range(len(pieces))])
    return exchange.finish(token)


def by_feature(
    received: Sequence[Sequence[Tensor]], columns: Sequence[Sequence[tuple[str, int]]]
) -> dict[str, Tensor]:
    """Whole vectors of blocks: partial sums of row blocks added, column blocks side by side.

    Args:
        received: ``[member][n]`` blocks.
        columns: ``[member][n]`` feature and first column of each.
    """
    blocks: dict[str, dict[int, Tensor]] = {}
    for matrices, named in zip(received, columns, strict=True):
        for matrix, (feature, col) in zip(matrices, named, strict=True):
            of_feature = blocks.setdefault(feature, {})
            of_feature[col] = of_feature[col] + matrix if col in of_feature else matrix
    return {
        feature: torch.cat([found[col] for col in sorted(found)], dim=1)
        if len(found) > 1
        else next(iter(found.values()))
        for feature, found in blocks.items()
    }
