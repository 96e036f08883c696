"""Where a number format has kernels: by operation and architecture, with the library that provides them.

A format without a row here can still be planned as *emulated*: values are quantised by this project and
computed with in float32 or bfloat16, which costs time and saves none. Listed are kernels of public
libraries that read the stored format itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ir.formats import Format, parse_format

Operation = Literal["gemm", "embedding"]
Architecture = Literal["cpu", "sm80", "sm89", "sm90", "sm100", "cdna3", "cdna4"]


@dataclass(frozen=True, slots=True)
class Kernel:
    """One operation on one architecture that reads a format as it is stored."""

    operation: Operation
    architecture: Architecture
    library: str
    source: str


_PTX = "PTX ISA 8.6, tcgen05.mma"
_CDNA4 = "LLVM AMDGPU, v_mfma_scale_f32_*_f8f6f4"
_SCALED_MM = "PyTorch: compute capability 8.9 or 9.0 and later, or ROCm MI300 and later"
_TBE = "FBGEMM IntNBitTableBatchedEmbeddingBagsCodegen"
_BYTE_ROWS = "PyTorch quantized::embedding_bag_byte_rowwise_offsets"
_DENSE = "PyTorch documentation, dtypes of torch.matmul"

_ALL: tuple[Architecture, ...] = ("cpu", "sm80", "sm89", "sm90", "sm100", "cdna3", "cdna4")
_GPUS: tuple[Architecture, ...] = _ALL[1:]


def _rows(
    operation: Operation, architectures: tuple[Architecture, ...], library: str, source: str
) -> tuple[Kernel, ...]:
    return tuple(Kernel(operation, architecture, library, source) for architecture in architectures)


_PLAIN = _rows("gemm", _ALL, "torch", _DENSE) + _rows("embedding", _ALL, "torch", _DENSE)
_INTEGER_ROWS = _rows("embedding", ("cpu", *_GPUS), "fbgemm", _TBE)
_SM100 = _rows("gemm", ("sm100",), "cutlass", _PTX)
_MX_GEMM = _SM100 + _rows("gemm", ("cdna4",), "hipblaslt", _CDNA4)

KERNELS: dict[str, tuple[Kernel, ...]] = {
    "fp32": _PLAIN,
    "bf16": _PLAIN,
    "fp16": _PLAIN,
    "int8": _INTEGER_ROWS,
    "int4": _INTEGER_ROWS,
    "int2": _INTEGER_ROWS,
    "int8_fused": _rows("embedding", ("cpu",), "torch", _BYTE_ROWS),
    "fp8_tensor": _rows("gemm", ("sm89", "sm90", "sm100", "cdna3", "cdna4"), "torch._scaled_mm", _SCALED_MM),
    # row-wise scales: torch's test suite calls them "sm89-sm100 specific"; skipped there for gfx950
    "fp8_row": _rows("gemm", ("sm89", "sm90", "sm100", "cdna3"), "torch._scaled_mm", _SCALED_MM),
    "mxfp8_e4m3": _MX_GEMM,
    "mxfp8_e5m2": _MX_GEMM,
    "mxfp6_e3m2": _MX_GEMM,
    "mxfp6_e2m3": _MX_GEMM,
    "mxfp4_e2m1": _MX_GEMM,
    "nvfp4": _SM100,
}
"""Kernels by base format; a base that is not listed has none."""


def kernels(format: str | Format, operation: Operation | None = None) -> tuple[Kernel, ...]:
    """The kernels of a format, of one operation or of all; empty where it can only be emulated.

    The options that change how codes are *chosen* (scale mode, rounding, bound) do not matter to a kernel
    that reads them; a block size that differs from the family's does, and has none.
    """
    spec = parse_format(format)
    if spec.block != parse_format(spec.base).block:
        return ()
    found = KERNELS.get(spec.base, ())
    return tuple(kernel for kernel in found if operation is None or kernel.operation == operation)
