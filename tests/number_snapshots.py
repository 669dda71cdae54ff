"""Snapshots of numbers: floats agree within the tolerance of their kind, everything else exactly."""

import json
from collections.abc import Iterator
from typing import Any

from syrupy.extensions.json import JSONSnapshotExtension

from classifier_emergence.results import plain
from experiments.pipeline.compare import RULES, Rule, differences


class NumbersExtension(JSONSnapshotExtension):
    """JSON snapshots compared by ``experiments.pipeline.compare``.

    Stored in full precision: a rounded value flips at a rounding boundary. A value within its tolerance
    counts as equal, so ``--snapshot-update`` leaves its file alone.
    """

    rules: tuple[Rule, ...] = RULES

    def serialize(self, data: Any, **filters: Any) -> str:
        # plain(): syrupy alone drops keys that are not text, writes NaN, and turns a float32 into its repr.
        return super().serialize(plain(data), **filters)

    def matches(self, *, serialized_data: Any, snapshot_data: Any) -> bool:
        return not differences(json.loads(snapshot_data), json.loads(serialized_data), rules=self.rules)

    def diff_lines(self, serialized_data: Any, snapshot_data: Any) -> Iterator[str]:
        if not (serialized_data and snapshot_data):  # syrupy's way to say that there is none
            yield from super().diff_lines(serialized_data, snapshot_data)
        else:
            yield from map(str, differences(json.loads(snapshot_data), json.loads(serialized_data), rules=self.rules))


class TinyNumbersExtension(NumbersExtension):
    """The same for models that were themselves trained just now, on whatever processor: what is small drifts more."""

    rules = (Rule("drift", "cosine|change|difference|reading|^kl", absolute=1e-3, relative=0.02), *RULES)
