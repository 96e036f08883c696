"""MovieLens-100K as click-through data: who, what, when, and whether the rating was 4 or 5.

The files ship inside the PyPI package ``recbole`` (F. M. Harper, J. A. Konstan 2015, "The MovieLens
Datasets"); they are read as text, without importing the package.
"""

from __future__ import annotations

import csv
import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ir.errors import InputError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

TEST_FRACTION = 0.1  # the latest of each user's ratings are held out
AGE_BUCKETS = (18, 25, 35, 45, 50, 56)  # the age groups of MovieLens-1M
DIM = 16


@dataclass(frozen=True)
class Data:
    """Ratings: first those to train on, then those held out, each in order of time.

    ``ids[feature]`` is (ids, offsets): the ids of sample i are ``ids[offsets[i]:offsets[i + 1]]``.
    """

    ids: dict[str, tuple[Ints, Ints]]
    rows: dict[str, int]
    dense: Floats  # (N, dense features)
    labels: Floats  # (N,), 1 for a rating of 4 or 5
    train: int  # the first so many samples are for training
    times: Ints  # (N,) seconds since 1970

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, samples: Ints) -> tuple[Any, Any, Any]:
        """Dense features, ids and labels of some samples, as torch and TorchRec tensors."""
        import torch
        from torchrec import KeyedJaggedTensor

        values, lengths = [], []
        for ids, offsets in self.ids.values():
            count = offsets[samples + 1] - offsets[samples]
            # position of each id: its sample's offset, plus how far it is into the sample
            within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            values.append(ids[np.repeat(offsets[samples], count) + within])
            lengths.append(count)
        jagged = KeyedJaggedTensor(
            keys=list(self.ids),
            values=torch.from_numpy(np.concatenate(values)),
            lengths=torch.from_numpy(np.concatenate(lengths)).int(),
        )
        return torch.from_numpy(self.dense[samples]), jagged, torch.from_numpy(self.labels[samples])


def folder() -> Path:
    """Where the data lies; raises InputError when recbole is not installed."""
    found = importlib.util.find_spec("recbole")
    if found is None or not found.submodule_search_locations:
        raise InputError(
            "MovieLens-100K ships inside recbole, which is not installed; pip install --no-deps recbole"
        )
    where = Path(found.submodule_search_locations[0]) / "dataset_example" / "ml-100k"
    if not (where / "ml-100k.inter").is_file():
        raise InputError(f"{where} lacks ml-100k.inter; install recbole 1.2 from a wheel")
    return where


def _table(path: Path) -> list[dict[str, str]]:
    """Rows of a tab-separated file whose header is ``name:type``."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        names = [column.partition(":")[0] for column in next(rows)]
        return [dict(zip(names, row, strict=True)) for row in rows]


def _codes(values: Sequence[str]) -> dict[str, int]:
    """Numbers for values, in sorted order."""
    return {value: number for number, value in enumerate(sorted(set(values)))}


def _one(column: Sequence[int]) -> tuple[Ints, Ints]:
    return np.asarray(column, np.int64), np.arange(len(column) + 1, dtype=np.int64)


def _many(column: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in column])])
    return np.asarray([i for ids in column for i in ids], np.int64), offsets.astype(np.int64)


def load() -> Data:
    """All 100,000 ratings; raises InputError when the files are missing."""
    where = folder()
    users = {row["user_id"]: row for row in _table(where / "ml-100k.user")}
    items = {row["item_id"]: row for row in _table(where / "ml-100k.item")}
    ratings = _table(where / "ml-100k.inter")
    ratings.sort(key=lambda row: (float(row["timestamp"]), int(row["user_id"]), int(row["item_id"])))
    known, held_out = _split(ratings)
    ratings = known + held_out

    code = {
        "user": _codes(list(users)),
        "item": _codes(list(items)),
        "gender": _codes([user["gender"] for user in users.values()]),
        "occupation": _codes([user["occupation"] for user in users.values()]),
        "zip": _codes([user["zip_code"][:2] for user in users.values()]),
        "genre": _codes([genre for item in items.values() for genre in item["class"].split()]),
        "year": _codes([item["release_year"] for item in items.values()]),
    }
    of_user = [users[row["user_id"]] for row in ratings]
    of_item = [items[row["item_id"]] for row in ratings]
    ages = [int(np.searchsorted(AGE_BUCKETS, int(user["age"]), "right")) for user in of_user]
    ids = {
        "user": _one([code["user"][row["user_id"]] for row in ratings]),
        "item": _one([code["item"][row["item_id"]] for row in ratings]),
        "age": _one(ages),
        "gender": _one([code["gender"][user["gender"]] for user in of_user]),
        "occupation": _one([code["occupation"][user["occupation"]] for user in of_user]),
        "zip": _one([code["zip"][user["zip_code"][:2]] for user in of_user]),
        "genre": _many([[code["genre"][g] for g in item["class"].split()] for item in of_item]),
        "year": _one([code["year"][item["release_year"]] for item in of_item]),
    }
    rows = {name: len(codes) for name, codes in code.items()} | {"age": len(AGE_BUCKETS) + 1}
    labels = np.asarray([float(row["rating"]) >= 4 for row in ratings], np.float32)
    dense = _dense(ratings, of_user, of_item, labels, len(known))
    times = np.asarray([int(float(row["timestamp"])) for row in ratings], np.int64)
    return Data(ids, rows, dense, labels, len(known), times)


def _split(ratings: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Each user's earlier ratings and later ones; ``ratings`` are in order of time."""
    left = Counter(row["user_id"] for row in ratings)
    later = {user: round(count * TEST_FRACTION) for user, count in left.items()}
    known: list[dict[str, str]] = []
    held_out: list[dict[str, str]] = []
    for row in ratings:
        user = row["user_id"]
        (held_out if left[user] <= later[user] else known).append(row)
        left[user] -= 1
    return known, held_out


