"""Formats of dense tensors as members of the joint problem: GEMM operands and cached keys and values.

A dense tensor is replicated, so its options put the same seconds and bytes on every rank. GEMMs that a
group ties together (QKV) are one member and quantise their common input once each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cost_models.calibration import Calibration
from cost_models.formats import bits_per_element
from cost_models.gemm_formats import COMPUTE_FORMATS, GemmPrice, cache_read_seconds, gemm_price
from ir.format_plan import LossChange, TensorKind
from ir.formats import parse_format
from ir.ops import Op
from ir.program import Program
from passes.assignment import Option, Piece
from passes.format_menu import FormatMenu, grouped, has_kernel


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """One tensor of a member, in one of the member's options."""

    name: str
    kind: TensorKind
    format: str
    elements: float
    bits: float
    loss: LossChange
    emulated: bool


@dataclass(frozen=True, slots=True)
class DenseChoice:
    """What an option of a member means."""

    tensors: tuple[DenseTensor, ...]
    price: GemmPrice
    weight_bytes: float  # of GEMM weights in their formats


@dataclass(frozen=True, slots=True)
class DenseMember:
    """Tensors that are decided together, with the options they have."""

    name: str
    options: tuple[Option, ...]
    meaning: tuple[DenseChoice, ...]


@dataclass(frozen=True, slots=True, eq=False)
class DenseFormats:
    """Makes the dense members of one program."""

    program: Program
    calibration: Calibration
    formats: FormatMenu
    budgets: tuple[str, ...]
    scale: tuple[float, ...]
    phases: tuple[str, ...]  # the last is "dense"

    def members(self) -> list[DenseMember]:
        """Every GEMM (or tied group of them), then every attention op that caches."""
        gemms = [op for op in self.program.model.ops if op.gemm is not None and op.params > 0]
        ties = grouped([f"{op.name}.weight" for op in gemms], self.formats.request.groups)
        together: dict[str, list[Op]] = {}
        for op in gemms:
            group = ties.get(f"{op.name}.weight")
            together.setdefault(op.name if group is None else f"group {group}", []).append(op)
        made = [self._gemms(name, ops) for name, ops in together.items()]
        if self.program.options.mode == "inference":
            made += [
                self._cache(op)
                for op in self.program.model.ops
                if op.kind == "attention" and len(op.inputs) > 2
            ]
        return made

    @property
    def plain(self) -> str:
        """The format that GEMMs compute in when nothing is decided."""
        return COMPUTE_FORMATS[self.program.workload.compute_dtype]

    def _gemms(self, name: str, ops: Sequence[Op]) -> DenseMember:
        pairs = dict.fromkeys(pair for op in ops for pair in self._pairs(op))
        usable = [pair for pair in pairs if all(pair in self._pairs(op) for op in ops)]
        made = [self._gemm_choice(ops, *pair) for pair in usable]
        return self._member(name, made)

    def _pairs(self, op: Op) -> tuple[tuple[str, str], ...]:
        """(weight, activation) formats of a GEMM: both the same, or a narrow weight with a plain activation."""
        weights = self.formats.formats(f"{op.name}.weight", "weight", self.plain)
        inputs = self.formats.formats(f"{op.name}.input", "activation", self.plain)
        pairs = [(f, f) for f in weights if f in inputs]
        pairs += [(w, a) for w in weights for a in inputs if w != a and _only_weight(w, a)]
        return tuple(pairs)

    def _gemm_choice(self, ops: Sequence[Op], weight: str, activation: str) -> DenseChoice:
        workload, topology = self.program.workload, self.program.topology
        samples = workload.global_batch / topology.world_size
        train = self.program.options.mode == "train"
        tensors: list[DenseTensor] = []
        gemm = cast = stored = 0.0
        for op in ops:
            assert op.gemm is not None
            k, n = op.gemm
            rows = samples * op.gemm_rows
            price = gemm_price(
                rows,
                k,
                n,
                weight,
                activation,
                workload.compute_dtype,
                topology.device,
                self.calibration,
                train=train,
            )
            gemm, cast = gemm + price.gemm, cast + price.cast
            stored += op.params * bits_per_element(weight, k) / 8
            tensors.append(self._tensor(f"{op.name}.weight", "weight", weight, op.params, k))
            tensors.append(self._tensor(f"{op.name}.input", "activation", activation, rows * k, k))
        return DenseChoice(tuple(tensors), GemmPrice(gemm, cast), stored)

    def _tensor(self, name: str, kind: TensorKind, format: str, elements: float, row: int) -> DenseTensor:
        declared = format == self.plain
        loss = LossChange(0.0) if declared else self.formats.loss(name, format, 1.0)
        emulated = not has_kernel(format, "gemm", self.program.topology.device)
        return DenseTensor(name, kind, format, elements, bits_per_element(format, row), loss, emulated)

    def _cache(self, op: Op) -> DenseMember:
        """Keys and values that an attention op reads from its cache once a step."""
        samples = self.program.workload.global_batch / self.program.topology.world_size
        made = []
        for format in self.formats.formats(f"{op.name}.kv", "kv_cache", self.plain):
            read, elements, size = cache_read_seconds(
                self.program.model.ops, op, format, samples, self.program.topology.device, self.calibration
            )
            loss = (
                LossChange(0.0) if format == self.plain else self.formats.loss(f"{op.name}.kv", format, 1.0)
            )
            bits = 8 * size / elements if elements else 32.0
            tensor = DenseTensor(f"{op.name}.kv", "kv_cache", format, elements, bits, loss, True)
            made.append(DenseChoice((tensor,), GemmPrice(read, 0.0), 0.0))
        return self._member(f"{op.name}.kv", made)

    def _member(self, name: str, made: Sequence[DenseChoice]) -> DenseMember:
        inference = self.program.options.mode == "inference"
        options = []
        kept = []
        for choice in made:
            weights = sum(t.elements * t.bits for t in choice.tensors if t.kind == "weight")
            sums = {
                "loss": sum(max(0.0, t.loss.mean) for t in choice.tensors),
                "bits": weights,
                "bytes": weights / 8,
            }
            cost = tuple(sums[b] / unit for b, unit in zip(self.budgets, self.scale, strict=True))
            load = tuple(choice.price.seconds if p == "dense" else 0.0 for p in self.phases)
            cached = sum(t.elements * t.bits / 8 for t in choice.tensors if t.kind == "kv_cache")
            memory = (choice.weight_bytes if inference else 0.0) + cached
            label = " x ".join(dict.fromkeys(t.format for t in choice.tensors))
            options.append(Option(label, (Piece("all", load, memory),), cost=cost))
            kept.append(choice)
        return DenseMember(name, tuple(options), tuple(kept))


def _only_weight(weight: str, activation: str) -> bool:
    plain = parse_format(activation).granularity == "element"
    return plain and parse_format(weight).element.bits < parse_format(activation).element.bits
