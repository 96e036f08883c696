"""Codecs of embedding traffic: ratio, error and speed beside zstd and TorchRec's quantised communication.

    python benchmarks/codecs.py [--quick] [--json]

Streams: the pooled vectors of a DLRM trained on MovieLens-100K, their gradients, and rows of a table of
200,000 normal vectors drawn by a Zipf law of exponent 1.1, in messages of one rank and table. The error-bounded
codecs run at a bound of a tenth of the root mean square (25 dB). "zstd" takes the floats as they are;
"zstd of codes" the same quantised codes as bytes, so that it has the same error. Speeds are MB/s of float32
per CPU second of one thread, encode and decode apart, over all messages. The ratio predicted by the cost
model comes from other batches than those compressed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks._report import Report
from codegen.runtime.codecs import absolute_bound, compiled, decode, encode
from codegen.runtime.codecs.portable import quantise, restore
from codegen.runtime.codecs.sampling import measure_speeds, sample_messages
from cost_models.codecs import predicted_ratio
from examples import _movielens
from ir.compression import CODECS, CodecName

BOUND = 0.1  # of the root mean square: errors of 25 dB
ROWS = 1024  # vectors of a message
OWN: tuple[CodecName, ...] = tuple(name for name in CODECS if name != "none")

Messages = dict[str, list[Tensor]]  # by table
Timed = tuple[int, float, float, float]  # bytes, seconds of encoding and decoding, squared error


def movielens(steps: int, batches: int) -> tuple[Messages, Messages]:
    """Outputs and gradients by table on ``batches`` batches, after ``steps`` steps of Adagrad."""
    torch.manual_seed(0)
    data = _movielens.load()
    model = _movielens.build(data.rows, data.dense.shape[1])
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.03)
    random = np.random.default_rng(0)
    forward: Messages = {}
    backward: Messages = {}

    def loss(samples: Any) -> tuple[Tensor, Any]:
        dense, ids, labels = data.batch(np.sort(samples))
        kept: list[Any] = []
        hook = model.ebc.register_forward_hook(lambda _, __, out: kept.append(out))
        value = nn.functional.binary_cross_entropy_with_logits(model(dense, ids), labels)
        hook.remove()
        return value, kept[0]

    for step in range(steps + batches):
        optimizer.zero_grad()
        value, out = loss(random.integers(0, data.train, ROWS))
        out.values().retain_grad()
        value.backward()  # type: ignore[no-untyped-call]
        if step >= steps:
            at = 0
            for key, width in zip(out.keys(), out.length_per_key(), strict=True):
                for into, of in ((forward, out.values().detach()), (backward, out.values().grad)):
                    into.setdefault(f"t_{key}", []).append(of[:, at : at + width].clone())
                at += width
        optimizer.step()
    return forward, backward


def zipf(batches: int) -> Messages:
    """Rows of a table of normal vectors, drawn by a Zipf law."""
    random = np.random.default_rng(1)
    table = (random.standard_normal((200_000, 64)) * 0.05).astype(np.float32)
    popular = np.arange(1, len(table) + 1) ** -1.1
    ids = random.choice(len(table), (batches, 4 * ROWS), p=popular / popular.sum())
    return {"zipf": [torch.from_numpy(table[row]) for row in ids]}


def own(name: CodecName) -> Callable[[Tensor], Timed]:
    """This project's codec."""

    def run(x: Tensor) -> Timed:
        start = time.process_time()
        payload = encode(x, name, absolute_bound(x, BOUND) if CODECS[name].bounded else 0.0)
        between = time.process_time()
        y = decode(payload, *x.shape)
        end = time.process_time()
        return len(payload), between - start, end - between, float((y - x).square().sum())

    return run


def zstd(level: int, codes: bool) -> Callable[[Tensor], Timed]:
    """zstd of the floats, or of codes of one or two bytes within the bound."""
    import zstandard

    pack, unpack = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()

    def run(x: Tensor) -> Timed:
        start = time.process_time()
        if not codes:
            payload = pack.compress(x.numpy().tobytes())
            between = time.process_time()
            y = np.frombuffer(unpack.decompress(payload), np.float32)
            return len(payload), between - start, time.process_time() - between, 0.0
        bound = absolute_bound(x, BOUND)
        made, _ = quantise(x.reshape(-1).numpy(), bound)
        kind = np.int8 if np.abs(made).max(initial=0) < 128 else np.int16
        payload = pack.compress(made.astype(kind).tobytes())
        between = time.process_time()
        y = restore(np.frombuffer(unpack.decompress(payload), kind).astype(np.int32), bound)
        end = time.process_time()
        error = float(np.square(y - x.reshape(-1).numpy()).sum())
        return len(payload), between - start, end - between, error

    return run


