"""What the front door adds for towers: pricing the over-arch of a model, sampling its embeddings, text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from ir.plan import Plan
from ir.units import format_bytes, format_count, format_seconds
from planner.render import grid

if TYPE_CHECKING:
    from torch import nn

    from ir.program import Model
    from ir.tower_sample import PooledSample
    from passes.base import Pass


def price_over_arch(passes: Sequence[Pass], model: Any) -> tuple[Pass, ...]:
    """The passes, the tower pass among them told what modules leave of a zoo model's interaction.

    ``model`` is what :func:`planner.compile` was given; the model is built again only if that is asked.
    """
    from passes.towers import Towers

    def over_arch(vectors: int, dim: int) -> Model:
        from planner.zoo import build
        from planner.zoo.multi_tower import over_arch_model

        flat: Any = build(model).module if isinstance(model, str) else model
        return over_arch_model(flat, vectors, dim)

    if not _is_zoo(model):
        return tuple(passes)
    return tuple(
        replace(p, over_arch=over_arch) if isinstance(p, Towers) and p.over_arch is None else p
        for p in passes
    )


def _is_zoo(model: Any) -> bool:
    if isinstance(model, str):
        from planner.zoo import zoo_names

        return model in zoo_names()
    # by name: looking at the class must not import torch
    return type(model).__module__ == "planner.zoo.dlrm"


def sample_pooled(module: nn.Module, batches: Iterable[Any], limit: int = 4096) -> PooledSample:
    """The pooled embeddings of a trained model on real batches, for ``constraints.towers.interactions``.

    Args:
        module: holds one ``EmbeddingBagCollection``.
        batches: ``KeyedJaggedTensor`` of ids.
        limit: samples to keep.

    Raises:
        InputError: the module has no collection or several, or there are fewer than two samples.
    """
    import numpy as np
    import torch

    from ir.capture_embeddings import is_pooled_collection
    from ir.errors import InputError
    from ir.tower_sample import PooledSample

    found: list[Any] = [part for part in module.modules() if is_pooled_collection(part)]
    if len(found) != 1:
        raise InputError(f"the model has {len(found)} EmbeddingBagCollections; towers need one")
    collection = found[0]
    configs = collection.embedding_bag_configs()
    features = tuple(name for config in configs for name in config.feature_names)
    dims = tuple(config.embedding_dim for config in configs for _ in config.feature_names)
    parts, kept = [], 0
    with torch.no_grad():
        for ids in batches:
            pooled = collection(ids)
            parts.append(torch.cat([pooled[name] for name in features], dim=1).float().cpu().numpy())
            kept += len(parts[-1])
            if kept >= limit:
                break
    if kept < 2:
        raise InputError("there are fewer than two samples to measure interactions on; pass real batches")
    return PooledSample(features, dims, np.concatenate(parts)[:limit])


def render_towers(plan: Plan) -> RenderableType:
    """The tower section as text: the verdict, the steps compared, the towers."""
    section = plan.decisions.towers
    assert section is not None
    lines: list[RenderableType] = [
        Text(f"towers: {len(section.towers)}, {section.objective}, module {section.module}", style="bold"),
        Text(f"{'applied' if section.applied else 'not applied'}: {section.reason}"),
    ]
    if section.affinity is not None:
        rival = f"; scaling and k-means reach {section.affinity.rival:.4g}" if section.affinity.rival else ""
        lines.append(
            Text(
                f"interaction within towers {section.affinity.value:.4g}, at most {section.affinity.bound:.4g} "
                f"({section.affinity.method}): gap {100 * section.affinity.gap:.1f} %{rival}"
            )
        )
    if section.energy_lost is not None:
        lines.append(
            Text(f"energy of the embeddings that the modules cannot carry: {section.energy_lost:.2%}")
        )
    steps = grid("form", ">step", ">to other hosts, busiest rank")
    for name, seconds in section.steps.items():
        steps.add_row(name, format_seconds(seconds), format_bytes(section.cross_host_bytes[name]))
    table = grid("tower", ">ranks", ">tables", ">memory", ">columns", ">sent", ">ratio", ">params", ">FLOP")
    for number, tower in enumerate(section.towers):
        table.add_row(
            str(number),
            f"{tower.first_rank}-{tower.first_rank + tower.ranks - 1}",
            str(len(tower.tables)),
            format_bytes(tower.memory),
            str(tower.width),
            str(tower.width_out),
            f"{tower.compression:.2g}",
            format_count(tower.params),
            format_count(tower.flops),
        )
    return Group(*lines, Text(), steps, Text(), table)
