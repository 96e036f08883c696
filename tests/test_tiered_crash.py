"""A killed process loses nothing that was reported flushed; damage is found, not read."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from codegen.runtime.tiered import native
from codegen.runtime.tiered.native import DamagedPage
from codegen.runtime.tiered.table import Range, TieredTable
from ir.errors import InputError
from tests.tiered_child import BATCH, DIM, ROWS, batch_of, update

CHILD = Path(__file__).with_name("tiered_child.py")
KILLS, STEPS = 12, 100_000
RANGES = {
    "block": (Range("block", ROWS, 512),),
    "three tiers": (Range("ram", 300), Range("mapped", 1200, 512), Range("block", ROWS - 1500, 1024)),
}


def initial(ids: np.ndarray) -> np.ndarray:
    return np.repeat(ids.astype(np.float32)[:, None] / 7, DIM + 1, axis=1)


def make(folder: Path, ranges: tuple[Range, ...]) -> None:
    order = np.random.default_rng(9).permutation(ROWS)
    TieredTable.create(
        folder, ROWS, DIM, "rowwise_adagrad", ranges, init=initial, cache_rows=1, order=order
    ).close()


class Reference:
    """The same training on arrays in memory, one step at a time."""

    def __init__(self) -> None:
        self.records = initial(np.arange(ROWS))
        self.step = -1

    def at(self, step: int) -> np.ndarray:
        assert step >= self.step
        while self.step < step:
            self.step += 1
            ids = batch_of(self.step)
            weights, state = self.records[ids, :DIM], self.records[ids, DIM:]
            update(weights, state, ids, self.step)
            self.records[ids] = np.concatenate([weights, state], axis=1)
        return self.records


def contents(folder: Path) -> tuple[int, np.ndarray]:
    with TieredTable.open(folder, cache_rows=BATCH) as table:
        for file in table._files:
            file.verify()
        return table.tag, table.read_all(np.arange(ROWS))


@pytest.mark.parametrize("tiers", RANGES)
def test_killed_again_and_again_training_goes_on_as_if_it_never_was(tmp_path: Path, tiers: str) -> None:
    """SIGKILL at random moments, most of them inside a step or a flush; each process takes over from the last."""
    folder = tmp_path / "table"
    make(folder, RANGES[tiers])
    reference, chance = Reference(), random.Random(tiers)
    command = [sys.executable, str(CHILD), str(folder), str(STEPS)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forks:
        assert forks.stdin is not None
        assert forks.stdout is not None
        for _ in range(KILLS):
            print("go", file=forks.stdin, flush=True)
            reported, pid, wanted = -1, 0, chance.randrange(1, 5)
            while wanted or not pid:
                word = forks.stdout.readline().split()
                if word[0] == "pid":
                    pid = int(word[1])
                else:
                    reported, wanted = int(word[0]), max(0, wanted - 1)
            time.sleep(chance.random() * 0.02)
            os.kill(pid, signal.SIGKILL)
            while (line := forks.stdout.readline().strip()) != "dead":  # reported before the signal came
                reported = int(line)
            tag, found = contents(folder)
            assert tag >= reported  # nothing that was reported is lost
            assert np.array_equal(found, reference.at(tag))  # and nothing else got in
        forks.stdin.close()
    assert reference.step < STEPS - 1  # it never came to an end by itself


class Disk:
    """Records what is written between syncs, so that a loss of power can be played at any point."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.log: list[tuple[str, Path, int, bytes]] = []
        real_write, real_sync = os.pwrite, os.fdatasync

        def pwrite(fd: int, data: bytes, offset: int) -> int:
            self.log.append(("write", self._path(fd), offset, bytes(data)))
            return real_write(fd, data, offset)

        def fdatasync(fd: int) -> None:
            self.log.append(("sync", self._path(fd), 0, b""))
            real_sync(fd)

        monkeypatch.setattr(native, "pwrite", pwrite)
        monkeypatch.setattr(native, "fdatasync", fdatasync)

    @staticmethod
    def _path(fd: int) -> Path:
        return Path(os.readlink(f"/proc/self/fd/{fd}"))

    def crash(self, image: Path, target: Path, stop: int, keep: Callable[[], float]) -> None:
        """The folder after a loss of power before event ``stop``.

        What a later sync of the same file confirmed is there; of the other writes, each sector of 512
        bytes is there or not, in any order.
        """
        shutil.copytree(image, target)
        synced = {
            index
            for at, (kind, path, _, _) in enumerate(self.log[:stop])
            if kind == "sync"
            for index in range(at)
            if self.log[index][0] == "write" and self.log[index][1] == path
        }
        for index, (kind, path, offset, data) in enumerate(self.log[:stop]):
            if kind != "write":
                continue
            name = target / path.name
            fd = os.open(name, os.O_RDWR | os.O_CREAT)
            for start in range(0, len(data), 512):
                if index in synced or keep() < 0.5:
                    os.pwrite(fd, data[start : start + 512], offset + start)
            os.close(fd)


