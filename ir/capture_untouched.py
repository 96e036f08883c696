"""A model as it was before it was traced, whatever its ``forward`` writes.

Tracing runs ``forward`` once with stand-ins for tensors: counters go up, lists grow, and what is kept for later
(``self.aux = loss``) would be a stand-in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Undo, on leaving, what is written to attributes, lists, dicts, sets and buffers of the modules in ``model``.

    Buffers are copied for the time of the trace, since code on them runs for real; parameters are not (tables).
    """
    modules = list(model.modules())
    saved = [(vars(module), dict(vars(module))) for module in modules]
    containers = {
        id(value): value for _, attributes in saved for value in attributes.values() if _grows(value)
    }
    contents = [(container, container.copy()) for container in containers.values()]
    copies: dict[int, torch.Tensor] = {}
    for module in modules:
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device.type != "meta" and not is_lazy(buffer):
                if id(buffer) not in copies:
                    copies[id(buffer)] = buffer.detach().clone()
                module._buffers[name] = copies[id(buffer)]
    try:
        yield
    finally:
        for attributes, before in saved:
            attributes.clear()
            attributes.update(before)
        for container, content in contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


def _grows(value: Any) -> bool:
    return isinstance(value, dict) or type(value) in (list, set)
