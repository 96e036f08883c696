"""A serving plan as a configuration file of ``vllm serve`` 0.33.0 (YAML).

Keys are vLLM's arguments: fields of its ``ParallelConfig`` and ``CacheConfig`` with dashes. The rules between
tensor, prefill-context and decode-context sizes are those of vLLM 0.33.0 for grouped-query attention.
"""

from __future__ import annotations

import json

from codegen.emission import Emission, heading, plain
from ir.errors import InputError
from ir.plan import Plan
from ir.serving import Serving

VERSION = "0.33.0"


def emit_vllm(plan: Plan) -> Emission:
    """The YAML file of a serving plan; raises InputError where the plan does not serve a decoder."""
    made = plan.decisions.serving
    if made is None:
        raise InputError(
            f"vLLM takes a decoder's serving plan, and that of {plan.model.name!r} is none; compile a decoder such as "
            "llama3-8b with mode='inference'"
        )
    layout, request = made.chosen.layout, made.request
    values: dict[str, object] = {
        "tensor-parallel-size": layout.tensor,
        "pipeline-parallel-size": layout.pipeline,
        "prefill-context-parallel-size": layout.context,
        "decode-context-parallel-size": decode_context(made),
        "data-parallel-size": made.replicas,
        "kv-cache-dtype": {"bf16": "bfloat16", "fp8": "fp8_e4m3"}[layout.cache],
        "enable-prefix-caching": request.cached > 0,
    }
    if layout.weights == "fp8_row":
        values["quantization"] = "fp8_per_channel"
    limits = _limits(made)
    lines = heading(plan, f"vLLM {VERSION}", limits)
    lines.insert(1, f"# {layout.label}")
    lines += [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    return Emission("\n".join(lines) + "\n", limits, f"vllm serve {plain(plan.model.name)} --config {{path}}")


def decode_context(made: Serving) -> int:
    """The largest decode-context size up to the plan's that vLLM takes beside its tensor and context ranks.

    Of 1, PCP and TP x PCP (PCP > 1), DCP must be at most TP / key-value heads, which grouped-query models with as
    many key-value heads as tensor ranks never allow.
    """
    layout, model = made.chosen.layout, made.model
    copies = layout.tensor // model.kv_heads
    size = layout.context
    allowed = size == 1 or (
        layout.tensor > model.kv_heads and size <= copies and model.heads // model.kv_heads % size == 0
    )
    return size if allowed else 1


def _limits(made: Serving) -> tuple[str, ...]:
    layout, request = made.chosen.layout, made.request
    length = request.new + request.cached + request.output
    said = [f"the model's and the scheduler's own: --max-model-len {length} --max-num-seqs {request.batch}"]
    if layout.context > 1:
        said.append(f"which ring: the plan attends by {made.chosen.exchange}, vLLM chooses for itself")
        if decode_context(made) == 1:
            said.append(
                f"vLLM cannot split the cache of {made.model.kv_heads} key-value heads over {layout.context} context ranks "
                f"at tensor {layout.tensor}: each holds all of it, so decoding needs more memory than planned"
            )
    if layout.weights == "fp8_row":
        said.append(
            "fp8_per_channel quantises every linear layer; the plan keeps attention and the first and last layer in "
            "bf16: name the feed-forward layers in quantization_config targets"
        )
    return tuple(said)
