"""What TorchRec 1.8 (FBGEMM 1.8) can run, as facts about one table; every rule was found by running it.

The rules hold on CPU and GPU alike unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ir.constraints import ShardingType
from ir.sharding import COLUMN_MULTIPLE, COLUMN_SPLIT, ROW_SPLIT, ShardingOption

Kernel = Literal["dense", "fused"]

# Sharding types of EmbeddingCollection (sequences of rows, no pooling). Its factory raises for the
# host-wise types, and data-parallel tables are looked up with every rank's ids.
SEQUENCE_TYPES = frozenset({"table_wise", "column_wise", "row_wise"})
CPU_DTYPES = frozenset({"fp32", "fp16"})  # the CPU training kernels have no BF16 and no INT8 tables
CPU_FUSED_OPTIMIZERS = frozenset({"sgd", "adagrad", "rowwise_adagrad"})  # Adam is a CUDA kernel


def kernel_for(option: ShardingOption) -> Kernel:
    """The compute kernel of an option: data-parallel tables are ordinary parameters under DDP."""
    return "dense" if option.sharding_type == "data_parallel" else "fused"


def empty_row_shards(rows: int, ranks: int) -> int:
    """How many of the ranks that share ``rows`` rows receive none."""
    each = -(-rows // ranks)  # as ir.sharding.row_blocks splits them
    return ranks - -(-rows // each)


def torchrec_supported(
    rows: int,
    dim: int,
    option: ShardingOption,
    world_size: int,
    host_size: int,
    *,
    pooling: str = "sum",
    kernel: Kernel | None = None,
) -> str | None:
    """Why TorchRec cannot run ``option`` for a table, or None if it can.

    Args:
        rows: rows of the table.
        dim: columns of the table.
        option: how it would be sharded.
        world_size: ranks.
        host_size: ranks per host.
        pooling: "sum", "mean", "max" or "none" (a table of an ``EmbeddingCollection``).
        kernel: default: :func:`kernel_for` the option.

    What is behind the rules that are not obvious:

    - A fused kernel whose tables on a rank hold no row at all fails there ("weights[0] must be
      a GPU or MTIA tensor") while the other ranks wait. Whether a second table shares the kernel depends on how
      TorchRec groups tables, so no empty shard is allowed at all. Dense kernels run with empty shards.
    - Means over row shards are sums divided by the bag lengths afterwards, and TorchRec takes the
      lengths in the order of the input's features but the sums in the order of its output: wrong
      results without an error whenever the two orders differ.
    - What ranks pooled over their rows is summed, so a maximum is split by columns only (``nn.EmbeddingBag``
      has it; TorchRec's collections do not).
    - See :func:`stackable` for several column blocks on one rank.
    """
    kind = option.sharding_type
    kernel = kernel or kernel_for(option)
    if sum(option.widths) != dim:
        return f"its column widths add up to {sum(option.widths)}, not {dim}"
    odd = [width for width in option.widths if width % COLUMN_MULTIPLE]
    if odd and kind != "data_parallel":
        return f"a width of {odd[0]} columns is not a multiple of {COLUMN_MULTIPLE}"
    if len(option.widths) > 1 and kind not in COLUMN_SPLIT:
        return f"{kind} does not split columns"
    if pooling == "none" and kind not in SEQUENCE_TYPES:
        return f"an EmbeddingCollection cannot be {kind}"
    if pooling == "none" and kernel == "dense":
        return "the dense kernel of an EmbeddingCollection does not run"
    if pooling == "max" and kind in ROW_SPLIT:
        return "what row shards pooled is summed, and its bags take the maximum"
    if pooling == "mean" and kind in ROW_SPLIT:
        return "TorchRec divides means over row shards by the lengths of the wrong features"
    if kind in ROW_SPLIT and kernel == "fused":
        ranks = world_size if kind == "row_wise" else host_size
        empty = empty_row_shards(rows, ranks)
        if empty:
            return (
                f"{rows} rows over {ranks} ranks leave {empty} without a row, which the fused kernel refuses"
            )
    return None


def stackable(widths: Sequence[int], kernel: Kernel) -> bool:
    """Whether TorchRec can hold column blocks of these widths of one table on one rank, in this order.

    It takes their weights for a stack of blocks as wide as the first one. A dense kernel then gets
    wrong updates without an error if they differ; a fused one fails while wrapping ("shape is invalid")
    if the first is wider than the mean, for the stack then reaches beyond the weights.
    """
    if kernel == "dense":
        return len(set(widths)) <= 1
    return not widths or widths[0] * len(widths) <= sum(widths)


def deduplication_excludes(device: str) -> frozenset[ShardingType]:
    """Sharding types that take no batch with a stride per key.

    The dense kernel of data-parallel tables refuses it. Row splits gather gradients whose size differs
    from rank to rank, which NCCL does and gloo refuses.
    """
    never: frozenset[ShardingType] = frozenset({"data_parallel"})
    return never | ROW_SPLIT if device == "cpu" else never
