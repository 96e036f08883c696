"""One report for every benchmark: rows and claims, as a table for people or one JSON object."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

Sense = Literal["<=", ">=", "=="]


@dataclass(slots=True)
class Report:
    """Collects rows, claims and notes of one run.

    A claim compares a measured value with a target; a value of None is a claim that could not be
    measured and does not hold.
    """

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    claims: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, **cells: Any) -> None:
        """Add one row; the order of the first row's cells is the order of the columns."""
        self.rows.append(cells)

    def claim(self, id: str, value: float | None, target: float, sense: Sense) -> bool:
        """Add one claim and say whether it holds."""
        ok = value is not None and math.isfinite(value)
        if ok and value is not None:
            ok = {"<=": value <= target, ">=": value >= target, "==": value == target}[sense]
        finite = value if value is not None and math.isfinite(value) else None
        self.claims.append({"id": id, "value": finite, "target": target, "sense": sense, "ok": ok})
        return ok

    def note(self, text: str) -> None:
        """Add a remark that is printed under the table and kept in the JSON."""
        self.notes.append(text)

    def finish(self, as_json: bool) -> int:
        """Print everything; the exit code is 0 when every claim holds, else 1."""
        if as_json:
            data = {"benchmark": self.name, "claims": self.claims, "rows": self.rows, "notes": self.notes}
            print(json.dumps(data, allow_nan=False, default=str))
        else:
            self._print()
        return 0 if all(claim["ok"] for claim in self.claims) else 1

    def _print(self) -> None:
        print(f"== {self.name}")
        for number, rows in enumerate(_tables(self.rows)):
            if number:
                print()
            _print_table(rows)
        for note in self.notes:
            print(f"note: {note}")
        for claim in self.claims:
            mark = "ok  " if claim["ok"] else "FAIL"
            print(f"{mark} {claim['id']}: {_cell(claim['value'])} {claim['sense']} {_cell(claim['target'])}")


def _tables(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows in order, a new table where less than half of a row's cells have a column in the one above."""
    tables: list[list[dict[str, Any]]] = []
    for row in rows:
        known = {key for above in tables[-1] for key in above} if tables else set()
        if tables and 2 * len(known & row.keys()) >= len(row):
            tables[-1].append(row)
        else:
            tables.append([row])
    return tables


def _print_table(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    texts = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(text[i]) for text in texts) for i in range(len(columns))]
    for text in texts:
        print("  ".join(t.ljust(w) for t, w in zip(text, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def geomean(values: list[float]) -> float | None:
    """Geometric mean; None of nothing."""
    return math.exp(sum(math.log(v) for v in values) / len(values)) if values else None