def _dense(
    ratings: list[dict[str, str]],
    of_user: list[dict[str, str]],
    of_item: list[dict[str, str]],
    labels: Floats,
    train: int,
) -> Floats:
    """Age, age of the film, time, and what user and film have been given before this rating, standardised.

    Counts and means are over earlier ratings only, so that a sample never sees its own label or later ones.
    """
    time = np.asarray([float(row["timestamp"]) for row in ratings])
    seen: dict[str, list[float]] = {}
    prior = float(labels[:train].mean())
    columns = []
    for n, (row, user, item) in enumerate(zip(ratings, of_user, of_item, strict=True)):
        line = [float(user["age"]), _year(item["release_year"]), time[n]]
        for key in (f"u{row['user_id']}", f"i{row['item_id']}"):
            count, liked = seen.setdefault(key, [0.0, 0.0])
            line += [
                np.log1p(count),
                (liked + 5 * prior) / (count + 5),
            ]  # a mean, pulled to the prior by 5 ratings
        # labels of held-out ratings are never used, not even for later ones
        if n < train:
            for key in (f"u{row['user_id']}", f"i{row['item_id']}"):
                seen[key][0] += 1
                seen[key][1] += float(labels[n])
        columns.append(line)
    dense = np.asarray(columns)
    known = dense[:train]
    return ((dense - known.mean(0)) / (known.std(0) + 1e-9)).astype(np.float32)


def _year(text: str) -> float:
    """A release year; one film has none (the file says "unkonwn") and gets that of most films."""
    return float(text) if text.isdigit() else 1995.0


def auc(scores: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """Area under the ROC curve by ranks (Mann-Whitney), ties counted half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks = (last - (counts - 1) / 2)[inverse]
    positive = labels > 0.5
    hits = int(positive.sum())
    misses = len(labels) - hits
    if not hits or not misses:
        raise InputError("the AUC needs both labels; hold out more samples")
    return float((ranks[positive].sum() - hits * (hits + 1) / 2) / (hits * misses))


def bias_only(data: Data, steps: int = 20) -> npt.NDArray[Any]:
    """Scores of the baseline: a mean, a bias per user and one per film, by alternating damped averages."""
    user, item = data.ids["user"][0], data.ids["item"][0]
    known, residual = slice(0, data.train), data.labels[: data.train] - data.labels[: data.train].mean()
    of_user, of_item = np.zeros(data.rows["user"]), np.zeros(data.rows["item"])
    for _ in range(steps):
        for mine, ids, other in (
            (of_user, user, of_item[item[known]]),
            (of_item, item, of_user[user[known]]),
        ):
            total = np.bincount(ids[known], residual - other, len(mine))
            mine[:] = total / (np.bincount(ids[known], minlength=len(mine)) + 5)  # damped by 5 ratings
    scores: npt.NDArray[Any] = of_user[user] + of_item[item]
    return scores


def build(rows: dict[str, int], dense_features: int, device: str = "cpu") -> Any:
    """The DLRM: one table a feature, dot interaction, logits."""
    from torch import nn

    from planner.zoo import build as zoo

    tables = [
        {"name": f"t_{name}", "rows": count, "dim": DIM, "features": [name]} for name, count in rows.items()
    ]
    model = zoo(
        "dlrm", tables=tables, dense_features=dense_features, bottom=(64, DIM), top=(64, 32, 1), device=device
    ).module
    # SiLU in the place of ReLU: at a kink, rounding decides which way a gradient goes, and after 500 steps two
    # runs that differ in the order of their sums have drifted 1e-4 apart in AUC; with SiLU it is 1e-7.
    for layers in (model.bottom, model.top):
        for index, layer in enumerate(layers):
            if isinstance(layer, nn.ReLU):
                layers[index] = nn.SiLU()
    return model
