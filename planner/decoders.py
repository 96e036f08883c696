"""Decoders at the front door: what they are fed, and the passes that plan them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ir.constraints import Constraints
from ir.decoder import LlmWorkload
from ir.errors import InputError
from ir.llm import DecoderModel
from ir.program import Mode
from ir.workload import DEFAULT_GLOBAL_BATCH, Workload

if TYPE_CHECKING:
    from cost_models.calibration import Calibration
    from passes.base import Pass


def decoder_pipeline(calibration: Calibration | None = None) -> tuple[Pass, ...]:
    """The passes that plan the training of a decoder."""
    from passes.llm_parallelism import LlmParallelism

    return (LlmParallelism(calibration),)


def decoder_inputs(
    model: DecoderModel, given: Workload | None, own: Workload | None, mode: Mode
) -> tuple[DecoderModel, Workload]:
    """The records for the sequence length in force, and the workload with its batch in sequences.

    Raises:
        InputError: tokens that are no whole number of sequences, a batch that contradicts them, or serving.
    """
    if mode != "train":
        raise InputError(f"only training is planned for a decoder such as {model.name!r}; use mode='train'")
    chosen = given or own or Workload()
    stated = given is not None and given.global_batch != DEFAULT_GLOBAL_BATCH
    fed = chosen.llm
    if fed is None:
        sequence = LlmWorkload().sequence
        fed = LlmWorkload(sequence, given.global_batch * sequence) if given and stated else LlmWorkload()
    elif stated and chosen.global_batch != fed.sequences:
        raise InputError(
            f"global_batch {chosen.global_batch} contradicts llm.global_tokens {fed.global_tokens}, which are "
            f"{fed.sequences} sequences of {fed.sequence} tokens; state the tokens (--global-tokens) only"
        )
    work = replace(
        chosen,
        global_batch=fed.sequences,
        optimizer=fed.optimizer,
        compute_dtype=fed.dtype,
        exchange_dtype=fed.dtype,
        llm=fed,
    )
    return model.at(fed.sequence), work


def with_tokens(work: Workload | None, sequence: int | None, tokens: int | None) -> Workload | None:
    """The workload with the sequence length and the tokens of the command line."""
    if sequence is None and tokens is None:
        return work
    base = work.llm if work is not None and work.llm is not None else LlmWorkload()
    fed = replace(base, sequence=sequence or base.sequence, global_tokens=tokens or base.global_tokens)
    return replace(work or Workload(origin="command line"), llm=fed, global_batch=fed.sequences)


def refuse_tensor_constraints(constraints: Constraints) -> None:
    """Raise InputError for formats and tiers of single tensors, which are planned for other models only."""
    if constraints.formats is not None:
        raise InputError(
            "constraints.formats chooses a format for each tensor of a recommender or another traced model; a "
            "decoder is served in those of constraints.serving (weights, cache)"
        )
    if constraints.tiers is not None:
        raise InputError("constraints.tiers places embedding tables, and a decoder has none; leave it out")
