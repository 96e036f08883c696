"""All-to-alls of messages whose receives are posted first: against the library's, and the order of posting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from codegen.runtime.launch import launch
from codegen.runtime.posted import post

TARGETS = str(Path(__file__).parent / "posted_ranks.py")


def test_it_moves_what_the_library_moves() -> None:
    for rank, found in enumerate(launch(f"{TARGETS}:against_the_library", 3)):
        assert found["same"] == [True] * (2 if rank == 0 else 4)


def test_receives_are_posted_before_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, int]] = []
    monkeypatch.setattr(dist, "P2POp", lambda op, tensor, peer, **_: (op, peer))

    def start(ops: list[Any]) -> list[Any]:
        seen.extend(ops)
        return []

    monkeypatch.setattr(dist, "batch_isend_irecv", start)
    some, none = torch.zeros(2), torch.zeros(0)
    post([(some, 1), (none, 2)], [(some, 3), (some, 1)]).wait()
    assert seen == [(dist.irecv, 1), (dist.isend, 3), (dist.isend, 1)]
