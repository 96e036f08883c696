"""Trains a tiered table until it is killed; each line it prints is a step whose flush has returned.

Run as ``python tiered_child.py FOLDER STEPS``. Each line on its input forks one process that trains; this one
prints ``pid N`` and, when that process has died, ``dead``. So the imports are paid for once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from codegen.runtime.tiered.table import TieredTable

ROWS, DIM, BATCH, FLUSH_EVERY = 3000, 8, 200, 2


def batch_of(step: int) -> np.ndarray:
    """Distinct ids of a step, small ones more often."""
    random = np.random.default_rng(step)
    return np.unique((random.random(BATCH) ** 3 * ROWS).astype(np.int64))


def update(weights: np.ndarray, state: np.ndarray, ids: np.ndarray, step: int) -> None:
    """An update whose result depends on the order of the steps, in place."""
    weights *= np.float32(0.5)
    weights += (ids[:, None] % 97 + step).astype(np.float32)
    state += 1


def train(folder: str, steps: int) -> None:
    """Go on where the table was last flushed, with two batches prefetched."""
    with TieredTable.open(folder, cache_rows=3 * BATCH, policy="lru") as table:
        first = table.tag + 1
        for step in range(first, min(first + 2, steps)):
            table.prefetch(batch_of(step))
        for step in range(first, steps):
            if step + 2 < steps:
                table.prefetch(batch_of(step + 2))
            ids = batch_of(step)
            batch = table.take(ids)
            weights, state = table.weights[batch.slots], table.state[batch.slots]
            update(weights, state, ids, step)
            table.weights[batch.slots], table.state[batch.slots] = weights, state
            table.release(batch, changed=True)
            if step % FLUSH_EVERY == 0 or step == steps - 1:
                table.flush(step)
                # in one piece: an unbuffered print may die between number and newline
                os.write(1, f"{step}\n".encode())


if __name__ == "__main__":
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            train(sys.argv[1], int(sys.argv[2]))
            os._exit(0)
        print(f"pid {child}", flush=True)
        os.waitpid(child, 0)
        print("dead", flush=True)
