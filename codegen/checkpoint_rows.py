"""Row-wise Adagrad's state between plans that split a table's columns differently.

The state of a row of a column block is the sum over steps of the mean square of the block's gradients (Gupta et al. 2014;
FBGEMM's ``EXACT_ROWWISE_ADAGRAD``). A block inside a saved one inherits its state: each weight goes on at the rate it had.
A block over several saved ones has no state that was ever held. Their mean, weighted by columns, is the sum that one state
over these columns would hold after the same gradients; but the weights of its columns then change their rates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from codegen.checkpoint_blocks import Block, Blocks, local_blocks
from ir.errors import InputError
from ir.plan import TablePlan

_KEY = re.compile(r"(optimizer/.+\.weight/sum)(?:/(\d+):(\d+))?")
Columns = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Source:
    """A saved state, and how many columns of a wanted block it is of."""

    key: str
    columns: int


def sources(
    wanted: Iterable[str], saved: Iterable[str], tables: Mapping[str, TablePlan], mean: bool
) -> dict[str, list[Source]]:
    """From which saved states those come that were not saved under their own names.

    Args:
        wanted, saved: names of the plan's and the checkpoint's tensors.
        tables: of the paths of their weights.
        mean: several states may become one.

    Raises:
        InputError: several states would become one, and ``mean`` is not set.
    """
    by_path: dict[str, list[tuple[Columns, str]]] = {}
    names = set(saved)
    for key in names:
        path, columns = _parts(key, tables)
        if columns is not None:
            by_path.setdefault(path, []).append((columns, key))
    found: dict[str, list[Source]] = {}
    for key in sorted(wanted):
        path, columns = _parts(key, tables)
        if key in names or columns is None:
            continue
        parts = sorted(by_path.get(path, []))
        common = [
            Source(name, min(columns[1], stop) - max(columns[0], start))
            for (start, stop), name in parts
            if min(columns[1], stop) > max(columns[0], start)
        ]
        if len(common) > 1 and not mean:
            blocks = ", ".join(f"{start}-{stop - 1}" for (start, stop), _ in parts)
            raise InputError(
                f"table {tables[path].name!r} was saved with row-wise Adagrad's states of columns {blocks} apart, and "
                f"the plan has one state for columns {columns[0]}-{columns[1] - 1}, which is none of them; split the "
                "columns as before or finer, or take the states' mean with momentum='mean'"
            )
        if common:
            found[key] = common
    return found


def _parts(key: str, tables: Mapping[str, TablePlan]) -> tuple[str, Columns | None]:
    """Path of the weight, and the columns of which the name says that it is the state; None for other tensors."""
    match = _KEY.fullmatch(key)
    path = match[1].split("/")[1] if match else ""
    if match is None or path not in tables:
        return "", None
    return path, (0, tables[path].dim) if match[2] is None else (int(match[2]), int(match[3]))


@dataclass(slots=True)
class Mixed:
    """States that are read into buffers first, because they are parts of others, or means.

    Attributes:
        buffers: what to read, by saved name.
    """

    buffers: dict[str, Blocks] = field(default_factory=dict)
    _targets: list[tuple[Block, list[Source]]] = field(default_factory=list)

    @classmethod
    def take(cls, state: dict[str, Any], found: Mapping[str, list[Source]], rows: Mapping[str, int]) -> Mixed:
        """Move the states in question out of ``state``; ``rows``: of the whole tensor of each saved name."""
        made = cls()
        for key in [key for key in state if key in found]:
            for block in local_blocks(state.pop(key)):
                made._targets.append((block, found[key]))
                for source in found[key]:
                    of_source = made.buffers.setdefault(source.key, Blocks((rows[source.key],)))
                    kept = of_source.blocks.get(block.offset)
                    if kept is None or kept.size[0] < block.size[0]:
                        of_source.add(Block.of(torch.zeros(block.size), block.offset))
        return made

    def settle(self) -> None:
        """Write what has been read."""
        for block, parts in self._targets:
            block.put(self._mean(block, parts))

    def _mean(self, block: Block, parts: list[Source]) -> Tensor:
        values = [self.buffers[part.key].blocks[block.offset].read()[: block.size[0]] for part in parts]
        if len(values) == 1:
            return values[0]
        total = sum(value * part.columns for value, part in zip(values, parts, strict=True))
        assert isinstance(total, Tensor)
        return total / sum(part.columns for part in parts)
