"""Checkpoints that any plan of the same model can load, whatever its world size, sharding and runtime.

Weights and optimizer state are written with ``torch.distributed.checkpoint`` under the names they have before
sharding (:mod:`codegen.checkpoint_state`), each rank its own blocks; loading reads the blocks that a rank needs. State of
fused kernels, of ordinary optimizers and of this project's tables is the same thing under the same name, so a table may
change from data-parallel to row-wise, into a tower, a number format or memory tiers, and back. A table may also have
grown: the rows that the checkpoint has are read, those it lacks keep the values that the new model gave them, and fresh
state.

A checkpoint is a folder ``step-<n>``; the file ``latest`` names the last one that was written whole, so a
process that is killed while it saves loses that checkpoint and no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ir.errors import InputError
from ir.plan import Plan, write_atomically
from ir.reading import clipped, read_json

__all__ = ["load_checkpoint", "read_latest", "save_checkpoint"]

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

    from codegen.execution import Running

LATEST = "latest"
STATE = "optimizer/"  # begins the names of optimizer state


def save_checkpoint(plan: Plan, model: Running, folder: str | Path, step: int) -> Path:
    """Write weights and optimizer state after ``step`` steps; called by all ranks together.

    Args:
        plan: the plan ``model`` was made with.
        model: the model and its optimizers, of any runtime.
        folder: holds the checkpoints of one training; made when missing.
        step: names the checkpoint.

    Returns:
        The folder of this checkpoint.

    Raises:
        InputError: the folder cannot be written, or groups of replicated tables differ at this step.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict_saver import save

    from codegen.checkpoint_blocks import BlockSaver
    from codegen.checkpoint_state import check_in_step, model_state, phase_of

    check_in_step(model)
    target = Path(folder) / f"step-{step:09d}"
    state = model_state(plan, model)
    if dist.get_rank() == 0:
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {target}: {error.strerror}; choose another folder") from None
    dist.barrier()
    save(state, checkpoint_id=target, planner=BlockSaver())
    if dist.get_rank() == 0:
        # the plan's own digest is for people: any plan of the model may load it
        about: dict[str, Any] = {"step": step, "folder": target.name, **phase_of(model)}
        about |= {"model": plan.model.digest, "plan": plan.digest}
        write_atomically(Path(folder) / LATEST, json.dumps(about) + "\n")
    dist.barrier()
    return target


def load_checkpoint(
    plan: Plan,
    model: Running,
    folder: str | Path,
    *,
    before: Plan | None = None,
    momentum: Literal["mean"] | None = None,
) -> int:
    """Read the latest checkpoint into ``model``; called by all ranks together.

    Args:
        plan: the plan ``model`` was made with.
        model: the model and its optimizers, not trained yet.
        folder: as in :func:`save_checkpoint`.
        before: the plan of the model that was saved, where ``plan``'s has more rows in its tables, or more tables: what
            the checkpoint lacks keeps the weights that ``model`` was made with, and optimizer state that starts anew.
        momentum: "mean": where the plan joins columns for which row-wise Adagrad kept states apart, take their mean
            (:mod:`codegen.checkpoint_rows`).

    Returns:
        The step it was written after.

    Raises:
        InputError: no checkpoint there, one of another model, one in which more than rows and tables is missing or of which
            something is left over, or states to be joined without ``momentum``.
    """
    from codegen.checkpoint_reader import TensorReader
    from codegen.checkpoint_state import enter, model_state, settle

    if momentum not in (None, "mean"):
        raise InputError(f"momentum must be 'mean' or None, not {momentum!r}")
    about = read_latest(folder)
    if about["model"] != (before or plan).model.digest:
        raise InputError(
            f"the checkpoint in {folder} is of another model than the plan of {(before or plan).model.name}; its tables "
            "or layers differ (pass the plan of the model that was saved as before, if tables have grown)"
        )
    source, step = Path(folder) / about["folder"], int(about["step"])
    enter(model, step, about.get("phase"))
    state = model_state(plan, model)
    grown: dict[str, int] = {}
    if before is not None:
        state, grown = known_to(before, plan, state)
    try:
        index = TensorReader(source).read_metadata()
    except OSError as error:
        raise InputError(f"checkpoint {source} cannot be read: {error}") from None
    _read(plan, state, index, (source, grown), mean=momentum == "mean", grows=before is not None)
    settle(model, step)
    return step


