"""A plan with a growth section as one training: layers resize, and tables move when a phase shards them otherwise."""

from __future__ import annotations

import copy
import gc
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from codegen.checkpoint_state import model_state
from codegen.collectives import send_scheduled
from codegen.execution import form_of
from codegen.growth import phase_plan
from codegen.torchrec import ShardedModel, sharded_model
from codegen.torchrec_check import collections_of
from ir.errors import InputError
from ir.plan import Plan

if TYPE_CHECKING:
    import torch
    from torch import nn


_OPERANDS = ("weight", "activation")


class PhasedModel:
    """``module`` on the ranks of a process group, phase by phase; train it as a :class:`ShardedModel`::

        model = PhasedModel(plan, module, group, lr=0.05)
        for step, batch in enumerate(batches):
            model.begin_step(step)
            model.zero_grad()
            loss(model(...)).backward()
            model.step()

    When a phase begins, hidden layers resize with the state of their optimizer, and linear layers compute in its format.
    Where the phase shards tables otherwise, or sends vectors in another type, rows and their optimizer state go from the
    ranks that hold them to those that will; both placements are in memory at that moment.

    Args:
        plan: with a growth section.
        module: at full size; consumed.
        process_group: default: the default group.
        recover: as in :class:`codegen.runtime.growth.resize.Resizer`.
        kwargs: of :func:`codegen.torchrec.sharded_model`.

    Raises:
        InputError: no growth section, or beside it towers, codecs of this project, tiers, groups of tables or a dense part
            that is split; or as :func:`sharded_model`.
    """

    def __init__(
        self, plan: Plan, module: nn.Module, process_group: Any = None, *, recover: bool = True, **kwargs: Any
    ) -> None:
        import torch.distributed as dist

        from codegen.runtime.growth.phases import PhasedTraining

        section = plan.decisions.growth
        if section is None:
            raise InputError("the plan has no growth section; compile with constraints.growth")
        _refuse(plan, kwargs.get("optimizer") or plan.workload.optimizer)
        self.plan, self.section, self.kwargs = plan, section, kwargs
        self.group = process_group if process_group is not None else dist.group.WORLD
        self.received = 0  # bytes that this rank got from others when phases began
        self._formats = _LayerFormats(plan, module)
        self._bare = {c.path: copy.deepcopy(c.module).to("meta") for c in collections_of(module)}
        self._sharded = self._shard(module, 0)
        self._phases = PhasedTraining(section, self._sharded.module.module, self._dense(), recover=recover)
        self._wrap_anew()

    @property
    def phase(self) -> int:
        """The phase that the model is in."""
        return self._phases.phase

    @property
    def module(self) -> Any:
        """The ``DistributedModelParallel`` of the phase."""
        return self._sharded.module

    @property
    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """Of what no fused kernel updates, in the phase."""
        return self._sharded.optimizers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass on this rank's slice of the batch."""
        return self._sharded(*args, **kwargs)

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self._sharded.zero_grad()

    def step(self) -> None:
        """Apply the gradients of the backward pass that has just run."""
        self._sharded.step()

    def begin_step(self, step: int) -> bool:
        """Enter the phase of ``step``, all ranks together; whether one began.

        Raises:
            InputError: a step of a phase that is over.
        """
        before = self.section.phases[self._phases.phase]
        if not self._phases.begin_step(step):
            return False
        now = self.section.phases[self._phases.phase]
        self._formats.enter(self._phases.phase)
        if (now.sharding, now.exchange_dtype) == (before.sharding, before.exchange_dtype):
            self._wrap_anew()
        else:
            self._move(self._phases.phase)
        return True

    def enter(self, phase: int) -> None:
        """Enter a phase without its training, to be read into; raises InputError where the plan has no such phase."""
        if phase >= len(self.section.phases):
            raise InputError(f"the plan has phases 0..{len(self.section.phases) - 1}, not {phase}")
        self.begin_step(sum(one.steps for one in self.section.phases[:phase]))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: tables and their state as they lie, layers that resize at full size."""
        sharded = model_state(phase_plan(self.plan, self.phase), self._sharded)
        return sharded | self._phases.resizer.whole()

    def restore(self) -> None:
        """Take up layers that were written into the tensors of :meth:`state`."""
        self._phases.resizer.restore()
        self._wrap_anew()

    def _shard(self, module: nn.Module, phase: int) -> ShardedModel:
        plan = self._formats.left_out(phase_plan(self.plan, phase))
        return sharded_model(plan, module, self.group, **self.kwargs)

    def _dense(self) -> torch.optim.Optimizer:
        """The optimizer that holds the layers that resize."""
        layer: Any = self._sharded.module.module.get_submodule(self.section.layers[0].producer)
        return next(
            optimizer
            for optimizer in self._sharded.optimizers
            if any(p is layer.weight for group in optimizer.param_groups for p in group["params"])
        )

    def _wrap_anew(self) -> None:
        """The dense part under a fresh wrapper: buckets of gradients name the old parameters."""
        wrapped = self._sharded.module
        wrapped._dmp_wrapped_module = wrapped.module
        gc.collect()  # the old wrapper's hooks would reduce the gradients that are left to it once more
        wrapped._data_parallel_wrapper.wrap(wrapped, wrapped._env, wrapped.device)
        send_scheduled(self.plan, wrapped, self.group)

    def _move(self, phase: int) -> None:
        """Tables into the sharding of a phase; the dense part keeps its tensors and their state."""
        from codegen.runtime.reshard import reshard

        old, dense = self._sharded, self._dense()
        inner: Any = old.module.module
        held = self._of_tables(model_state(self.plan, old))
        for path, bare in self._bare.items():
            inner.set_submodule(path, copy.deepcopy(bare))
        self._sharded = self._shard(inner, phase)
        self.received += reshard(held, self._of_tables(model_state(self.plan, self._sharded)), self.group)
        now = self._dense()
        for group in now.param_groups:
            for parameter in group["params"]:
                if parameter in dense.state:
                    now.state[parameter] = dense.state[parameter]
        self._phases.resizer.optimizer = now
        del old, held, dense
        gc.collect()  # as in _wrap_anew; and two placements are held no longer than they must

    def _of_tables(self, state: dict[str, Any]) -> dict[str, Any]:
        tables = tuple(f"{path}.".lstrip(".") for path in self._bare)
        return {
            key: value for key, value in state.items() if key.removeprefix("optimizer/").startswith(tables)
        }


class _LayerFormats:
    """What the linear layers of a model compute in, phase by phase. They stay the same modules, for those who resize them.

    Layers of a phase with a format of its own compute in it both ways; otherwise as the plan's formats say.
    """

    def __init__(self, plan: Plan, module: nn.Module) -> None:
        from codegen.formats import sites
        from codegen.runtime.format_modules import FormatLinear, GemmFormats, replace_modules

        assert plan.decisions.growth is not None
        self.phases = [phase.gemm_format for phase in plan.decisions.growth.phases]
        decided = plan.decisions.formats
        chosen = {} if decided is None else {t.name: t.format for t in decided.tensors if t.kind in _OPERANDS}
        self.layers: dict[str, Any] = {}
        if not any(self.phases) and set(chosen.values()) <= {"fp32"}:
            return
        for site in sites(module).values():
            if site.kind == "weight":
                source: Any = module.get_submodule(site.path)
                narrow = [
                    chosen.get(site.name.replace(".weight", end), "fp32") for end in (".weight", ".input")
                ]
                self.layers[site.path] = FormatLinear.of(source, GemmFormats(*narrow))
        self.own = {path: layer.formats for path, layer in self.layers.items()}
        replace_modules(module, self.layers)
        self.enter(0)

    def enter(self, phase: int) -> None:
        """Compute as the phase says."""
        from codegen.runtime.format_modules import GemmFormats

        format = self.phases[phase]
        for path, layer in self.layers.items():
            layer.formats = self.own[path] if format is None else GemmFormats(format, format, format)

    def left_out(self, plan: Plan) -> Plan:
        """The plan without formats of layers, which would be put in anew."""
        decided = plan.decisions.formats
        if decided is None:
            return plan
        rest = tuple(tensor for tensor in decided.tensors if tensor.kind not in _OPERANDS)
        return replace(plan, decisions=replace(plan.decisions, formats=replace(decided, tensors=rest)))


def _refuse(plan: Plan, optimizer: str) -> None:
    dense, section = plan.decisions.dense, plan.decisions.growth
    if section is not None and section.shardings and optimizer == "rowwise_adagrad":
        for phase in range(len(section.phases)):
            for table in phase_plan(plan, phase).table_plans:
                if len({shard.col for shard in table.shards}) > 1:
                    raise InputError(
                        f"table {table.name!r} is split by columns in phase {phase}, and row-wise Adagrad keeps states of "
                        "its blocks that cannot move between phases; compile growth without allow_state_split"
                    )
    if form_of(plan) != "torchrec":
        raise InputError(
            "phases of growth run beside TorchRec's tables; compile without towers, error-bounded codecs and tiers"
        )
    if dense is not None and (dense.shard > 1 or dense.tensor > 1 or dense.sparse is not None):
        raise InputError(
            "layers that are split over ranks cannot be resized, nor can groups of tables move; compile growth without "
            "constraints.dense"
        )
