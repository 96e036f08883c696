"""Tensors of a checkpoint of which each rank holds blocks, in memory or elsewhere, for ``torch.distributed.checkpoint``.

torch knows whole tensors and its own sharded ones. Shards of this project's runtimes are plain tensors, some of them are
not in memory at all (rows in tiers), and several ranks may hold the same block; :class:`Blocks` describes them, and the
two planners read and write through it, one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import ReadItem, TensorWriteData, WriteItem, WriteItemType


@dataclass(frozen=True, slots=True)
class Block:
    """Elements that this rank holds.

    Attributes:
        offset, size: where they lie in the whole tensor.
        read: gives them.
        write: takes values for a part that starts at an offset inside the block; None: what ``read`` gives is the memory
            of the block itself.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]
    read: Callable[[], Tensor]
    write: Callable[[tuple[int, ...], Tensor], None] | None = None

    @classmethod
    def of(cls, tensor: Tensor, offset: Sequence[int]) -> Block:
        """A tensor in memory."""
        kept = tensor.detach()
        return cls(tuple(offset), tuple(kept.shape), lambda: kept)

    def put(self, values: Tensor) -> None:
        """Overwrite all elements."""
        if self.write is None:
            self.read().copy_(values)
        else:
            self.write((0,) * len(self.size), values)


class Blocks:
    """A tensor of ``shape`` of which this rank holds some blocks.

    The methods with double underscores are those by which ``torch.distributed.checkpoint`` asks objects that are no
    tensors for their parts.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        self.blocks: dict[tuple[int, ...], Block] = {}

    def add(self, block: Block) -> None:
        """Note a block; one without elements is nothing."""
        if all(block.size):
            self.blocks[block.offset] = block

    def size(self) -> torch.Size:
        """Shape of the whole tensor."""
        return self.shape

    def at(self, index: MetadataIndex) -> Block:
        """The block that torch means."""
        return self.blocks[tuple(index.offset or ())]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(block.offset), torch.Size(block.size))
            for block in self.blocks.values()
        ]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]


class BlockSaver(DefaultSavePlanner):
    """Reads a block when it is written, so that no more than one is in memory."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The value behind one item of the plan."""
        found = self.state_dict[index.fqn]
        return found.at(index).read() if isinstance(found, Blocks) else super().lookup_object(index)


class BlockLoader(DefaultLoadPlanner):
    """Hands what was read to blocks that are not in memory; a state is one flat mapping."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """As torch's, which first makes None of values that are no tensors."""
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Where the values of one item go."""
        found = self.state_dict[read_item.dest_index.fqn]
        if not isinstance(found, Blocks):
            target: Tensor = super().resolve_tensor(read_item)
            return target
        block = found.at(read_item.dest_index)
        if block.write is not None:
            return torch.empty(tuple(read_item.lengths), dtype=found.dtype)
        return block.read()[
            tuple(slice(a, a + n) for a, n in zip(read_item.dest_offsets, read_item.lengths, strict=True))
        ]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The values of one item have arrived."""
        found = self.state_dict[read_item.dest_index.fqn]
        if isinstance(found, Blocks):
            write = found.at(read_item.dest_index).write
            if write is not None:
                write(tuple(read_item.dest_offsets), tensor)


def local_blocks(value: Any) -> list[Block]:
    """What this rank holds of a value of a state: :class:`Blocks`, a ``ShardedTensor`` or a whole tensor."""
    if isinstance(value, Blocks):
        return list(value.blocks.values())
    if hasattr(value, "local_shards"):
        return [Block.of(s.tensor, s.metadata.shard_offsets) for s in value.local_shards()]
    return [Block.of(value, (0,) * value.ndim)]
