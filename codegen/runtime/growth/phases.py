"""The phases of a plan's growth section, followed while training."""

from __future__ import annotations

from torch import nn, optim

from codegen.runtime.growth.resize import Resizer
from ir.errors import InputError
from ir.growth import Growth


class PhasedTraining:
    """Resizes a model when a phase begins.

    Every rank that holds the same weights chooses the same units. Wrappers that keep references to
    parameters (DistributedDataParallel) are made anew when :meth:`begin_step` says so::

        phases = PhasedTraining(plan.decisions.growth, module, optimizer)
        for step, batch in enumerate(batches):
            if phases.begin_step(step):
                model = DistributedDataParallel(module)

    Args:
        section: of a plan.
        model: unwrapped, at full size.
        optimizer: of its dense part.
        recover: as in :class:`Resizer`.
    """

    def __init__(
        self, section: Growth, model: nn.Module, optimizer: optim.Optimizer | None, *, recover: bool = True
    ) -> None:
        self.section = section
        self.resizer = Resizer(model, section.layers, optimizer, recover=recover)
        self.phase = 0
        self._starts = [0]
        for phase in section.phases:
            self._starts.append(self._starts[-1] + phase.steps)
        self.resizer.resize(section.phases[0].kept)

    def begin_step(self, step: int) -> bool:
        """Enter the phase of ``step``; whether the model's parameters were replaced.

        Raises:
            InputError: a step before the current phase (a resized model cannot go back).
        """
        if step < self._starts[self.phase]:
            raise InputError(
                f"step {step} lies before phase {self.phase}, which began at {self._starts[self.phase]}"
            )
        changed = False
        while self.phase + 1 < len(self.section.phases) and step >= self._starts[self.phase + 1]:
            self.phase += 1
            self.resizer.resize(self.section.phases[self.phase].kept)
            changed = True
        return changed