def torchrec(name: str) -> Callable[[Tensor], Timed]:
    """TorchRec's codec of that name, as its all-to-all of pooled embeddings calls it."""
    from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs

    codec = get_qcomm_codecs(QCommsConfig(forward_precision=CommType(name))).forward

    def run(x: Tensor) -> Timed:
        context = codec.create_context()
        flat = x.reshape(-1)
        start = time.process_time()
        payload = codec.encode(flat, context)
        between = time.process_time()
        y = codec.decode(payload, context)
        end = time.process_time()
        error = float((y.reshape(-1) - flat).square().sum())
        return payload.numel() * payload.element_size(), between - start, end - between, error

    return run


def rivals() -> dict[str, Callable[[Tensor], Timed]]:
    """Everything that is compared, by name; what is not installed is left out."""
    found: dict[str, Callable[[Tensor], Timed]] = {name: own(name) for name in OWN}
    try:
        found |= {"zstd -1": zstd(1, False), "zstd -3": zstd(3, False)}
        found |= {"zstd -1 of codes": zstd(1, True), "zstd -3 of codes": zstd(3, True)}
    except ImportError:
        print("zstandard is not installed: no zstd rows (pip install zstandard)", file=sys.stderr)
    try:
        found |= {f"TorchRec {name}": torchrec(name) for name in ("fp16", "int8", "mx4")}
    except ImportError:
        print("TorchRec is not installed: no rows of its codecs", file=sys.stderr)
    return found


def measured(run: Callable[[Tensor], Timed], messages: list[Tensor], repeats: int) -> dict[str, float]:
    """Totals over messages, the fastest of several repeats of each."""
    size = packed = error = power = 0.0
    seconds = [0.0, 0.0]
    for x in messages:
        runs = [run(x) for _ in range(repeats)]
        size, packed = size + x.nbytes, packed + runs[0][0]
        error, power = error + runs[0][3], power + float(x.square().sum())
        seconds = [total + min(r[1 + at] for r in runs) for at, total in enumerate(seconds)]
    return {
        "ratio": size / packed,
        "encode MB/s": size / max(seconds[0], 1e-9) / 1e6,
        "decode MB/s": size / max(seconds[1], 1e-9) / 1e6,
        "QSNR dB": 10 * np.log10(power / error) if error else float("inf"),
    }


def prediction(report: Report, stream: str, messages: Messages, direction: Any) -> list[float]:
    """Predicted over measured ratio of every table and codec, at the size sampled and at a quarter."""
    wrong = []
    for table, of_table in messages.items():
        half = len(of_table) // 2
        sample = sample_messages(table, direction, of_table[:half])
        for codec in OWN:
            for rows in (len(of_table[0]), len(of_table[0]) // 4):
                found = measured(own(codec), [m[:rows].contiguous() for m in of_table[half:]], 1)["ratio"]
                wrong.append(abs(predicted_ratio(sample, codec, BOUND, rows) / found - 1))
    report.row(stream=stream, codec="predicted ratio, mean error", ratio=float(np.mean(wrong)))
    report.row(stream=stream, codec="predicted ratio, worst error", ratio=float(np.max(wrong)))
    return wrong


def main() -> int:
    """Print the table; exit code 1 when a claim does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps and repeats")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    report = Report("codecs")
    batches, repeats = (6, 2) if arguments.quick else (12, 5)
    forward, backward = movielens(100 if arguments.quick else 500, batches)
    streams = {"MovieLens vectors": forward, "MovieLens gradients": backward, "Zipf": zipf(batches)}
    found: dict[tuple[str, str], dict[str, float]] = {}
    for stream, messages in streams.items():
        flat = [m for of_table in messages.values() for m in of_table]
        for name, run in rivals().items():
            row = found[stream, name] = measured(run, flat, repeats)
            finite = {key: value if np.isfinite(value) else "exact" for key, value in row.items()}
            report.row(stream=stream, codec=name, **finite)
    wrong: list[float] = []
    for stream, messages in streams.items():
        wrong += prediction(report, stream, messages, "backward" if "gradients" in stream else "forward")
    for speed in measure_speeds(forward["t_user"], OWN):
        report.note(
            f"{speed.codec}: {speed.encode / 1e6:.0f} and {speed.decode / 1e6:.0f} MB/s, "
            f"{1e6 * speed.message:.0f} us a message"
        )
    path = "compiled" if compiled.library() is not None else "numpy"
    report.note(f"the error-bounded codecs took the {path} path; bound {BOUND} of the root mean square")
    report.claim("worst error of the predicted ratio", max(wrong), 0.15, "<=")
    for stream in streams:
        best = max(found[stream, name]["ratio"] for name in ("eb_lz", "eb_entropy", "eb_lz_entropy"))
        if (stream, "zstd -3 of codes") in found:
            report.claim(
                f"{stream}: ratio over zstd -3 of the same codes",
                best / found[stream, "zstd -3 of codes"]["ratio"],
                1.0,
                ">=",
            )
        if (stream, "TorchRec int8") in found:
            report.claim(
                f"{stream}: ratio over TorchRec int8",
                best / found[stream, "TorchRec int8"]["ratio"],
                1.0,
                ">=",
            )
    return report.finish(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
