"""Symbolic tracing of a module, and errors that name the line of the user's code.

Modules of ``torch.nn`` stay whole, and so do embedding modules and TorchRec collections: one node of
the graph is one thing to plan.
"""

from __future__ import annotations

import inspect
import linecache
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

import torch
from torch import nn

from ir.capture_embeddings import is_collection
from ir.errors import TraceError

_LIBRARY = tuple(str(Path(path).parent) for path in (torch.__file__, __file__))
# A collection is a leaf, but TorchRec's tensors run their own code on proxies inside the user's forward.
_LIBRARY_PARTS = ("/torchrec/", "/fbgemm_gpu/", "<frozen", "<eval_with_key>")

_MARK = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


# TorchRec asks torch whether it is being traced each time it makes a tensor; torch answers with a notice
# that concerns TorchRec's authors, not the user of a model.
logging.getLogger("torch.fx._symbolic_trace").addFilter(
    lambda record: not record.getMessage().startswith("is_fx_tracing will return true")
)


class PlannerTracer(torch.fx.Tracer):
    """An ``fx`` tracer that keeps what is planned as a whole as one node.

    ``locations`` maps the name of each node to the file and line of the user's code that made it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.locations: dict[str, tuple[str, int]] = {}
        self._foreign: dict[CodeType, bool] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Embeddings, collections and the modules of ``torch.nn`` other than containers."""
        if isinstance(m, nn.Embedding | nn.EmbeddingBag) or is_collection(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        """As ``fx`` does it, remembering the line of the user's code."""
        node = super().create_node(*args, **kwargs)
        frame = sys._getframe(1)
        while frame is not None and self._is_library(frame.f_code):
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            self.locations[node.name] = (frame.f_code.co_filename, frame.f_lineno)
        return node

    def _is_library(self, code: CodeType) -> bool:
        known = self._foreign.get(code)
        if known is None:
            known = self._foreign[code] = is_library(code.co_filename)
        return known


def is_library(filename: str) -> bool:
    """Whether a file belongs to torch, TorchRec or the capture rather than to the user's model."""
    return filename.startswith(_LIBRARY) or any(part in filename for part in _LIBRARY_PARTS)


def trace(model: nn.Module, constants: dict[str, Any]) -> tuple[torch.fx.Graph, dict[str, tuple[str, int]]]:
    """Trace ``model`` with some arguments of ``forward`` fixed to ``constants``.

    Returns:
        The graph, and the file and line of the user's code behind each node.

    Raises:
        TraceError: names the file and line that cannot be traced, and what to do.
    """
    tracer = PlannerTracer()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that fixed arguments are not checked at run time
            graph = tracer.trace(model, concrete_args=constants or None)
    except Exception as error:
        raise TraceError(_trace_message(model, error)) from error
    if constants:
        _drop_constants(graph, constants)
    return graph, tracer.locations


def whole(names: Sequence[str], target: str) -> torch.fx.Graph:
    """A graph of one call: for a model that is itself one thing to plan."""
    graph = torch.fx.Graph()
    inputs = {name: graph.placeholder(name) for name in names}
    first, *rest = names
    graph.output(graph.call_module(target, (inputs[first],), {name: inputs[name] for name in rest}))
    return graph


def _drop_constants(graph: torch.fx.Graph, constants: dict[str, Any]) -> None:
    """Remove the placeholders of fixed arguments, and the checks of their values that ``fx`` adds."""
    fixed = {f"{name}_1" for name in constants}  # the names fx gives their placeholders
    for node in graph.find_nodes(op="placeholder"):
        if str(node.target) not in fixed:
            continue
        for user in list(node.users):
            for check in list(user.users):
                graph.erase_node(check)
            graph.erase_node(user)
        graph.erase_node(node)


def _trace_message(model: nn.Module, error: Exception) -> str:
    where = locate(error.__traceback__, type(model).forward)
    reason = first_sentence(error)
    known = isinstance(error, torch.fx.proxy.TraceError | RuntimeError | TypeError)
    return (
        f"{where} cannot be traced: {'' if known else f'{type(error).__name__}: '}{reason}; {_advice(reason)}"
    )


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's text, without its full stop; its class when it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0].partition(". ")[0].rstrip(".") if lines else type(error).__name__


def _advice(reason: str) -> str:
    """What to do about code that symbolic tracing refuses."""
    lower = reason.lower()
    if "has no attribute" in lower and "proxy" not in lower:
        return "this line fails whenever the model runs: mend the model"
    if any(part in lower for part in ("iterated", "'len'", "interpreted as an integer")):
        return (
            "loop over something that is known before the input is (a list kept by the module), or put the "
            "loop into a function marked with torch.fx.wrap"
        )
    if "control flow" in lower:
        return (
            "move the branch out of forward (decide it in __init__), or put it into a function marked with "
            "torch.fx.wrap, or pass a graph made by torch.export.export"
        )
    if "argument must be" in lower:
        return (
            "keep the value a tensor, or put this code into a function marked with torch.fx.wrap, so that it "
            "stays one node"
        )
    return (
        "put this code into a function marked with torch.fx.wrap, so that it stays one node, or pass a graph "
        "made by torch.export.export"
    )


def locate(trail: TracebackType | None, fallback: Callable[..., Any] | None = None) -> str:
    """``file:line: `code``` of the innermost frame of a traceback that is the user's own."""
    frames = [frame for frame in traceback.extract_tb(trail) if not is_library(frame.filename)]
    if frames:
        return describe(frames[-1].filename, frames[-1].lineno or 0)
    if fallback is not None:
        code = inspect.unwrap(fallback).__code__
        return describe(code.co_filename, code.co_firstlineno)
    return "the model"


def describe(filename: str, line: int) -> str:
    """``file:line: `the code there```."""
    code = linecache.getline(filename, line).strip()
    return f"{filename}:{line}" + (f": `{code}`" if code else "")


def node_location(node: torch.fx.Node, locations: dict[str, tuple[str, int]]) -> str:
    """Where the user's code made ``node``, or the node's own name when nobody knows."""
    if node.name in locations:
        return describe(*locations[node.name])
    marks = [m for m in _MARK.finditer(node.stack_trace or "") if not is_library(m["file"])]
    if marks:
        return describe(marks[-1]["file"], int(marks[-1]["line"]))
    return f"node {node.name!r} ({node.format_node()})"
