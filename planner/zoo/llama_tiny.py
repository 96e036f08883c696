"""A Llama small enough to train on a laptop in every kind of parallelism that a plan can hold."""

from __future__ import annotations

from dataclasses import replace

import torch

from ir.workload import Workload
from planner.zoo.llama import Llama, build_llama


def build_llama_tiny(
    *,
    layers: int = 8,
    hidden: int = 64,
    ffn: int = 192,
    heads: int = 8,
    kv_heads: int = 4,
    vocab: int = 256,
    sequence: int = 64,
    global_tokens: int = 1024,
    device: str | torch.device = "meta",
) -> tuple[Llama, Workload]:
    """Sizes as :func:`planner.zoo.llama.build_llama`; computed in fp32 with plain SGD."""
    module, workload = build_llama(
        layers=layers,
        hidden=hidden,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        vocab=vocab,
        sequence=sequence,
        global_tokens=global_tokens,
        device=device,
    )
    assert workload.llm is not None
    return module, replace(
        workload,
        optimizer="sgd",
        compute_dtype="fp32",
        exchange_dtype="fp32",
        origin="a small Llama to run on this machine",
        llm=replace(workload.llm, dtype="fp32", optimizer="sgd"),
    )
