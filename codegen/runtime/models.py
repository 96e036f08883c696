"""A model by reference, so that each process can build it for itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from codegen.runtime.launch import resolve
from ir.errors import InputError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """``factory(*arguments, **options)`` gives an ``nn.Module``, a pair of one and its example inputs, or an
    object with a ``module``.

    ``factory`` is ``"package.module:name"`` or ``"file.py:name"``; arguments are JSON data. Zoo models
    are ``ModelSpec("planner.zoo:build", ("dlrm-small",), {"device": "cpu"})``.
    """

    factory: str
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int) -> tuple[nn.Module, Any]:
        """The module on the CPU with the weights that ``seed`` gives, and its example inputs or None.

        Raises:
            InputError: the factory cannot be found or does not give a module.
        """
        module, inputs = self.declare(seed)
        return materialise(module, seed), inputs

    def declare(self, seed: int) -> tuple[nn.Module, Any]:
        """The module as the factory gives it, meta tensors and all, and its example inputs or None."""
        torch.manual_seed(seed)
        try:
            made = resolve(self.factory)(*self.arguments, **self.options)
        except TypeError as error:
            raise InputError(f"{self.factory} does not take these arguments: {error}") from None
        made, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        module = getattr(made, "module", made)
        if not isinstance(module, nn.Module):
            raise InputError(
                f"{self.factory} gives a {type(module).__name__}, not an nn.Module; return the model"
            )
        return module, inputs

    def to_dict(self) -> dict[str, Any]:
        """JSON data; ``ModelSpec(**data)`` reads it back."""
        return {"factory": self.factory, "arguments": list(self.arguments), "options": self.options}


def materialise(module: nn.Module, seed: int) -> nn.Module:
    """``module`` with its meta tensors allocated on the CPU and filled from ``seed``.

    Matrices are uniform within 1 / sqrt(columns), vectors zero; a module with real weights keeps them.
    """
    if not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        return module
    random = torch.Generator().manual_seed(seed)

    def fill(tensor: Tensor) -> None:
        bound = tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 0.0
        tensor.uniform_(-bound, bound, generator=random)

    # buffers that are not saved (masks, index tables) are computed by constructors and cannot be made up
    lost = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if lost:
        raise InputError(
            f"buffer {lost[0]!r} of the model is on the meta device, so its values are unknown; build the model on cpu"
        )
    with torch.no_grad():
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                if parameter.is_meta:
                    real = torch.empty_like(parameter, device="cpu")
                    fill(real)
                    setattr(owner, name, nn.Parameter(real, requires_grad=parameter.requires_grad))
    return module
