"""Serving of decoders at the front door: what the passes are given."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ir.llm import DecoderModel
from ir.program import Mode
from ir.workload import Workload

if TYPE_CHECKING:
    from cost_models.calibration import Calibration
    from passes.base import Pass


def serving_pipeline(calibration: Calibration | None = None) -> tuple[Pass, ...]:
    """The passes that plan how a decoder is served, with :func:`cost_models.serving_calibration.serving_rates`."""
    from passes.serving import ServeDecoder

    return (ServeDecoder(calibration=calibration),)


def serving_inputs(
    model: DecoderModel, given: Workload | None, own: Workload | None, mode: Mode
) -> tuple[DecoderModel, Workload]:
    """The model as captured, and a workload without a training step: requests come as ``constraints.serving``."""
    origin = "constraints.serving, else the defaults of ir.serving.ServingRequest"
    return model, replace(given or own or Workload(), llm=None, origin=origin)
