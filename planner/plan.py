"""The plan with its verbs: what people call on the result of :func:`planner.compile`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ir.plan
from ir.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from planner.zoo import ZooModel


class Plan(ir.plan.Plan):
    """A compiled plan (fields: :class:`ir.plan.Plan`). Printing it shows the summary."""

    __slots__ = ()

    def __str__(self) -> str:
        from planner.render import summary, to_text

        return to_text(summary(self))

    def explain(self, table: str | None = None, rank: int | None = None) -> str:
        """Why: the whole plan, one table, or one rank; raises InputError for an unknown name."""
        from planner.explain import explain_plan, explain_rank, explain_table
        from planner.render import to_text

        if table is not None:
            return to_text(explain_table(self, table))
        if rank is not None:
            return to_text(explain_rank(self, rank))
        return to_text(explain_plan(self))

    def diff(self, other: ir.plan.Plan) -> str:
        """What ``other`` changes with respect to this plan."""
        from planner.diff import diff_plans
        from planner.diff_render import render_diff
        from planner.render import to_text

        return to_text(render_diff(diff_plans(self, other)))

    def to_torchrec(self, module: nn.Module | ZooModel, **kwargs: Any) -> Any:
        """A ``torchrec.distributed.types.ShardingPlan`` for ``module`` (of a zoo model, for its module).

        Raises:
            InputError: the plan is not for this module, or TorchRec would run it wrongly.
        """
        from codegen.torchrec import to_torchrec

        return to_torchrec(self, module_of(module), **kwargs)

    def apply(self, module: nn.Module | ZooModel, process_group: Any = None, **kwargs: Any) -> Any:
        """``module``, or that of a zoo model, as this plan runs it.

        With a process group: sharded by TorchRec (:func:`codegen.torchrec.sharded_model`), tables in their
        ``DataType``; where the plan compresses exchanges by error-bounded codecs, by
        :func:`codegen.compressed.compressed_model`; where towers are applied, in tower form with the plan's
        tower modules (:func:`codegen.towers.tower_model`); where it joins several of towers, deduplication, codecs,
        formats and tiers, by :func:`codegen.composed.composed_model`. Without one: in this process, in the plan's
        number formats (:func:`codegen.formats.apply`). A decoder's training plan takes the default group
        (:func:`codegen.llm.parallel_model`), its serving plan too (:func:`codegen.serving.served_decoder`).
        """
        model = module_of(module)
        if self.decisions.parallelism is not None:
            from codegen.llm import parallel_model

            return parallel_model(self, model)
        if self.decisions.serving is not None:
            from codegen.serving import served_decoder

            return served_decoder(self, model)
        if process_group is None:
            from codegen.formats import apply

            return apply(self, model, **kwargs)
        from codegen.execution import executed

        towers = self.decisions.towers
        if towers is not None and towers.applied:
            from planner.zoo.multi_tower import with_towers

            model = with_towers(model, towers)
        return executed(self, model, process_group, **kwargs)

    def _repr_html_(self) -> str:
        from planner.render import summary, to_html

        return to_html(summary(self))


def module_of(model: Any) -> Any:
    """The ``nn.Module`` to work on: a module itself, or the one of a zoo model; raises InputError for anything else."""
    from torch import nn

    module = getattr(model, "module", None) if not isinstance(model, nn.Module) else model
    if not isinstance(module, nn.Module):
        raise InputError(
            f"a {type(model).__name__} is no model; pass an nn.Module or what planner.zoo.build() returns"
        )
    return module
