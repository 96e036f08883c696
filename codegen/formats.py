"""A plan's number formats as a model that computes with them, in one process.

Tensor names are those of :mod:`ir.format_plan`. The model is captured once more to find the module that a
name stands for; functional operators (``bmm``, attention written out) have no module and stay wide.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ir.errors import InputError, did_you_mean
from ir.format_plan import TensorKind
from ir.formats import parse_format
from ir.plan import Plan
from ir.program import Model

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

log = logging.getLogger(__name__)

TRAFFIC = ("traffic.forward", "traffic.backward")
_SUFFIXES: dict[str, TensorKind] = {"weight": "weight", "input": "activation", "state": "state"}


@dataclass(frozen=True, slots=True)
class Site:
    """A tensor that a module reads: ``name`` as in :mod:`ir.format_plan`, ``path`` of the module."""

    name: str
    kind: TensorKind
    path: str


def sites(model: nn.Module, captured: Model | None = None) -> dict[str, Site]:
    """The tensors of ``model`` whose format a module can take on, by name, in the model's order.

    Tables with their optimizer state, weights and inputs of ``nn.Linear``, and the pooled embeddings on the
    wire. ``captured`` spares capturing the model again.

    Raises:
        TraceError, InputError: as :func:`ir.capture.capture`.
    """
    from torch import nn as modules

    from ir.capture import capture

    captured = captured or capture(model)
    found: dict[str, Site] = {}
    for table in captured.tables:
        path = table.parameter.removesuffix(".weight")
        found[table.name] = Site(table.name, "table", path)
        found[f"{table.name}.state"] = Site(f"{table.name}.state", "state", path)
    for op in captured.ops:
        if op.kind == "gemm" and op.module and isinstance(model.get_submodule(op.module), modules.Linear):
            found[f"{op.name}.weight"] = Site(f"{op.name}.weight", "weight", op.module)
            found[f"{op.name}.input"] = Site(f"{op.name}.input", "activation", op.module)
    if captured.tables:
        found |= {name: Site(name, "traffic", "") for name in TRAFFIC}
    return found


def apply(
    plan: Plan,
    model: nn.Module,
    *,
    training: bool | None = None,
    gradient: str | None = None,
    clip: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """``model`` computing with the formats that the plan chose, in this process.

    Args:
        plan: a plan with number formats.
        model: the model that was planned, with its weights.
        training: float32 master weights read through the formats, with straight-through gradients; otherwise
            narrow copies and, where there are any, kernels. By default what the plan was made for.
        gradient: when training, the format in which gradients enter GEMMs, such as "mx9"; None keeps them
            wide (see :class:`codegen.runtime.format_modules.GemmFormats`).
        clip: for inference, clip integer rows to the range of least squared error first.
        inplace: change ``model`` itself rather than a copy of it.

    Returns:
        The model. Training modules keep the names of parameters, so checkpoints fit.

    Raises:
        InputError: the plan has no formats, or is not for this model.
    """
    decided = plan.decisions.formats
    if decided is None:
        raise InputError(
            "the plan has no number formats, and one process shards nothing; compile it with constraints.formats set, or "
            "pass a process group"
        )
    chosen = {tensor.name: tensor.format for tensor in decided.tensors}
    training = plan.mode == "train" if training is None else training
    return apply_formats(model, chosen, training=training, gradient=gradient, clip=clip, inplace=inplace)


def apply_formats(
    model: nn.Module,
    chosen: Mapping[str, str],
    *,
    training: bool,
    gradient: str | None = None,
    clip: bool = False,
    inplace: bool = False,
    known: Mapping[str, Site] | None = None,
) -> nn.Module:
    """``model`` with the tensors in ``chosen`` (name -> format id) in their formats; see :func:`apply`.

    Optimizer state is not part of the model: see :func:`narrow_optimizer`. What no module can take on
    (keys and values, functional GEMMs) stays wide and is logged.

    Raises:
        InputError: a tensor that the model does not have, or two uses of one layer that disagree.
    """
    from codegen.runtime.format_modules import replace_modules

    known = known if known is not None else sites(model)
    model = model if inplace else copy.deepcopy(model)
    made = narrow_modules(model, _executable(chosen, known), training=training, gradient=gradient, clip=clip)
    replace_modules(model, made)
    _exchange(model, chosen, known)
    return model


@contextmanager
def formats_applied(
    model: nn.Module, chosen: Mapping[str, str], known: Mapping[str, Site], *, gradient: str | None = None
) -> Iterator[nn.Module]:
    """``model`` itself with training modules for ``chosen`` in place, and as it was afterwards."""
    from codegen.runtime.format_modules import replace_modules

    made = narrow_modules(model, _executable(chosen, known), training=True, gradient=gradient)
    before = {path: model.get_submodule(path) for path in made}
    replace_modules(model, made)
    hooks = _exchange(model, chosen, known)
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
        replace_modules(model, before)


def narrow_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    chosen: Mapping[str, str],
    known: Mapping[str, Site],
) -> Any | None:
    """Round the optimizer's state of tables to the formats of ``<table>.state`` after every step.

    Args:
        optimizer: over the parameters of ``model``.
        model: the model that trains, formats applied or not.
        chosen: name -> format id, such as a plan's; names that are no optimizer state are passed over.
        known: :func:`sites` of the model before formats were applied.

    Returns the hook's handle, or None when every state stays float32.

    Raises:
        InputError: a table that the model does not have.
    """
    from codegen.runtime.format_modules import WIDE, quantize_optimizer_state

    states = {name: format for name, format in chosen.items() if name.endswith(".state") and format != WIDE}
    _executable(states, known)
    weights = {model.get_parameter(f"{known[name].path}.weight"): format for name, format in states.items()}
    return quantize_optimizer_state(optimizer, weights) if weights else None


def _executable(chosen: Mapping[str, str], known: Mapping[str, Site]) -> dict[Site, str]:
    """The chosen formats by site; what has no module is logged, what does not exist is refused."""
    found: dict[Site, str] = {}
    wide: list[str] = []
    ops = {name.rpartition(".")[0] for name, site in known.items() if site.kind == "weight"}
    for name, format in chosen.items():
        base = parse_format(format).base
        if name in known:
            found[known[name]] = parse_format(format).id
        elif name.endswith((".kv", ".weight", ".input")) and name.rpartition(".")[0] not in ops:
            wide += [name] if base != "fp32" else []
        else:
            raise InputError(
                f"the model has no tensor {name!r}{did_you_mean(name, known)}; apply the plan to the model it is for"
            )
    if wide:
        log.warning("%d tensors stay wide, no module holds them: %s", len(wide), ", ".join(wide[:5]))
    return found


def narrow_modules(
    model: nn.Module,
    chosen: Mapping[Site, str],
    *,
    training: bool,
    gradient: str | None = None,
    clip: bool = False,
) -> dict[str, nn.Module]:
    """The modules by path that take the places of those of ``model``, which is not changed; see :func:`apply`.

    Raises:
        InputError: two uses of one layer that disagree, or a module that cannot compute in its format.
    """
    from codegen.runtime.format_modules import WIDE, GemmFormats, narrow_linear
    from codegen.runtime.format_tables import narrow_table

    layers: dict[str, GemmFormats] = {}
    said: dict[tuple[str, TensorKind], str] = {}
    made: dict[str, nn.Module] = {}
    for site, format in chosen.items():
        key = (site.path, site.kind)
        if said.setdefault(key, format) != format and site.kind != "traffic":
            raise InputError(
                f"layer {site.path!r} is used twice and its {site.kind} is planned as both {said[key]} and "
                f"{format}; put both in one group"
            )
        if site.kind == "table" and format != WIDE:
            made[site.path] = narrow_table(
                model.get_submodule(site.path), format, training=training, clip=clip
            )
        elif site.kind in ("weight", "activation"):
            before = layers.get(site.path, GemmFormats(gradient=gradient))
            layers[site.path] = replace(before, **{site.kind: format})
    for path, formats in layers.items():
        if formats.weight != WIDE or formats.activation != WIDE or formats.gradient is not None:
            linear: Any = model.get_submodule(path)
            made[path] = narrow_linear(linear, formats, training=training)
    return made


def _exchange(
    model: nn.Module, chosen: Mapping[str, str], known: Mapping[str, Site]
) -> list[RemovableHandle]:
    """Pooled rows and their gradients cross the wire in the formats of ``traffic.*``; handles of the hooks."""
    from codegen.runtime.format_modules import WIDE
    from codegen.runtime.format_tables import exchange

    forward, backward = (parse_format(chosen.get(name, WIDE)).id for name in TRAFFIC)
    if forward == backward == WIDE:
        return []
    paths = [site.path for site in known.values() if site.kind == "table"]
    return [exchange(model.get_submodule(path), forward, backward) for path in paths]
