"""The MovieLens example: its data against the files, its measures against other definitions, a short run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("recbole")

from examples import _movielens as movielens

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data() -> movielens.Data:
    return movielens.load()


def lines(name: str) -> list[list[str]]:
    text = (movielens.folder() / name).read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()[1:]]


def test_nothing_is_lost(data: movielens.Data) -> None:
    ratings = lines("ml-100k.inter")
    assert len(data) == len(ratings) == 100_000
    assert data.labels.sum() == sum(float(line[2]) >= 4 for line in ratings)
    assert data.rows["user"] == 943
    assert data.rows["item"] == 1682
    genres = {line[0]: len(line[3].split()) for line in lines("ml-100k.item")}
    assert len(data.ids["genre"][0]) == sum(genres[line[1]] for line in ratings)
    for name, (ids, offsets) in data.ids.items():
        assert offsets[-1] == len(ids)
        assert len(offsets) == len(data) + 1
        assert ids.min() == 0
        assert ids.max() == data.rows[name] - 1


def test_held_out_ratings_are_the_latest_of_each_user(data: movielens.Data) -> None:
    assert 0.09 < 1 - data.train / len(data) < 0.11
    time = data.dense[:, 2]
    user = data.ids["user"][0]
    for one in range(0, 943, 37):
        mine = np.flatnonzero(user == one)
        early, late = time[mine[mine < data.train]], time[mine[mine >= data.train]]
        assert len(late) >= 1
        assert early.max() <= late.min()


def test_batches_hold_the_samples_asked_for(data: movielens.Data) -> None:
    samples = np.asarray([5, 99_999, 17, 17])
    _, ids, labels = data.batch(samples)
    assert labels.tolist() == data.labels[samples].tolist()
    for name, jagged in ids.to_dict().items():
        values, offsets = data.ids[name]
        expected = [values[offsets[i] : offsets[i + 1]].tolist() for i in samples]
        assert [v.tolist() for v in jagged.to_dense()] == expected


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=40))
def test_auc_is_the_chance_that_a_positive_scores_higher(pairs: list[tuple[int, bool]]) -> None:
    scores, labels = np.asarray([p[0] for p in pairs]), np.asarray([float(p[1]) for p in pairs])
    wins = [
        (a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]
    ]  # every pair, counted
    if wins:
        assert movielens.auc(scores, labels) == pytest.approx(np.mean(wins))


def test_the_baseline_beats_popularity_alone(data: movielens.Data) -> None:
    held_out = slice(data.train, len(data))
    liked = np.bincount(data.ids["item"][0][: data.train], data.labels[: data.train], data.rows["item"])
    popularity = movielens.auc(liked[data.ids["item"][0]][held_out], data.labels[held_out])
    both = movielens.auc(movielens.bias_only(data)[held_out], data.labels[held_out])
    assert 0.5 < popularity < both < 0.85


def test_a_short_run_on_two_processes(data: movielens.Data) -> None:
    command = [sys.executable, "examples/train_movielens.py", "--nproc", "2", "--json"]
    done = subprocess.run(
        [*command, "--epochs", "1", "--limit", "25600"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["steps"] == 50
    assert result["difference"] <= 1e-4
    assert result["sharded"]["auc"] > 0.72
    assert result["sharded"]["held_out"] == len(data) - data.train
    assert set(result["decisions"]) == {f"t_{name}" for name in data.rows}
    assert "\r" not in done.stderr  # no progress bar in a pipe
