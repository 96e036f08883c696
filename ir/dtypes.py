"""Element types of tensors in memory and on the wire, by their short name."""

from __future__ import annotations

# Bytes per element. int8/int4/int2 count the codes only; row-wise scales are priced with the row.
BYTES: dict[str, float] = {
    "fp64": 8,
    "fp32": 4,
    "tf32": 4,
    "bf16": 2,
    "fp16": 2,
    "fp8": 1,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "int4": 0.5,
    "int2": 0.25,
}


def nbytes(dtype: str) -> float:
    """Bytes per element of ``dtype``; raises KeyError for a name not in :data:`BYTES`."""
    return BYTES[dtype]
