"""A plan's deduplication as code: what turns a batch into what the plan's collections take."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ir.errors import InputError
from ir.plan import Plan
from ir.torchrec_rules import deduplication_excludes

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def deduplicator(plan: Plan) -> Callable[[KeyedJaggedTensor], KeyedJaggedTensor]:
    """A function from a rank's batch to the deduplicated batch that the plan was priced for.

    Run it in the data loader. The result has a stride per key and inverse indices; TorchRec's collections
    return pooled embeddings of all samples for it, so the model stays as it is.

    Raises:
        InputError: the plan deduplicates nothing, or holds tables of a type that TorchRec cannot feed so.
    """
    from codegen.runtime.dedup.ikjt import InverseKeyedJaggedTensor

    section = plan.decisions.dedup
    if section is None or not section.chosen:
        raise InputError("the plan deduplicates no feature; compile it with the workload's sessions")
    refused = deduplication_excludes(plan.topology.device.kind)
    for table in plan.table_plans:
        if table.sharding_type in refused:
            raise InputError(
                f"table {table.name!r} is {table.sharding_type}, which TorchRec cannot feed with deduplicated "
                f"batches on a {plan.topology.device.kind}; compile again without it"
            )
    groups = [group.features for group in section.chosen]

    def deduplicate(batch: KeyedJaggedTensor) -> KeyedJaggedTensor:
        known = set(batch.keys())
        mine = [kept for group in groups if (kept := [f for f in group if f in known])]
        return InverseKeyedJaggedTensor.from_kjt(batch, mine).to_torchrec()

    return deduplicate
