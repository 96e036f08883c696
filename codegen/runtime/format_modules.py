"""Linear layers that compute in given number formats, for training and for inference.

A GEMM reads both operands in blocks along its *reduction* axis, and quantising does not commute with
transposing (BDR, arXiv 2302.08007, section 5), so a layer's three GEMMs quantise each tensor along three
different axes. With x (B, K), w (N, K) and the gradient g (B, N) of the output::

    y  = Q(x, K) Q(w, K)^T         forward
    dx = Q(g, N) Q(w, N)           gradient of the input
    dw = Q(g, B)^T Q(x, B)         gradient of the weight

Parameters stay float32 master copies under their old names, so checkpoints and optimizers do not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from codegen.runtime.mx_fake import fake_quantize
from codegen.runtime.mx_tensor import quantize
from ir.errors import InputError
from ir.formats import Format, parse_format

WIDE = "fp32"  # not quantised: a tensor in this format keeps the type it has


@dataclass(frozen=True, slots=True)
class GemmFormats:
    """The formats of one linear layer, by id.

    ``gradient`` None: the backward pass reads the forward pass's quantised operands and a wide gradient,
    the straight-through estimator of quantisation-aware training. Any format, "fp32" too: all three GEMMs
    quantise their operands along their own reduction axis, which is how MX training computes.
    """

    weight: str = WIDE
    activation: str = WIDE
    gradient: str | None = None

    def __post_init__(self) -> None:
        for text in (self.weight, self.activation, self.gradient or WIDE):
            parse_format(text)


def cast(x: Tensor, format: str, axis: int) -> Tensor:
    """``x`` with the values that ``format`` keeps along ``axis``; ``x`` itself in the wide format."""
    return x if format == WIDE else fake_quantize(x, format, axis)


class _FormatGemm(torch.autograd.Function):
    """``x w^T`` with operands and gradient in the formats of a layer; x (B, K), w (N, K)."""

    @staticmethod
    def forward(context: Any, x: Tensor, w: Tensor, formats: GemmFormats) -> Tensor:
        context.formats = formats
        narrow_x, narrow_w = cast(x, formats.activation, -1), cast(w, formats.weight, -1)
        saved = (x, w) if formats.gradient is not None else (narrow_x, narrow_w)
        context.save_for_backward(*saved)
        return narrow_x @ narrow_w.t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = context.saved_tensors
        formats: GemmFormats = context.formats
        need_x, need_w, _ = context.needs_input_grad
        if formats.gradient is None:
            return gradient @ w if need_x else None, gradient.t() @ x if need_w else None, None
        dx = dw = None
        if need_x:
            dx = cast(gradient, formats.gradient, -1) @ cast(w, formats.weight, 0)
        if need_w:
            dw = cast(gradient, formats.gradient, 0).t() @ cast(x, formats.activation, 0)
        return dx, dw, None


@torch.fx.wrap
def format_linear(x: Tensor, weight: Tensor, bias: Tensor | None, formats: GemmFormats) -> Tensor:
    """``x weight^T + bias`` in the formats given; x (..., K), weight (N, K), bias (N,). The bias stays wide."""
    if x.dtype != weight.dtype:
        raise InputError(f"a layer with {weight.dtype} weights was fed {x.dtype}; convert one of them")
    flat = _FormatGemm.apply(x.reshape(-1, x.shape[-1]), weight, formats)  # type: ignore[no-untyped-call]
    y: Tensor = flat.reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


class FormatLinear(nn.Linear):
    """A linear layer that computes in :class:`GemmFormats`; it shares the parameters of its source."""

    formats: GemmFormats

    @classmethod
    def of(cls, source: nn.Linear, formats: GemmFormats) -> FormatLinear:
        """The layer with the parameters of ``source``, under the same names."""
        made = cls(source.in_features, source.out_features, source.bias is not None, device="meta")
        made.weight, made.bias = source.weight, source.bias
        made.formats = formats
        made.train(source.training)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        return format_linear(input, self.weight, self.bias, self.formats)

    def extra_repr(self) -> str:
        """Sizes and formats."""
        return f"{super().extra_repr()}, {self.formats}"


class FrozenLinear(nn.Module):
    """For inference: the weight was quantised once, the input is quantised at each call."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, source: nn.Linear, formats: GemmFormats) -> None:
        super().__init__()
        self.formats = formats
        with torch.no_grad():
            self.register_buffer("weight", cast(source.weight.detach(), formats.weight, -1).clone())
            self.register_buffer("bias", None if source.bias is None else source.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        return nn.functional.linear(cast(x, self.formats.activation, -1), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Formats."""
        return str(self.formats)


class Fp8RowLinear(nn.Module):
    """For inference: FP8 weights with a scale per output row, inputs with a dynamic scale per token.

    ``torch._scaled_mm`` reads the codes, so the weight takes a quarter of its float32 bytes. It runs on a
    CPU (as a reference) and on GPUs of compute capability 8.9 and later. Llama 3 (arXiv 2407.21783,
    section 6.2) serves its feed-forward layers so, with ``fp8_row:bound=1200``.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, source: nn.Linear, weight: Format, activation: Format) -> None:
        super().__init__()
        for format in (weight, activation):
            if format.base != "fp8_row":
                raise InputError(f"row-wise FP8 GEMMs take fp8_row operands, not {format.id}")
        if source.in_features % 16 or source.out_features % 16:
            raise InputError(
                f"torch._scaled_mm needs widths that are multiples of 16, not {source.in_features} x "
                f"{source.out_features}; leave this layer wide"
            )
        self.activation = activation
        quantized = quantize(source.weight.detach(), weight, -1)
        assert quantized.scales is not None
        self.register_buffer("codes", quantized.codes.view(torch.float8_e4m3fn))
        self.register_buffer("scales", quantized.scales.reshape(1, -1))
        self.register_buffer("bias", None if source.bias is None else source.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N), in the type of ``x``."""
        flat = quantize(x.reshape(-1, x.shape[-1]), self.activation, -1)
        assert flat.scales is not None
        y: Tensor = torch._scaled_mm(
            flat.codes.view(torch.float8_e4m3fn),
            self.codes.t(),
            scale_a=flat.scales,
            scale_b=self.scales,
            out_dtype=torch.float32 if x.device.type == "cpu" else torch.bfloat16,  # CUDA: bfloat16 only
        )
        y = y.to(x.dtype).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Sizes and formats."""
        return f"{self.codes.shape[1]}, {self.codes.shape[0]}, fp8_row, activation={self.activation.id}"


def narrow_linear(source: nn.Linear, formats: GemmFormats, *, training: bool) -> nn.Module:
    """The module that takes the place of ``source``: exact kernels where torch has them, else emulation."""
    if training:
        return FormatLinear.of(source, formats)
    weight, activation = parse_format(formats.weight), parse_format(formats.activation)
    plain = weight.axis == -1 and activation.axis == -1
    rows = weight.base == activation.base == "fp8_row"
    if rows and plain and not (source.in_features % 16 or source.out_features % 16):
        return Fp8RowLinear(source, weight, activation)
    return FrozenLinear(source, formats)


def replace_modules(model: nn.Module, made: Mapping[str, nn.Module]) -> None:
    """Put modules at their paths, in place; raises InputError for a path that the model lacks."""
    for path, module in made.items():
        parent, _, name = path.rpartition(".")
        try:
            owner = model.get_submodule(parent)
            owner.get_submodule(name)
        except AttributeError:
            raise InputError(
                f"the model has no module {path!r}; apply the plan to the model it is for"
            ) from None
        # add_module also serves Sequential, ModuleList and ModuleDict
        owner.add_module(name, module)


def quantize_optimizer_state(optimizer: torch.optim.Optimizer, formats: Mapping[nn.Parameter, str]) -> Any:
    """Keep the optimizer's state of the given parameters in their formats: rounded after every step.

    Scalars (step counters) stay as they are. Returns the hook's handle; ``remove()`` ends it.
    """
    wanted = {parameter: parse_format(format).id for parameter, format in formats.items()}

    def after_step(stepped: torch.optim.Optimizer, *_: Any) -> None:
        with torch.no_grad():
            for parameter, format in wanted.items():
                for value in stepped.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.dim() > 0 and value.is_floating_point():
                        value.copy_(cast(value, format, -1))

    return optimizer.register_step_post_hook(after_step)
