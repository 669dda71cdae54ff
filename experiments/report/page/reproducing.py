"""What a reviewer runs and compares: of every claim the primary numbers, and the time and memory that each takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from classifier_emergence.numbers import ends_text, number

PIPELINE = Path("dvc.yaml")


@dataclass(frozen=True)
class Expected:
    """A primary number of a claim, or a claim that has none."""

    claim: str
    headline: str
    stage: str
    """As ``nox -s reproduce --`` takes it; empty where there is no number."""
    key: str
    value: str
    """With its interval, where there is one."""
    n: str
    needs: str


def expected(ledger: Mapping[str, Any]) -> list[Expected]:
    """The primary numbers of a judged ledger, in order; of a claim without one a row that says what it would need."""
    rows = []
    for key, item in ledger.items():
        primary = [piece for piece in item["evidence"] if piece["primary"]]
        rows += [_row(key, item, piece) for piece in primary]
        if not primary:
            rows.append(Expected(key, item["headline"], "", "", "", "", item["needs"] or "a test"))
    return rows


def _row(key: str, item: Mapping[str, Any], piece: Mapping[str, Any]) -> Expected:
    stage = f"{Path(piece['result']['file']).parent.name}@{piece['model']}"
    value = f"{number(piece['value'], 3)} {ends_text(piece['interval'])}".rstrip()
    n = "" if piece["n"] is None else number(piece["n"])
    return Expected(key, item["headline"], stage, piece["result"]["key"], value, n, item["needs"] or "")


def costs(pipeline: Mapping[str, Any], stage: str) -> tuple[str, str]:
    """Minutes on two cores and gigabytes of memory of a stage, as dvc.yaml says; a dash where it does not."""
    base, _, model = stage.partition("@")
    entry = pipeline["stages"].get(base, {})
    meta = entry.get("do", entry).get("meta", {})

    def told(part: str) -> str:
        found = meta.get(part)
        found = found.get(model) if isinstance(found, dict) else found
        return "–" if found is None else f"{found:g}"

    return told("minutes"), told("memory_gb")


def read_pipeline() -> dict[str, Any]:
    """dvc.yaml as it is written."""
    tree: dict[str, Any] = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))
    return tree
