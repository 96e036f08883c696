"""What codecs take on ranks that share a machine: all ranks code at once, messages that are in no cache.

So an exchange pays for them: ranks wait for cores and for memory, vectors come from a lookup, payloads from a
link, and results go into memory that was not touched before. Seconds are on the clock, a median over ranks
and repetitions; every rank of the default group calls :func:`at_once`, and all get the same speeds.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from codegen.runtime.codecs.frame import absolute_bound, decode, encode
from codegen.runtime.launch import Rank
from ir.compression import CODECS, CodecName

_RING_BYTES = (
    16 * 2**20
)  # of messages that a rank codes in turn; beyond its share of a server's last-level cache
_SINGLE = 256  # messages of one vector: what a message costs beyond its bytes
LIBRARY: tuple[CodecName, ...] = ("fp16", "int8")  # of TorchRec's communication, those that gloo carries

Coder = tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], object]]
Record = dict[str, Any]  # the fields of ir.compression.CodecSpeed


def coder(codec: CodecName, relative: float) -> Coder:
    """Encoding of a matrix and decoding of its message by this project's codec."""
    bounded = CODECS[codec].bounded
    return (
        lambda m: encode(m, codec, absolute_bound(m, relative) if bounded else 0.0),
        lambda payload, m: decode(payload, *m.shape),
    )


def library_coder(codec: CodecName) -> Coder | None:
    """The same by TorchRec's quantised communication; None where TorchRec is absent."""
    try:
        from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs
    except ImportError:
        return None
    kernel = get_qcomm_codecs(QCommsConfig(forward_precision=CommType(codec))).forward
    context = kernel.create_context()
    return (
        lambda m: kernel.encode(m.view(-1), context),
        lambda payload, m: kernel.decode(payload, context),
    )


def at_once(
    messages: Sequence[Tensor],
    codecs: Sequence[CodecName] = tuple(CODECS),
    *,
    relative: float = 0.1,
    repeats: int = 3,
    library: bool = False,
) -> list[Record]:
    """Speeds of codecs on ``messages``, (rows, dim) float32 each, with all ranks coding at once.

    Args:
        messages: of the sizes that are exchanged.
        codecs: left out of the result where ``library`` lacks them.
        relative: bound of the error-bounded codecs.
        repeats: behind each median, after one to warm up.
        library: TorchRec's codecs instead of this project's.
    """
    # of a rank's own, so that ranks share no cached pages either
    ring = _copies(messages, _RING_BYTES // sum(m.nbytes for m in messages) + 1)
    small = _copies([messages[0][:1]], _SINGLE)
    size = sum(m.nbytes for m in ring)
    source = f"measured, {'TorchRec, ' if library else ''}{dist.get_world_size()} ranks at once, uncached"
    found = []
    for codec in codecs:
        made = library_coder(codec) if library else coder(codec, relative)
        if made is None:
            continue
        whole, single = _seconds(ring, made, repeats), _seconds(small, made, repeats)
        each = [seconds / len(small) for seconds in single]
        encoding, decoding = (
            max(all_of_it - len(ring) * one, 0.05 * all_of_it)
            for all_of_it, one in zip(whole, each, strict=True)
        )
        found.append(
            {
                "codec": codec,
                "encode": _digits(size / encoding),
                "decode": _digits(size / decoding),
                "message": _digits(sum(each)),
                "source": source,
            }
        )
    return found


def saved_at_once(
    rank: Rank, file: str, codecs: Sequence[CodecName], relative: float, repeats: int
) -> list[Record]:
    """:func:`at_once` on the matrices of an ``npz`` file, for :func:`codegen.runtime.launch.launch`."""
    torch.set_num_threads(1)
    with np.load(Path(file), allow_pickle=False) as arrays:
        messages = [torch.from_numpy(arrays[name]) for name in arrays.files]
    return at_once(messages, codecs, relative=relative, repeats=repeats)


def _copies(messages: Sequence[Tensor], count: int) -> list[Tensor]:
    return [m.clone() for m in itertools.chain.from_iterable(itertools.repeat(messages, count))]


def _seconds(messages: Sequence[Tensor], how: Coder, repeats: int) -> tuple[float, float]:
    """Seconds of encoding and of decoding all messages; results are kept, so each is new memory."""
    encode_one, decode_one = how
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        payloads = [encode_one(m) for m in messages]
        between = time.perf_counter()
        dist.barrier()
        again = time.perf_counter()
        decoded = [decode_one(payload, m) for payload, m in zip(payloads, messages, strict=True)]
        times.append((between - start, time.perf_counter() - again))
        del payloads, decoded
    mine = torch.tensor(times[1:], dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    encoding, decoding = torch.cat(everyone).unbind(1)
    return statistics.median(encoding.tolist()), statistics.median(decoding.tolist())


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