def _read(
    plan: Plan,
    state: dict[str, Any],
    index: Metadata,
    where: tuple[Path, dict[str, int]],
    *,
    mean: bool,
    grows: bool,
) -> None:
    """Fill ``state``; ``where`` is the checkpoint's folder and the rows by which its tensors have grown."""
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    from codegen.checkpoint_blocks import BlockLoader
    from codegen.checkpoint_reader import TensorReader
    from codegen.checkpoint_rows import Mixed, sources
    from codegen.checkpoint_state import table_of

    source, grown = where
    saved, wanted = set(index.state_dict_metadata), _of_all_ranks(state)
    left = sorted(key for key in saved - wanted if not key.startswith(STATE))
    if left:
        raise InputError(
            f"the checkpoint {source} has {left[0]!r}, which the model lacks; give it the layers, tower modules and phase "
            "of growth that were saved"
        )
    paths = {key.split("/")[1] for key in wanted | saved if key.startswith(STATE)}
    tables = {path: table for path in paths if (table := table_of(plan.table_plans, path)) is not None}
    found = sources(wanted, saved, tables, mean)
    for key, parts in found.items():  # they have as many rows more as the state that they become
        grown |= {part.key: grown[key] for part in parts if key in grown}
    entries: Any = index.state_dict_metadata
    rows = {part.key: entries[part.key].size[0] for parts in found.values() for part in parts}
    mixed = Mixed.take(state, found, {key: count + grown.get(key, 0) for key, count in rows.items()})
    with torch.no_grad():
        try:
            # apart, because what is read into a buffer may be read under its own name too
            for some in (state, mixed.buffers) if found else (state,):
                load(some, storage_reader=TensorReader(source, grown), planner=BlockLoader())
        except CheckpointException as error:
            first = next(iter(error.failures.values()), (error,))[0]
            what = "; tables may have more rows or be new, layers must keep their shapes" if grows else ""
            raise InputError(f"checkpoint {source} cannot be read: {clipped(str(first))}{what}") from None
        except OSError as error:
            raise InputError(f"checkpoint {source} cannot be read: {error}") from None
        mixed.settle()


def _of_all_ranks(names: Iterable[str]) -> set[str]:
    """The names that any rank has, so that all ranks refuse the same things."""
    import torch.distributed as dist

    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sorted(names))
    return {name for one in everyone for name in one}


def known_to(before: Plan, plan: Plan, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """The part of ``state`` that a checkpoint of ``before`` has, and the rows that it lacks, by name.

    Raises:
        InputError: a table is gone, shorter, or of another width or type.
    """
    from codegen.checkpoint_state import table_of

    for old in before.table_plans:
        new = plan.tables.get(old.name)
        if new is None or (new.dim, new.dtype) != (old.dim, old.dtype) or new.rows < old.rows:
            found = "gone" if new is None else f"{new.rows} x {new.dim} {new.dtype}"
            raise InputError(
                f"table {old.name!r} was {old.rows} x {old.dim} {old.dtype} when it was saved and is {found} in the "
                "plan; tables may only have gained rows"
            )
    known, grown = {}, {}
    for key, value in state.items():
        table = table_of(plan.table_plans, key.split("/")[1] if key.startswith(STATE) else key)
        if table is None:
            known[key] = value
            continue
        old_table = before.tables.get(table.name)
        if old_table is not None:
            known[key] = value
            if table.rows > old_table.rows and value.shape:  # Adam's step counts no rows
                grown[key] = table.rows - old_table.rows
    return known, grown


def read_latest(folder: str | Path) -> dict[str, Any]:
    """Step, folder and model of the last whole checkpoint; raises InputError when ``latest`` names none."""
    path = Path(folder) / LATEST
    about = read_json(path, "checkpoint")
    if (
        not isinstance(about, dict)
        or type(about.get("step")) is not int
        or about.get("folder") != f"step-{about['step']:09d}"
        or not isinstance(about.get("model"), str)
        or type(about.get("phase", 0)) is not int
        or about.get("phase", 0) < 0
    ):
        raise InputError(f"{path} does not name a checkpoint; it was edited or damaged")
    return about