def test_power_lost_at_any_write_leaves_the_last_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every crash point of a few steps with torn, lost and reordered writes (page files of 1,024 bytes)."""
    monkeypatch.setattr(native, "library", lambda: None)  # the compiled path writes the same bytes, unseen
    folder, image = tmp_path / "table", tmp_path / "image"
    make(folder, (Range("block", ROWS, 1024),))
    shutil.copytree(folder, image)
    disk = Disk(folder, monkeypatch)
    committed = [0]  # events after which flush number i had returned
    with TieredTable.open(folder, cache_rows=2 * BATCH) as table:
        for step in range(4):
            ids = batch_of(step)
            batch = table.take(ids)
            weights, state = table.weights[batch.slots], table.state[batch.slots]
            update(weights, state, ids, step)
            table.weights[batch.slots], table.state[batch.slots] = weights, state
            table.release(batch, changed=True)
            table.flush(step)
            committed.append(len(disk.log))
    monkeypatch.undo()
    chance = random.Random(4)
    points = sorted({*chance.sample(range(len(disk.log)), 40), *committed, *(c - 1 for c in committed[1:])})
    states = {-1: initial(np.arange(ROWS))}
    reference = Reference()
    states |= {step: reference.at(step).copy() for step in range(4)}
    for number, stop in enumerate(points):
        target = tmp_path / f"crash{number}"
        disk.crash(image, target, stop, chance.random)
        tag, found = contents(target)
        assert tag >= sum(c <= stop for c in committed) - 2, f"lost a flush, cut before event {stop}"
        assert np.array_equal(found, states[tag]), f"mixed state, cut before event {stop}"
        shutil.rmtree(target)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["block", "mapped"])
def test_a_flipped_bit_is_found_when_it_is_read(
    tmp_path: Path, kind: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    folder = tmp_path / "table"
    make(folder, (Range(kind, ROWS, 512),))  # type: ignore[arg-type]
    with (folder / "rows.0").open("r+b") as file:
        file.seek(2 * 512 * 5 + 77)  # place 0 of page 5
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 8]))
    with pytest.raises(DamagedPage, match="page 5 does not fit its checksum"):
        contents(folder)


def test_a_page_in_the_wrong_place_is_found(tmp_path: Path) -> None:
    make(tmp_path / "table", (Range("block", ROWS, 512),))
    with (tmp_path / "table" / "rows.0").open("r+b") as file:
        file.seek(2 * 512 * 5)
        page = file.read(512)
        file.seek(2 * 512 * 9)
        file.write(page)
    with pytest.raises(DamagedPage, match="page 9"):
        contents(tmp_path / "table")


def test_after_a_failed_read_the_table_refuses_to_go_on(tmp_path: Path) -> None:
    make(tmp_path / "table", (Range("block", ROWS, 512),))
    with TieredTable.open(tmp_path / "table", cache_rows=ROWS) as table:
        with (tmp_path / "table" / "rows.0").open("r+b") as file:
            file.seek(0)
            file.write(b"\0" * 512 * 2)
        with pytest.raises(DamagedPage):
            table.take(np.arange(ROWS))
        with pytest.raises(InputError, match="failed before"):
            table.take(np.arange(ROWS))
        with pytest.raises(InputError, match="failed before"):
            table.flush()


def test_both_commit_records_damaged_is_said(tmp_path: Path) -> None:
    make(tmp_path / "table", (Range("block", ROWS, 512),))
    (tmp_path / "table" / "commit.0").write_bytes(b"half")
    with pytest.raises(InputError, match="no whole commit record"):
        contents(tmp_path / "table")


def test_a_table_is_open_once(tmp_path: Path) -> None:
    make(tmp_path / "table", (Range("block", ROWS, 512),))
    with (
        TieredTable.open(tmp_path / "table", cache_rows=10),
        pytest.raises(InputError, match="in use by another process"),
    ):
        TieredTable.open(tmp_path / "table", cache_rows=10)


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_and_plain_paths_write_the_same_files(
    tmp_path: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one path wrote, the other verifies and reads."""
    folder = tmp_path / "table"
    with monkeypatch.context() as patch:
        if not compiled:
            patch.setattr(native, "library", lambda: None)
        make(folder, RANGES["three tiers"])
        with TieredTable.open(folder, cache_rows=2 * BATCH) as table:
            for step in range(6):
                ids = batch_of(step)
                batch = table.take(ids)
                weights, state = table.weights[batch.slots], table.state[batch.slots]
                update(weights, state, ids, step)
                table.weights[batch.slots], table.state[batch.slots] = weights, state
                table.release(batch, changed=True)
            table.flush(5)
    with monkeypatch.context() as patch:
        if compiled:
            patch.setattr(native, "library", lambda: None)
        tag, found = contents(folder)
    assert tag == 5
    assert np.array_equal(found, Reference().at(5))
