"""What ``MODEL`` means on the command line and in :func:`planner.compile`.

=====================  ==========================================================================
written                means
=====================  ==========================================================================
``dlrm-dcnv2``         a model of the zoo (:mod:`planner.zoo`)
``model.py:build``     a callable of a Python file that returns an ``nn.Module``, or a pair of one
                       and its example inputs; it runs on the meta device, so tables cost nothing
``tables.json``        a list of tables without a network (:mod:`ir.tables`)
``tables.json#name``   one set of a file that holds several
=====================  ==========================================================================
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.errors import InputError, PlannerError, did_you_mean
from ir.program import Model
from ir.tables import load_tables
from ir.workload import Workload
from planner.zoo import build, decoder_names, zoo_names

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ResolvedModel:
    """A model ready to plan."""

    model: Model
    workload: Workload | None  # what its source states; None where it states nothing
    module: nn.Module | None  # None for a table list


def resolve(source: str | Path, **overrides: Any) -> ResolvedModel:
    """The model that ``source`` names.

    Args:
        source: as in the module's table.
        overrides: options of a zoo model (:func:`planner.zoo.build`).

    Raises:
        InputError: nothing of that name, or a file that cannot be used.
        TraceError: model code that cannot be traced.
    """
    text = str(source)
    known = (*zoo_names(), *decoder_names())
    if text in known:
        from ir.capture_llm import capture_model

        found = build(text, **overrides)
        return ResolvedModel(capture_model(found.module, name=text), found.workload, found.module)
    if overrides:
        raise InputError(
            f"options such as {next(iter(overrides))!r} are for models of the zoo, {text!r} is none"
        )
    if text.partition("#")[0].endswith(".json"):
        model, workload = load_tables(text)
        return ResolvedModel(model, workload, None)
    path, colon, function = text.rpartition(":")
    if colon and path.endswith(".py"):
        from ir.capture_llm import capture_model

        module, inputs = load_module(path, function)
        captured = capture_model(module, name=f"{Path(path).stem}:{function}", example_inputs=inputs)
        return ResolvedModel(captured, None, module)
    if text.endswith(".py"):
        raise InputError(f"{text} needs the name of a callable that returns the model: {text}:build")
    raise InputError(
        f"no model {text!r}{did_you_mean(text, known)}; name one of the zoo ({', '.join(known)}), "
        "file.py:callable, or a table list file.json"
    )


def load_module(path: str | Path, function: str, device: str = "meta") -> tuple[nn.Module, Any]:
    """Call ``function`` of a Python file under a default device.

    Returns:
        The module, and its example inputs where the callable returned a pair.

    Raises:
        InputError: no such file or callable, code that fails (with file and line), or another result.
    """
    import torch

    callable_ = _attribute(path, function)
    try:
        with torch.device(device):
            made = callable_()
    except PlannerError:
        raise
    except Exception as error:
        raise InputError(
            f"{_where(error, path)} failed while {function}() built the model: {_first_line(error)}"
        ) from error
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"{path}:{function} returned {type(module).__name__}; it must return an nn.Module")
    return module, inputs


def _attribute(path: str | Path, function: str) -> Any:
    file = Path(path)
    if not file.is_file():
        raise InputError(f"model file {file} does not exist; check the path")
    name = f"_planner_model_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise InputError(f"model file {file} is not a Python file")
    code = importlib.util.module_from_spec(spec)
    sys.modules[name] = code  # dataclasses and typing look their module up
    sys.path.insert(0, str(file.resolve().parent))  # as `python file.py` would
    try:
        spec.loader.exec_module(code)
    except SyntaxError as error:
        raise InputError(f"{file}:{error.lineno} is not Python: {error.msg}") from None
    except Exception as error:
        raise InputError(
            f"{_where(error, path)} failed while it was imported: {_first_line(error)}"
        ) from error
    finally:
        sys.path.remove(str(file.resolve().parent))
    found = getattr(code, function, None)
    if not callable(found):
        names = [key for key, value in vars(code).items() if callable(value) and not key.startswith("_")]
        raise InputError(f"{file} has no callable {function!r}{did_you_mean(function, names)}")
    return found


def _where(error: BaseException, path: str | Path) -> str:
    """``file:line`` of the innermost frame inside the user's file."""
    line, trail = None, error.__traceback__
    while trail is not None:
        if Path(trail.tb_frame.f_code.co_filename).resolve() == Path(path).resolve():
            line = trail.tb_lineno
        trail = trail.tb_next
    return f"{path}:{line}" if line else str(path)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
