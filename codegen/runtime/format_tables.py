"""Embedding tables that are read in given number formats, for training and for inference.

Blocks and rows run along a table's columns, so quantising commutes with picking rows: only the rows that a
batch touches are quantised or decoded.

* :class:`FormatEmbeddingBag`, :class:`FormatEmbedding` (training): float32 master rows, read through the
  format; the gradient passes straight through.
* :class:`IntegerEmbeddingBag` (inference): int8, int4, int2 rows in FBGEMM's
  ``IntNBitTableBatchedEmbeddingBagsCodegen``.
* :class:`PackedEmbeddingBag` and :class:`PackedEmbedding` (inference): the packed bytes of any format,
  decoded row by row.
* :func:`exchange`: what a table returns, and its gradient, as they cross a wire.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from codegen.runtime.format_clip import clip_rows
from codegen.runtime.mx_fake import fake_quantize
from codegen.runtime.mx_packing import Packed, pack
from codegen.runtime.mx_tensor import quantize
from ir.errors import InputError
from ir.formats import Format, parse_format

INTEGER_BITS = {"int8": 8, "int4": 4, "int2": 2}


def check_table(source: nn.Embedding | nn.EmbeddingBag, format: Format) -> None:
    """Raise InputError for a table whose lookups change its weights, or a format that runs along rows."""
    if source.max_norm is not None or source.scale_grad_by_freq:
        raise InputError("a table with max_norm or scale_grad_by_freq cannot be read through a number format")
    if format.axis not in (-1, 1):
        raise InputError(f"a table is quantised along its columns, not axis {format.axis}; use axis=-1")


class FormatEmbeddingBag(nn.EmbeddingBag):
    """A bag whose rows are rounded to a format as they are read; shares the weight of its source."""

    format: str

    @classmethod
    def of(cls, source: nn.EmbeddingBag, format: str) -> FormatEmbeddingBag:
        """The bag with the weight of ``source``, under the same name."""
        check_table(source, parse_format(format))
        made = cls(
            source.num_embeddings,
            source.embedding_dim,
            mode=source.mode,
            sparse=source.sparse,
            include_last_offset=source.include_last_offset,
            padding_idx=source.padding_idx,
            device="meta",
        )
        made.weight, made.format = source.weight, format
        made.train(source.training)
        return made

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Pooled rows (bags, D)."""
        unique, places = torch.unique(input, return_inverse=True)
        rows = nn.functional.embedding(unique, self.weight, sparse=self.sparse)
        rows = fake_quantize(rows, self.format, -1)
        return _pool(self, rows, unique, places, offsets, per_sample_weights)


