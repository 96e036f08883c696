"""Checkpoints that any plan of the same model can load, whatever its world size and sharding.

Weights and optimizer state are written with ``torch.distributed.checkpoint`` under the names they have before
sharding, each rank its own blocks; loading reads the blocks that a rank needs. State of fused kernels and of
ordinary optimizers is the same thing under the same name, so a table may change from data-parallel to
row-wise in between. A table may also have grown: the rows that the checkpoint has are read, those it lacks keep the
values that the new model gave them, and fresh state.

A checkpoint is a folder ``step-<n>``; the file ``latest`` names the last one that was written whole, so a
process that is killed while it saves loses that checkpoint and no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ir.errors import InputError
from ir.plan import Plan, TablePlan, write_atomically
from ir.reading import clipped, read_json

if TYPE_CHECKING:
    import torch

    from codegen.torchrec import ShardedModel

LATEST = "latest"
# FBGEMM's names of a fused optimizer's state -> torch's names of the same, by how many there are
_FUSED = {1: {"momentum1": "sum"}, 2: {"momentum1": "exp_avg", "momentum2": "exp_avg_sq"}}


def save_checkpoint(plan: Plan, sharded: ShardedModel, folder: str | Path, step: int) -> Path:
    """Write weights and optimizer state after ``step`` steps; called by all ranks together.

    Args:
        plan: the plan ``sharded`` was made with.
        sharded: the model and its optimizers.
        folder: holds the checkpoints of one training; made when missing.
        step: names the checkpoint.

    Returns:
        The folder of this checkpoint.

    Raises:
        InputError: the folder cannot be written, or the plan splits the columns of tables whose optimizer
            keeps one state a row, so that there is no state of the whole table.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict_saver import save

    target = Path(folder) / f"step-{step:09d}"
    state = model_state(plan, sharded)
    if dist.get_rank() == 0:
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {target}: {error.strerror}; choose another folder") from None
    dist.barrier()
    save(state, checkpoint_id=target)
    if dist.get_rank() == 0:
        # the plan's own digest is for people: any plan of the model may load it
        about = {"step": step, "folder": target.name, "model": plan.model.digest, "plan": plan.digest}
        write_atomically(Path(folder) / LATEST, json.dumps(about) + "\n")
    dist.barrier()
    return target


def load_checkpoint(
    plan: Plan, sharded: ShardedModel, folder: str | Path, *, before: Plan | None = None
) -> int:
    """Read the latest checkpoint into ``sharded``; called by all ranks together.

    Args:
        plan: the plan ``sharded`` was made with.
        sharded: the model and its optimizers, not trained yet.
        folder: as in :func:`save_checkpoint`.
        before: the plan of the model that was saved, where ``plan``'s has more rows in its tables, or more tables: what
            the checkpoint lacks keeps the weights that ``sharded`` was made with, and optimizer state that starts anew.

    Returns:
        The step it was written after.

    Raises:
        InputError: no checkpoint there, one of another model, or one in which more than rows and tables is missing.
    """
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    from codegen.checkpoint_reader import TensorReader

    about = read_latest(folder)
    if about["model"] != (before or plan).model.digest:
        raise InputError(
            f"the checkpoint in {folder} is of another model than the plan of {(before or plan).model.name}; its tables "
            "or layers differ (pass the plan of the model that was saved as before, if tables have grown)"
        )
    source = Path(folder) / about["folder"]
    state = model_state(plan, sharded)
    grown: dict[str, int] = {}
    if before is not None:
        state, grown = _known_to(before, plan, state)
    with torch.no_grad():
        try:
            load(state, checkpoint_id=source, storage_reader=TensorReader(source, grown))
        except CheckpointException as error:
            first = next(iter(error.failures.values()), (error,))[0]
            what = "; only tables may have grown" if before is not None else ""
            raise InputError(f"checkpoint {source} cannot be read: {clipped(str(first))}{what}") from None
        except OSError as error:
            raise InputError(f"checkpoint {source} cannot be read: {error}") from None
    step: int = about["step"]
    return step


