"""Snapshots of numbers: floats agree within the tolerance of their kind, everything else exactly."""

import json
from collections.abc import Iterator
from typing import Any

from syrupy.extensions.json import JSONSnapshotExtension

from classifier_emergence.results import plain
from experiments.pipeline.compare import RULES, Difference, Rule, differences

DIGITS = 6
"""Of a stored float; what that rounds away is far below every tolerance."""
WIDTH = 160


class NumbersExtension(JSONSnapshotExtension):
    """JSON snapshots of a tree, one line for what stands together, compared by ``experiments.pipeline.compare``.

    A value within its tolerance counts as equal, so ``--snapshot-update`` leaves its file alone.
    """

    rules: tuple[Rule, ...] = RULES

    def serialize(self, data: Any, **filters: Any) -> str:
        # plain(): syrupy alone drops keys that are not text, writes NaN, and turns a float32 into its repr.
        return "{\n" + ",\n".join(_rows(plain(data), "")) + "\n}\n"

    def matches(self, *, serialized_data: Any, snapshot_data: Any) -> bool:
        return not self._differences(serialized_data, snapshot_data)

    def diff_lines(self, serialized_data: Any, snapshot_data: Any) -> Iterator[str]:
        if not (serialized_data and snapshot_data):  # syrupy's way to say that there is none
            yield from super().diff_lines(serialized_data, snapshot_data)
        else:
            yield from map(str, self._differences(serialized_data, snapshot_data))

    def _differences(self, actual: str, expected: str) -> list[Difference]:
        return differences(_tree(json.loads(expected)), _tree(json.loads(actual)), rules=self.rules)


class TinyNumbersExtension(NumbersExtension):
    """The same for models that were themselves trained just now, on whatever processor: what is small drifts more.

    Scores of scikit-learn's probes drift as well: its solver stops short of the optimum, and rounding decides where.
    """

    rules = (
        Rule("drift", "cosine|change|difference|reading|^kl", absolute=1e-3, relative=0.02),
        Rule("stop", "^score$", absolute=1e-3, relative=0.01),
        *RULES,
    )


def _rows(tree: dict[str, Any], prefix: str) -> Iterator[str]:
    """A line ``"dotted.key": value`` for each value, or for an object without others in it if the line has room."""
    for name, value in sorted(tree.items()):
        key = f"{prefix}{name}"
        row = f' "{key}": {json.dumps(_rounded(value), ensure_ascii=False, sort_keys=True, allow_nan=False)}'
        nested = isinstance(value, dict) and any(isinstance(item, dict) for item in value.values())
        if nested or (isinstance(value, dict) and len(row) >= WIDTH):
            yield from _rows(value, f"{key}.")
        else:
            yield row


def _tree(rows: dict[str, Any]) -> dict[str, Any]:
    """The tree again: what kind of number a value is, keys above it say."""
    found: dict[str, Any] = {}
    for key, value in rows.items():
        *above, last = key.split(".")
        node = found
        for name in above:
            node = node.setdefault(name, {})
        node[last] = value
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