def _pool(
    bag: nn.EmbeddingBag | _PackedTable,
    rows: Tensor,
    unique: Tensor,
    places: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """Pool ``rows[places]``; ``unique`` are the ids that the rows belong to."""
    padding = None
    if bag.padding_idx is not None:
        found = (unique == bag.padding_idx).nonzero()
        padding = int(found[0]) if len(found) else None
    return nn.functional.embedding_bag(
        places,
        rows,
        offsets,
        mode=bag.mode,
        per_sample_weights=weights,
        include_last_offset=bag.include_last_offset,
        padding_idx=padding,
    )


class FormatEmbedding(nn.Embedding):
    """A table whose rows are rounded to a format as they are read; shares the weight of its source."""

    format: str

    @classmethod
    def of(cls, source: nn.Embedding, format: str) -> FormatEmbedding:
        """The table with the weight of ``source``, under the same name."""
        check_table(source, parse_format(format))
        made = cls(
            source.num_embeddings,
            source.embedding_dim,
            padding_idx=source.padding_idx,
            sparse=source.sparse,
            device="meta",
        )
        made.weight, made.format = source.weight, format
        made.train(source.training)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """Rows (..., D)."""
        return fake_quantize(super().forward(input), self.format, -1)


class _PackedTable(nn.Module):
    """The packed bytes of a table, and the rows that ids ask for."""

    data: Tensor
    scales: Tensor | None
    shifts: Tensor | None
    tensor_scale: Tensor | None

    def __init__(self, source: nn.Embedding | nn.EmbeddingBag, format: str) -> None:
        super().__init__()
        self.format = parse_format(format)
        check_table(source, self.format)
        weight = source.weight.detach()
        packed = pack(quantize(weight, self.format, -1))
        self.embedding_dim, self.dtype = source.embedding_dim, weight.dtype
        self.num_embeddings = source.num_embeddings
        for name in ("data", "scales", "shifts", "tensor_scale"):
            self.register_buffer(name, getattr(packed, name))
        self.padding_idx = source.padding_idx
        self.mode = getattr(source, "mode", "sum")
        self.include_last_offset = getattr(source, "include_last_offset", False)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored table."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def rows(self, ids: Tensor) -> Tensor:
        """Decoded rows (len(ids), D) of a flat tensor of ids."""
        scales = self.scales
        if scales is not None and self.format.granularity != "tensor":
            scales = scales[ids]
        shape = torch.Size((len(ids), self.embedding_dim))
        shifts = None if self.shifts is None else self.shifts[ids]
        return Packed(
            self.format, shape, 1, self.dtype, self.data[ids], scales, shifts, self.tensor_scale
        ).dequantize()

    def extra_repr(self) -> str:
        """Sizes and format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format.id}"


class PackedEmbeddingBag(_PackedTable):
    """A bag over packed rows."""

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Pooled rows (bags, D)."""
        unique, places = torch.unique(input, return_inverse=True)
        return _pool(self, self.rows(unique), unique, places, offsets, per_sample_weights)


class PackedEmbedding(_PackedTable):
    """A table over packed rows."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows (..., D)."""
        return self.rows(input.reshape(-1)).reshape(*input.shape, -1)


class IntegerEmbeddingBag(nn.Module):
    """A bag over int8, int4 or int2 rows, read by FBGEMM's inference kernel on the weight's device.

    Codes, fp16 scale and bias are those of :func:`codegen.runtime.mx.quantize`, bit-equal to FBGEMM's.
    """

    def __init__(self, source: nn.EmbeddingBag, format: str) -> None:
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
            IntNBitTableBatchedEmbeddingBagsCodegen,
        )

        super().__init__()
        spec = parse_format(format)
        check_table(source, spec)
        weight = source.weight.detach()
        unaligned = pack(quantize(weight, spec.base, -1)).data
        header = 4  # bytes: fp16 scale and bias end FBGEMM's row; its kernel wants them apart
        where = EmbeddingLocation.HOST if weight.device.type == "cpu" else EmbeddingLocation.DEVICE
        self.format, self.include_last_offset = spec, source.include_last_offset
        self.rows, self.dtype = source.num_embeddings, weight.dtype
        kind = {8: SparseType.INT8, 4: SparseType.INT4, 2: SparseType.INT2}[INTEGER_BITS[spec.base]]
        self.kernel = IntNBitTableBatchedEmbeddingBagsCodegen(
            [("table", source.num_embeddings, source.embedding_dim, kind, where)],
            pooling_mode=PoolingMode.MEAN if source.mode == "mean" else PoolingMode.SUM,
            device=weight.device,
            output_dtype=SparseType.FP32,
            weight_lists=[
                (unaligned[:, :-header].contiguous(), unaligned[:, -header:].contiguous()),
            ],
            row_alignment=None if weight.device.type == "cuda" else spec.row_alignment,
        )

    @staticmethod
    def takes(source: nn.Module, format: Format) -> bool:
        """Whether FBGEMM is there and its kernel reads this table in this format."""
        return (
            isinstance(source, nn.EmbeddingBag)
            and format.base in INTEGER_BITS
            and source.mode in ("sum", "mean")
            and source.padding_idx is None
            and source.embedding_dim % 4 == 0  # FBGEMM reads rows in whole 4 columns
            and importlib.util.find_spec("fbgemm_gpu") is not None
        )

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Pooled rows (bags, D)."""
        if offsets is None:  # (bags, ids of a bag)
            ends = torch.arange(0, input.numel() + 1, input.shape[1], device=input.device)
        elif self.include_last_offset:
            ends = offsets
        else:
            ends = torch.cat([offsets, offsets.new_tensor([input.numel()])])
        weights = None if per_sample_weights is None else per_sample_weights.reshape(-1).float()
        pooled: Tensor = self.kernel(input.reshape(-1).int(), ends.int(), weights)
        return pooled.to(self.dtype)

    def extra_repr(self) -> str:
        """Rows and format."""
        return f"{self.rows} rows, {self.format.id}"


class _Wire(torch.autograd.Function):
    """Values in one format on the way forward, gradients in another on the way back."""

    @staticmethod
    def forward(context: Any, x: Tensor, forward: str, backward: str) -> Tensor:
        context.backward_format = backward
        return fake_quantize(x, forward, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return fake_quantize(gradient, context.backward_format, -1), None, None


def exchange(table: nn.Module, forward: str, backward: str) -> RemovableHandle:
    """Round what a table returns, and the gradient it gets, as if they were sent in two formats, row by row.

    Returns the handle that ends it.
    """

    def received(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        sent: Tensor = _Wire.apply(output, forward, backward)  # type: ignore[no-untyped-call]
        return sent

    return table.register_forward_hook(received)


def narrow_table(source: Any, format: str, *, training: bool, clip: bool = False) -> nn.Module:
    """The module that takes the place of an ``nn.EmbeddingBag`` or ``nn.Embedding``.

    Args:
        source: the table; training modules share its weight, the others keep a narrow copy.
        format: an id.
        training: read float32 master rows through the format, with a gradient.
        clip: for inference with integer rows, clip each row to the range of least squared error.

    Raises:
        InputError: another kind of module, or a table that cannot be read through a format.
    """
    spec = parse_format(format)
    if not isinstance(source, (nn.EmbeddingBag, nn.Embedding)):
        raise InputError(f"a {type(source).__name__} is not a table; use nn.EmbeddingBag or nn.Embedding")
    bag = isinstance(source, nn.EmbeddingBag)
    if training:
        return FormatEmbeddingBag.of(source, format) if bag else FormatEmbedding.of(source, format)  # type: ignore[arg-type]
    if clip and spec.scale in ("fp16_bias", "fp32_bias"):
        source = copy.copy(source)
        source._parameters = {"weight": nn.Parameter(clip_rows(source.weight, spec), requires_grad=False)}
    if isinstance(source, nn.EmbeddingBag) and IntegerEmbeddingBag.takes(source, spec):
        return IntegerEmbeddingBag(source, format)
    return PackedEmbeddingBag(source, format) if bag else PackedEmbedding(source, format)