def _known_to(before: Plan, plan: Plan, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """The part of ``state`` that a checkpoint of ``before`` has, and the rows that it lacks, by name.

    Raises:
        InputError: a table is gone, shorter, or of another width or type.
    """
    for old in before.table_plans:
        new = plan.tables.get(old.name)
        if new is None or (new.dim, new.dtype) != (old.dim, old.dtype) or new.rows < old.rows:
            found = "gone" if new is None else f"{new.rows} x {new.dim} {new.dtype}"
            raise InputError(
                f"table {old.name!r} was {old.rows} x {old.dim} {old.dtype} when it was saved and is {found} in the "
                "plan; tables may only have gained rows"
            )
    known, grown = {}, {}
    tables = {_collection_name(table): table for table in plan.table_plans}
    for key, value in state.items():
        path = key.split("/")[1] if key.startswith("optimizer/") else key
        table = tables.get(path.removesuffix(".weight").rpartition(".")[2])
        old_table = before.tables.get(table.name) if table is not None else None
        if table is None or not value.shape or value.shape[0] != table.rows:  # Adam's step counts no rows
            known[key] = value
        elif old_table is not None:
            known[key] = value
            if table.rows > old_table.rows:
                grown[key] = table.rows - old_table.rows
    return known, grown


def _collection_name(table: TablePlan) -> str:
    """A table's name in its embedding collection, as it stands in the names of parameters."""
    parts = table.parameter.split(".")
    return parts[-2] if len(parts) > 1 else table.name


def read_latest(folder: str | Path) -> dict[str, Any]:
    """Step, folder and model of the last whole checkpoint; raises InputError when ``latest`` names none."""
    path = Path(folder) / LATEST
    about = read_json(path, "checkpoint")
    if (
        not isinstance(about, dict)
        or type(about.get("step")) is not int
        or about.get("folder") != f"step-{about['step']:09d}"
        or not isinstance(about.get("model"), str)
    ):
        raise InputError(f"{path} does not name a checkpoint; it was edited or damaged")
    return about


def model_state(plan: Plan, sharded: ShardedModel) -> dict[str, Any]:
    """Every tensor of model and optimizers under its name before sharding; loading writes into them."""
    split = [t.name for t in plan.table_plans if len({shard.col for shard in t.shards}) > 1]
    if split and plan.workload.optimizer == "rowwise_adagrad":
        raise InputError(
            f"table {split[0]!r} is split by columns under row-wise Adagrad: each block keeps states of its own "
            "and the table has none to save; compile without allow_state_split"
        )
    state: dict[str, Any] = dict(sharded.module.state_dict())
    for path, slots in sharded.module.fused_optimizer.state_dict()["state"].items():
        found = {slot.rpartition(".")[2]: value for slot, value in slots.items()}
        found = {slot: value for slot, value in found.items() if slot.startswith("momentum")}
        for slot, value in found.items():
            state[f"optimizer/{path}/{_FUSED[len(found)][slot]}"] = value
    of_parameter = {id(parameter): path for path, parameter in sharded.module.named_parameters()}
    for optimizer in sharded.optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            for slot, value in _slots(optimizer, parameter):
                state[f"optimizer/{of_parameter[id(parameter)]}/{slot}"] = value
    return state


def _slots(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """State tensors of one parameter; made, as before a first step, where the optimizer has none yet."""
    import torch

    from codegen.runtime.optimizers import BlockRowWiseAdagrad

    kept = optimizer.state[parameter]
    if isinstance(optimizer, BlockRowWiseAdagrad):
        kept.setdefault("sum", [parameter.new_zeros(parameter.shape[0], 1)])
        yield "sum", kept["sum"][0].view(-1)  # one state a row, as the fused kernel keeps it
        return
    if not kept and isinstance(optimizer, torch.optim.Adam):
        kept["step"] = torch.tensor(0.0)
        kept["exp_avg"] = torch.zeros_like(parameter)
        kept["exp_avg_sq"] = torch.zeros_like(parameter)
    for slot, value in kept.items():
        # Adagrad counts steps for a decay of the learning rate that is not used; fused kernels do not count
        if isinstance(value, torch.Tensor) and not (
            slot == "step" and isinstance(optimizer, torch.optim.Adagrad)
        ):
            yield slot, value
