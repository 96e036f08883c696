"""What codecs will make of a table's traffic, measured on real vectors: the inputs of the compression pass.

:func:`sample_traffic` runs a trained, unsharded model on batches and samples the outputs of its tables and
their gradients; :func:`sample_messages` samples matrices; :func:`measure_speeds` times the codecs on them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from codegen.runtime.codecs import portable
from codegen.runtime.codecs.frame import absolute_bound, decode, encode
from codegen.runtime.launch import launch
from ir.compression import (
    CODECS,
    BoundSample,
    CodecName,
    CodecSpeed,
    Direction,
    EmbeddingSample,
    SizeSample,
)
from ir.errors import InputError

# Relative bounds sampled, a factor of sqrt(2) apart: 47 to 5 dB of QSNR, coarser and finer than budgets ask
BOUNDS = tuple(2.0 ** (half / 2) for half in range(-14, 1))
_SIZES = (16, 4, 1)  # parts that messages are cut into, to see how repetition grows with size
_LEAST_ROWS = 8  # of a part

Messages = Sequence[Tensor]


def sample_traffic(
    module: nn.Module,
    batches: Iterable[Any],
    loss_of: Callable[[nn.Module, Any], Tensor],
    *,
    origin: str = "",
) -> tuple[EmbeddingSample, ...]:
    """Samples of every table of the TorchRec collections in ``module``, forwards and backwards.

    Args:
        module: unsharded and trained for a while; its gradients are cleared.
        batches: each as large as what one rank is fed in a step.
        loss_of: the loss of the module on one batch.
        origin: said in the samples; default how many batches there were.

    Raises:
        InputError: no collection of pooled tables in the module, or no batch.
    """
    from torchrec import EmbeddingBagCollection

    found: dict[tuple[str, Direction], list[Tensor]] = {}
    pooled: list[tuple[Any, Any]] = []
    hooks = [
        part.register_forward_hook(lambda ebc, _, output: pooled.append((ebc, _kept(output))))
        for part in module.modules()
        if isinstance(part, EmbeddingBagCollection)
    ]
    if not hooks:
        raise InputError("the model has no EmbeddingBagCollection, so it has no traffic to sample")
    count = 0
    try:
        for batch in batches:
            count += 1
            pooled.clear()
            module.zero_grad(set_to_none=True)
            loss_of(module, batch).backward()  # type: ignore[no-untyped-call]
            for ebc, output in pooled:
                _collect(ebc, output, found)
    finally:
        for hook in hooks:
            hook.remove()
        module.zero_grad(set_to_none=True)
    if not count:
        raise InputError("no batch to sample traffic from; pass at least one")
    said = origin or f"{count} batches"
    return tuple(sample_messages(t, d, messages, origin=said) for (t, d), messages in sorted(found.items()))


def _kept(output: Any) -> Any:
    output.values().retain_grad()
    return output


def _collect(ebc: Any, output: Any, found: dict[tuple[str, Direction], list[Tensor]]) -> None:
    """The outputs and gradients of one collection on one batch, by table."""
    table_of = {f: config.name for config in ebc.embedding_bag_configs() for f in config.feature_names}
    values = output.values()
    ends = np.cumsum(output.length_per_key()).tolist()
    for key, end, width in zip(output.keys(), ends, output.length_per_key(), strict=True):
        table = table_of[key.split("@")[0]] if "@" not in key else key.split("@")[1]
        columns = slice(end - width, end)
        found.setdefault((table, "forward"), []).append(values.detach()[:, columns].clone())
        if values.grad is not None:
            found.setdefault((table, "backward"), []).append(values.grad[:, columns].clone())


def sample_messages(
    table: str,
    direction: Direction,
    messages: Messages,
    *,
    bounds: Sequence[float] = BOUNDS,
    origin: str = "",
) -> EmbeddingSample:
    """Measure a table's messages, each (rows, dim) float32; raises InputError when there is nothing in them."""
    kept = [m.detach().float().contiguous() for m in messages if m.numel()]
    if not kept or len({m.shape[1] for m in kept}) != 1:
        raise InputError(f"the sample of table {table!r} holds no vectors, or vectors of different widths")
    finite = [torch.nan_to_num(m, nan=0.0, posinf=0.0, neginf=0.0) for m in kept]
    power = float(np.mean([float(m.double().square().mean()) for m in finite]))
    return EmbeddingSample(
        table=table,
        direction=direction,
        dim=kept[0].shape[1],
        rms=_digits(power**0.5),
        largest=_digits(max(float(m.abs().max()) for m in finite)),
        sizes=_sizes(finite),
        bounds=tuple(_at_bound(finite, bound) for bound in bounds),
        fixed_error={name: _fixed_error(finite, name) for name, codec in CODECS.items() if codec.format},
        origin=origin or f"{len(kept)} messages",
    )


def _digits(value: float) -> float:
    """Four digits: samples are written into plans."""
    return float(f"{value:.4g}")


