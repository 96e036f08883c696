"""Linear layers that change their width in training, with the optimizer's state.

A pruned layer is a smaller dense layer, not a masked one: its weight, its gradient and its optimizer
state have only the units that are kept, so forward, backward and update cost what their sizes say.
What a removed unit had learnt (weights and state) is kept aside at full size. When the unit comes back it
recovers all of that, or only its incoming weights. In the second case its outgoing weights are zero,
so the function of the model does not jump (as in Net2Net, Chen et al. 2016, arXiv 1511.05641); their momentum is zero too,
and their mean squares of gradients are those of the weights beside them: optimizers correct for a zero start by the
number of steps, which a returning weight does not start anew, so that Adam (0.9, 0.999) would move it by 3.2 learning
rates in its first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ir.errors import InputError
from ir.growth import PrunedLayer

# state of torch.optim's Adam, AdamW, Adagrad and RMSprop that adds up or averages squares of gradients
SQUARES = frozenset({"exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg"})


@dataclass
class _Store:
    """A parameter at full size: its value, and each tensor of its optimizer state of the same shape."""

    value: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)

    def renew(self, columns: Tensor, beside: Tensor) -> None:
        """Start some columns at zero, their mean squares at the mean of those ``beside``."""
        self.value[:, columns] = 0
        for name, tensor in self.state.items():
            known = tensor[:, beside].mean(1, keepdim=True) if name in SQUARES else 0
            tensor[:, columns] = known


class Resizer:
    """Changes the width of hidden layers of ``model`` and keeps ``optimizer`` in step.

    Args:
        model: the whole model, at full size.
        layers: what may shrink; of a plan, ``plan.decisions.growth.layers``.
        optimizer: holds the parameters of those layers; None where there is none.
        recover: a unit that returns reaches the layers above with the weights it left with; otherwise with zeros.

    Raises:
        InputError: a layer that the model does not have, or of another width.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[PrunedLayer],
        optimizer: torch.optim.Optimizer | None = None,
        *,
        recover: bool = True,
    ) -> None:
        self.layers, self.optimizer, self.recover = tuple(layers), optimizer, recover
        self.rows = {layer.producer: i for i, layer in enumerate(layers)}
        self.columns = {name: i for i, layer in enumerate(layers) for name in layer.consumers}
        self.modules = {name: _linear(model, name) for name in {**self.rows, **self.columns}}
        for layer in layers:
            for name, width in (
                (layer.producer, self.modules[layer.producer].out_features),
                *((name, self.modules[name].in_features) for name in layer.consumers),
            ):
                if width != layer.units:
                    raise InputError(f"layer {name!r} has {width} units where the plan has {layer.units}")
        self.kept = [torch.arange(layer.units) for layer in layers]
        self._used: dict[str, Tensor] = {}
        self.stores = {
            name: {key: _Store(p.detach().clone()) for key, p in module.named_parameters()}
            for name, module in self.modules.items()
        }

    def resize(self, counts: Sequence[int]) -> None:
        """Keep ``counts[i]`` units of layer i: prune the least important, or grow the best that were removed.

        Raises:
            InputError: a count below 1 or above the layer's units.
        """
        for layer, count in zip(self.layers, counts, strict=True):
            if not 1 <= count <= layer.units:
                raise InputError(
                    f"layer {layer.producer!r} has {layer.units} units; it cannot keep {count} of them"
                )
        self._write_back()
        scores = [self.importance(i) for i in range(len(self.layers))]
        self.keep([_choose(s, kept, count) for s, kept, count in zip(scores, self.kept, counts, strict=True)])

    def keep(self, kept: Sequence[Tensor]) -> None:
        """Keep exactly these units of each layer (ascending indices)."""
        self._write_back()
        for i, now in enumerate(kept):
            back = now[~torch.isin(now, self.kept[i])]
            for name in self.layers[i].consumers if len(back) and not self.recover else ():
                self.stores[name]["weight"].renew(back, self.kept[i])
        self.kept = list(kept)
        self._take()

    def whole(self) -> dict[str, Tensor]:
        """Parameters and optimizer state at full size, removed units with what they left with.

        ``PATH`` and ``optimizer/PATH/SLOT`` as in checkpoints, and ``growth/LAYER`` the units in use of each layer that is
        not whole. Writing into them takes effect with :meth:`restore`.
        """
        self._write_back()
        found: dict[str, Tensor] = {}
        for name, stores in self.stores.items():
            for key, store in stores.items():
                found[f"{name}.{key}"] = store.value
                found |= {f"optimizer/{name}.{key}/{slot}": state for slot, state in store.state.items()}
        self._used = {
            layer.producer: torch.zeros(layer.units, dtype=torch.uint8).index_fill_(0, kept.cpu(), 1)
            for layer, kept in zip(self.layers, self.kept, strict=True)
            if len(kept) < layer.units
        }
        return found | {f"growth/{name}": used for name, used in self._used.items()}

    def restore(self) -> None:
        """Take up what was written into the tensors of :meth:`whole`.

        Raises:
            InputError: another number of units is in use than before.
        """
        for i, layer in enumerate(self.layers):
            if layer.producer in self._used:
                kept = self._used[layer.producer].nonzero().view(-1)
                if len(kept) != len(self.kept[i]):
                    raise InputError(
                        f"layer {layer.producer!r} had {len(kept)} units in use when it was saved, and the phase has "
                        f"{len(self.kept[i])}; go on with the growth section that it was trained with"
                    )
                self.kept[i] = kept
        self._take()

    def importance(self, layer: int) -> Tensor:
        """Of each unit: norm of its incoming weights times norm of its outgoing weights, when last active."""
        one = self.layers[layer]
        incoming = self.stores[one.producer]["weight"].value
        outgoing = torch.cat([self.stores[name]["weight"].value for name in one.consumers])
        scores: Tensor = incoming.norm(dim=1) * outgoing.norm(dim=0)
        return scores

    def _indices(self, name: str, key: str) -> tuple[Tensor, ...]:
        """Which rows (and columns) of the full parameter are active."""
        module = self.modules[name]
        full = self.stores[name][key].value
        rows = self.kept[self.rows[name]] if name in self.rows else torch.arange(full.shape[0])
        if key == "bias":
            return (rows.to(module.weight.device),)
        cols = self.kept[self.columns[name]] if name in self.columns else torch.arange(full.shape[1])
        return rows[:, None].to(module.weight.device), cols[None].to(module.weight.device)

    def _write_back(self) -> None:
        """What the active units have learnt, into the full-size copies."""
        for name, module in self.modules.items():
            for key, parameter in module.named_parameters():
                store, where = self.stores[name][key], self._indices(name, key)
                store.value[where] = parameter.detach()
                for field_, tensor in self._state(parameter).items():
                    full = store.state.setdefault(field_, torch.zeros_like(store.value, dtype=tensor.dtype))
                    full[where] = tensor

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The optimizer's tensors that have an entry for each weight."""
        held = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
        return {
            key: value
            for key, value in held.items()
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.ndim
        }

    def _take(self) -> None:
        """Make the active part of each full-size copy the parameter."""
        for name, module in self.modules.items():
            for key, parameter in list(module.named_parameters()):
                store, where = self.stores[name][key], self._indices(name, key)
                smaller = nn.Parameter(store.value[where].clone(), requires_grad=parameter.requires_grad)
                setattr(module, key, smaller)
                self._replace(parameter, smaller, {k: full[where].clone() for k, full in store.state.items()})
            module.out_features, module.in_features = module.weight.shape

    def _replace(self, old: nn.Parameter, new: nn.Parameter, state: dict[str, Tensor]) -> None:
        """The optimizer's groups and state name the new parameter; counters of steps stay."""
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        held = self.optimizer.state.pop(old, None)
        if held is not None:
            self.optimizer.state[new] = {**held, **state}


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise InputError(f"the model has no layer {name!r}; compile the plan for this model") from None
    if not isinstance(module, nn.Linear):
        raise InputError(f"{name!r} is a {type(module).__name__}; only linear layers change their width")
    return module


def _choose(scores: Tensor, kept: Tensor, count: int) -> Tensor:
    """``count`` units: of the active ones the best, and if those are too few, the best of the others too."""
    active = torch.zeros(len(scores), dtype=torch.bool)
    active[kept] = True
    # active units first when growing, so that no active unit makes room for a removed one
    order = torch.argsort(scores.cpu() + (scores.max().cpu() + 1) * active, descending=True, stable=True)
    return order[:count].sort().values
