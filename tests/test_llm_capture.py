"""Decoders captured: published sizes, counts against the module and torch's counter, Hugging Face's Llama."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ir.capture_llm import capture_decoder, capture_model, find_layers
from ir.errors import InputError
from ir.llm import DecoderModel
from ir.verifier import verify_program
from planner.models import resolve
from planner.zoo import build
from planner.zoo.llama import Llama, build_llama

PUBLISHED = json.loads((Path(__file__).parent.parent / "planner/data/measured/llama3.json").read_text())

SMALL: dict[str, Any] = {"layers": 3, "hidden": 64, "ffn": 160, "heads": 8, "kv_heads": 2, "vocab": 96}


@pytest.mark.parametrize("size", ["8B", "70B", "405B"])
def test_published_sizes(size: str) -> None:
    row = PUBLISHED["table3"][size]
    model = resolve(f"llama3-{size.lower()}").model
    assert isinstance(model, DecoderModel)
    module = build(f"llama3-{size.lower()}").module
    assert model.dense_params == sum(p.numel() for p in module.parameters()) == row["params"]
    assert f"{model.dense_params / 1e9:.0f}" == {"8B": "8", "70B": "71", "405B": "406"}[size]
    shape = model.shape
    assert (shape.layers, shape.hidden, shape.ffn) == (row["layers"], row["d_model"], row["ffn"])
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (row["heads"], row["kv_heads"], row["head_dim"])
    assert shape.gated
    assert len(model.attentions) == row["layers"]
    assert {(a.heads, a.kv_heads, a.causal, a.query_length, a.cached_length) for a in model.attentions} == {
        (row["heads"], row["kv_heads"], True, 8192, 0)
    }


def test_the_405b_model_is_captured_within_seconds() -> None:
    module = build("llama3-405b").module
    started = time.process_time()
    assert len(capture_decoder(module).attentions) == 126
    assert time.process_time() - started < 5


def test_flops_are_torchs_with_half_the_attention() -> None:
    """torch's counter takes attention as full; the records count the visible half of a causal mask."""
    module, _ = build_llama(**SMALL, sequence=32, global_tokens=32)
    with FlopCounterMode(display=False) as counter:
        module(*module.example_inputs(1))
    model = capture_decoder(module)
    attention = sum(op.flops for op in model.ops if op.kind == "attention")
    full = 3 * 4 * 64 * 32 * 32
    assert attention == pytest.approx(full * 33 / 64)
    assert model.dense_flops - attention + full == counter.get_total_flops()


def test_records_of_every_layer_are_those_of_the_whole_model() -> None:
    """Repeating one traced layer gives what tracing all of them gives."""
    from ir.capture import capture

    module, _ = build_llama(**SMALL, sequence=32, global_tokens=32)
    repeated, whole = capture_decoder(module), capture(module)
    assert repeated.dense_params == whole.dense_params + whole.embedding_params
    assert len(repeated.ops) == len(whole.ops)
    for mine, theirs in zip(repeated.ops, whole.ops, strict=True):
        assert (mine.module, mine.target, mine.gemm and theirs.gemm) == (
            theirs.module,
            theirs.target,
            mine.gemm,
        )
        assert mine.out_shape == (1, *theirs.out_shape[1:])
        assert len(mine.inputs) == len(theirs.inputs)


def test_the_repeated_records_are_a_valid_program() -> None:
    from ir.program import Options, Program
    from planner.presets import preset

    module, workload = build_llama(**SMALL, sequence=32, global_tokens=32)
    verify_program(Program(capture_decoder(module), preset("local-1"), workload, Options()))


def test_longer_sequences_scale_the_records() -> None:
    module, _ = build_llama(**SMALL, sequence=32, global_tokens=32)
    longer, _ = build_llama(**SMALL, sequence=96, global_tokens=96)
    scaled, direct = capture_decoder(module).at(96), capture_decoder(longer)
    assert scaled.attentions == direct.attentions
    assert scaled.dense_flops == pytest.approx(direct.dense_flops)
    for mine, theirs in zip(scaled.ops, direct.ops, strict=True):
        assert mine.activation_bytes == pytest.approx(theirs.activation_bytes)
        assert mine.out_shape == theirs.out_shape


@pytest.mark.parametrize(("ffn", "vocab", "heads"), [(64, 64, 1), (96, 64, 4), (96, 96, 4)])
def test_a_layer_may_have_matrices_of_the_vocabularys_shape(ffn: int, vocab: int, heads: int) -> None:
    sizes = {
        "layers": 2,
        "hidden": 64,
        "ffn": ffn,
        "heads": heads,
        "kv_heads": 1,
        "vocab": vocab,
        "sequence": 32,
    }
    module, _ = build_llama(**sizes, global_tokens=32)
    shape = capture_decoder(module).shape
    assert (shape.layers, shape.ffn, shape.vocab, shape.heads) == (2, ffn, vocab, heads)
    assert shape.params == sum(p.numel() for p in module.parameters())


def test_other_models_are_no_decoders() -> None:
    assert find_layers(build("dlrm-small").module) is None
    assert find_layers(nn.Sequential(nn.Linear(4, 4))) is None
    with pytest.raises(InputError, match="no decoder"):
        capture_decoder(nn.Linear(4, 4))
    assert not isinstance(capture_model(build("dlrm-small", row_cap=100).module), DecoderModel)


class Biased(Llama):
    """A Llama whose projection of queries has a bias and whose head has an extra scale."""

    def __init__(self) -> None:
        super().__init__(2, 64, 160, 8, 2, vocab=96, sequence=32)
        self.scale = nn.Parameter(torch.ones(64, 64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) + self.scale.sum()


def test_weights_that_the_planner_does_not_know_are_kept_as_vectors() -> None:
    with torch.device("meta"):
        model = capture_decoder(Biased())
    assert model.shape.outer_vectors == 64 + 64 * 64
    assert model.shape.params == model.dense_params


def hugging_face(**options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="the extra 'hf' is not installed")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=64,
        rope_theta=500_000.0,
        rms_norm_eps=1e-5,
        **options,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
def test_hugging_faces_llama_has_the_shape_of_ours(tied: bool) -> None:
    ids = torch.zeros((1, 32), dtype=torch.int64)
    theirs = hugging_face(tie_word_embeddings=tied)
    captured = capture_model(theirs, example_inputs=(ids,))
    ours = capture_decoder(build_llama(**SMALL, sequence=32, global_tokens=32)[0])
    assert isinstance(captured, DecoderModel)
    assert captured.shape.tied is tied
    assert captured.dense_params == sum(p.numel() for p in theirs.parameters())
    assert captured.dense_flops == ours.dense_flops
    if not tied:
        assert captured.shape == ours.shape
    assert len(captured.attentions) == 3
    assert "layers_2_" in captured.attentions[2].op


def test_our_llama_computes_what_hugging_faces_does() -> None:
    theirs = hugging_face()
    ours, _ = build_llama(**SMALL, sequence=32, global_tokens=32, device="cpu")
    names = {"embed_tokens": "embedding", "input_layernorm": "attention_norm", "self_attn": "attention"}
    names |= {"post_attention_layernorm": "ffn_norm", "mlp": "ffn", "lm_head": "output"}
    weights = {}
    for path, weight in theirs.state_dict().items():
        parts = [
            names.get(part, part.removesuffix("_proj")) for part in path.removeprefix("model.").split(".")
        ]
        weights[".".join(parts)] = weight
    ours.load_state_dict(weights)
    ids = torch.randint(0, 96, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)
