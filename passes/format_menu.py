"""Which tensors get a format, which formats each may take, and what each is predicted to cost in accuracy.

Menus, unless the request states others:

=========== =============================== ==================================================
kind        training                        inference
=========== =============================== ==================================================
table       fp32 bf16 fp16                  and int8 int4 int2 rows, padded as FBGEMM's kernels
weight,     bf16 and fp8_row, or whatever   the same
activation  has a GEMM kernel
state       fp32                            none
kv_cache    bf16 fp8_tensor int8            the same
traffic     fp32 bf16 fp16 (fp8, int8 named) the same
=========== =============================== ==================================================

Training kernels of embedding rows exist for plain element types only. A format that no kernel of the
device reads is offered under ``kernels: emulate``; a weight in such a format is dequantised first.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from cost_models.formats import TBE_GPU_ROW_ALIGNMENT, qsnr_lower_bound, qsnr_normal
from ir.errors import InfeasibleError
from ir.format_kernels import Architecture, Operation, kernels
from ir.format_plan import FormatRequest, LossChange, TensorKind
from ir.formats import parse_format
from ir.program import Mode
from ir.topology import Device

PLAIN = ("fp32", "bf16", "fp16")
_INTEGER_ROWS = ("int8", "int4", "int2")
_GEMM_FORMATS = ("bf16", "fp8_row", "fp8_tensor", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp4_e2m1", "nvfp4")
_ANY = ("fp32", "bf16", "mx9", "mx6", "mx4")

# Compute capability or chip of the devices that the presets name.
_ARCHITECTURES: tuple[tuple[str, Architecture], ...] = (
    ("A100", "sm80"),
    ("L40", "sm89"),
    ("H100", "sm90"),
    ("H200", "sm90"),
    ("B200", "sm100"),
    ("B300", "sm100"),
    ("MI300", "cdna3"),
    ("MI355", "cdna4"),
)


def architecture(device: Device) -> Architecture | None:
    """The architecture whose kernels a device runs; None where no kernel table is kept for it."""
    if device.kind == "cpu":
        return "cpu"
    name = device.name.upper()
    return next((arch for part, arch in _ARCHITECTURES if part in name), None)


def has_kernel(format: str, operation: Operation, device: Device) -> bool:
    """Whether a kernel of the device reads ``format`` as it is stored; plain types always have one."""
    if parse_format(format).granularity == "element":
        return True
    arch = architecture(device)
    return any(kernel.architecture == arch for kernel in kernels(format, operation))


@dataclass(frozen=True, slots=True)
class FormatMenu:
    """The formats of tensors under one request."""

    request: FormatRequest
    device: Device
    mode: Mode

    def formats(self, name: str, kind: TensorKind, declared: str) -> tuple[str, ...]:
        """Formats that the tensor may take, the declared one first if it is among them.

        Raises:
            InfeasibleError: rules or kernels leave none.
        """
        asked = self.request.formats.get(kind)
        for pattern, allowed in self.request.rules.items():
            if fnmatch.fnmatchcase(name, pattern):
                asked = allowed
        offered = asked or self._default(kind, declared)
        usable = [f for f in dict.fromkeys(self._padded(f, kind) for f in offered) if self._usable(f, kind)]
        if not usable:
            raise InfeasibleError(
                f"tensor {name!r} may take {', '.join(offered)} only, and {self.device.name} has no kernel for "
                "any of them; allow another format or set kernels to 'emulate'",
                conflict=(f"formats.rules[{name}]", "formats.kernels"),
                relaxation="kernels: emulate",
            )
        return tuple(sorted(usable, key=lambda f: f != declared))

    def _default(self, kind: TensorKind, declared: str) -> tuple[str, ...]:
        emulated = self.request.kernels == "emulate"
        menus: dict[TensorKind, tuple[str, ...]] = {
            "table": (*PLAIN, *_INTEGER_ROWS) if self.mode == "inference" else PLAIN,
            "weight": _GEMM_FORMATS,
            "activation": _GEMM_FORMATS,
            "state": ("fp32",),
            "kv_cache": ("bf16", "fp8_tensor", "int8"),
            "traffic": PLAIN,
        }
        found = tuple(f for f in menus[kind] if emulated or self._usable(f, kind))
        if emulated and kind in ("table", "weight", "activation"):
            found = (*found, *_ANY)
        # what a tensor is declared with is always open to it
        return tuple(dict.fromkeys((declared, *found)))

    def _usable(self, format: str, kind: TensorKind) -> bool:
        if self.request.kernels == "emulate" or kind in ("traffic", "state", "kv_cache"):
            return True
        if kind == "table":
            plain = parse_format(format).granularity == "element"
            return plain or (self.mode == "inference" and has_kernel(format, "embedding", self.device))
        return has_kernel(format, "gemm", self.device)

    def _padded(self, format: str, kind: TensorKind) -> str:
        """Integer rows as FBGEMM's GPU kernels lay them out."""
        spec = parse_format(format)
        if kind != "table" or self.device.kind == "cpu" or spec.scale != "fp16_bias":
            return spec.id
        return replace(spec, row_alignment=TBE_GPU_ROW_ALIGNMENT).id

    def loss(self, name: str, format: str, weight: float) -> LossChange:
        """The predicted loss increase of a tensor in a format.

        Measured where the request's sensitivity has the pair; else the data-free estimate: ``weight``, the
        tensor's share of what is computed, times the relative squared error ``10^(-QSNR/10)`` of the format
        on a standard normal (a linear model with one coefficient for all tensors of a kind).
        """
        plain = replace(parse_format(format), row_alignment=1).id
        known = self.request.sensitivity.tensors.get(name, {}) if self.request.sensitivity else {}
        for text in (format, plain):
            if text in known:
                return known[text]
        return LossChange(weight * relative_error(plain))


def relative_error(format: str) -> float:
    """Relative squared error on a standard normal; of an unmeasured option, its proved bound."""
    qsnr = qsnr_normal(format)
    if qsnr is None:
        qsnr = qsnr_normal(parse_format(format).base) or qsnr_lower_bound(format, 128)
    return 0.0 if qsnr is None or math.isinf(qsnr) else 10 ** (-qsnr / 10)


def grouped(names: Iterable[str], groups: tuple[tuple[str, ...], ...]) -> dict[str, int]:
    """Group of each name that a glob of some group matches; the first group wins."""
    found: dict[str, int] = {}
    for name in names:
        for g, patterns in enumerate(groups):
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                found[name] = g
                break
    return found