def _sizes(messages: Messages) -> tuple[SizeSample, ...]:
    rows = min(len(m) for m in messages)
    found = {}
    for parts in _SIZES:
        size = rows // parts
        if size < _LEAST_ROWS and parts > 1:
            continue
        counts, entropies, tables = [], [], []
        for m in messages:
            for at in range(0, rows - size + 1, max(size, (rows - size) // 3 or 1)):
                refs, new = portable.find_repeats(m[at : at + size].numpy().view(np.int32))
                entropy, head = _token_bits(refs)
                counts.append(len(new))
                entropies.append(entropy)
                tables.append(head)
        found[size] = SizeSample(size, *(_digits(float(np.mean(v))) for v in (counts, entropies, tables)))
    return tuple(found[size] for size in sorted(found))


def _token_bits(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Entropy of unsigned values under the entropy coder, bits each, and bytes of its table."""
    tokens, _, widths = portable.tokens_of(values)
    count = np.bincount(tokens, minlength=portable.ALPHABET)
    freq = portable.frequencies_of(count)
    used = count > 0
    coded = float(count[used] @ (portable.SCALE_BITS - np.log2(freq[used])))
    return (coded + float(widths.sum())) / len(tokens), float(len(portable.write_frequencies(freq)))


def _at_bound(messages: Messages, relative: float) -> BoundSample:
    rows = []
    for m in messages:
        bound = absolute_bound(m, relative)
        codes, _ = portable.quantise(m.reshape(-1).numpy(), bound)
        error = float(
            (torch.from_numpy(portable.restore(codes, bound)) - m.reshape(-1)).double().square().sum()
        )
        vectors = codes.reshape(m.shape)
        literals = vectors[portable.find_repeats(vectors)[1]]
        exact = len(portable.find_repeats(m.numpy().view(np.int32))[1])
        every, table = _token_bits(portable.zigzag(codes))
        new, new_table = _token_bits(portable.zigzag(literals.reshape(-1)))
        width = float((int(codes.max()) - int(codes.min())).bit_length())
        power = float(m.double().square().sum())
        rows.append(
            (every, new, width, 1 - len(literals) / exact, error / power if power else 0.0, table, new_table)
        )
    every, new, width, lost, error, table, new_table = np.mean(rows, axis=0).tolist()
    return BoundSample(
        bound=relative,
        entropy=_digits(every),
        literal_entropy=_digits(new),
        width=_digits(width),
        homogenisation=_digits(min(max(lost, 0.0), 1.0)),
        error=_digits(error),
        table=_digits(table),
        literal_table=_digits(new_table),
    )


def _fixed_error(messages: Messages, codec: CodecName) -> float:
    noise = power = 0.0
    for m in messages:
        noise += float((decode(encode(m, codec), *m.shape) - m).double().square().sum())
        power += float(m.double().square().sum())
    return _digits(noise / power) if power else 0.0


def measure_speeds(
    messages: Messages,
    codecs: Sequence[CodecName] = tuple(CODECS),
    *,
    relative: float = 0.1,
    repeats: int = 3,
    ranks: int = 1,
) -> tuple[CodecSpeed, ...]:
    """Encode and decode speed of codecs on this machine, bytes/s, on ``messages`` of the sizes that are exchanged.

    Args:
        messages: (rows, dim) each.
        codecs: to be timed.
        relative: bound of the error-bounded codecs, relative to a message's root mean square.
        repeats: the best of them for one rank, their median for several.
        ranks: that share this machine. Several are started and code at once, on messages that are in no cache:
            seconds on the clock, what an exchange pays (:mod:`codegen.runtime.codecs.speeds`). One rank is timed
            here, in processor seconds on messages that may be in a cache: the best that a codec does.

    What a message costs beyond its bytes is the time of a single vector.

    Raises:
        InputError: no message that is not empty, or no rank.
    """
    kept = [m.detach().float().contiguous() for m in messages if m.numel()]
    if not kept:
        raise InputError("no messages to time codecs on; pass at least one that is not empty")
    if ranks < 1:
        raise InputError(f"codecs are timed on one rank or more, not on {ranks}")
    if ranks > 1:
        return _at_once(kept, codecs, relative, repeats, ranks)
    small, size = [kept[0][:1].contiguous()], sum(m.nbytes for m in kept)
    found = []
    for codec in codecs:
        slow = _seconds(kept, codec, relative, repeats)
        fixed = _seconds(small * 16, codec, relative, repeats)
        rest = [
            max(whole - len(kept) * each / 16, 0.05 * whole) for whole, each in zip(slow, fixed, strict=True)
        ]
        found.append(
            CodecSpeed(
                codec,
                _digits(size / rest[0]),
                _digits(size / rest[1]),
                _digits(sum(fixed) / 16),
                "measured, one rank, processor seconds",
            )
        )
    return tuple(found)


def _at_once(
    messages: Messages, codecs: Sequence[CodecName], relative: float, repeats: int, ranks: int
) -> tuple[CodecSpeed, ...]:
    """The speeds that so many ranks agree on."""
    with tempfile.TemporaryDirectory(prefix="planner-codecs-") as folder:
        file = str(Path(folder) / "messages.npz")
        np.savez(file, *(m.numpy() for m in messages))
        rows = launch(
            "codegen.runtime.codecs.speeds:saved_at_once",
            ranks,
            {"file": file, "codecs": list(codecs), "relative": relative, "repeats": repeats},
        )[0]
    return tuple(CodecSpeed(**row) for row in rows)


def _seconds(messages: Messages, codec: CodecName, relative: float, repeats: int) -> tuple[float, float]:
    """Least processor seconds of encoding and of decoding all messages."""
    times = []
    for _ in range(repeats + 1):  # the first builds and warms up
        start = time.process_time()  # not the clock on the wall: other processes may have the core
        payloads = [
            encode(m, codec, absolute_bound(m, relative) if CODECS[codec].bounded else 0.0) for m in messages
        ]
        between = time.process_time()
        for payload, m in zip(payloads, messages, strict=True):
            decode(payload, *m.shape)
        times.append((between - start, time.process_time() - between))
    return min(t[0] for t in times[1:]), min(t[1] for t in times[1:])
