"""What tables and figures call the parts of the studies: key of a result -> name, in their order (paper/names.yaml)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

NAMES: dict[str, Any] = yaml.safe_load(
    (Path(__file__).resolve().parents[2] / "paper" / "names.yaml").read_text(encoding="utf-8")
)


def model_name(key: str) -> str:
    """What tables and figures call a model."""
    return str(NAMES["models"].get(key, [key])[0])


def short_name(model: str) -> str:
    """What figures and narrow tables call a model; one that is not named names itself."""
    return str(NAMES["models"].get(model, [model])[-1])


def arm_name(key: str) -> str:
    """What tables and figures call an arm of ``dual_reward``; depths and weights name themselves."""
    kind, _, value = key.rpartition("_")
    if kind in ("depth", "weight"):
        return f"{kind} {int(value) / 100:g}"
    return str(NAMES["dual_reward_arms"].get(key, key.replace("_", " ")))


def router_readings(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What was read of a mixture: as published, or before and after its routers were trained (first seed)."""
    if result["kind"] == "mixture":
        return {"as published": result}
    first = result["mixtures"][0]
    return {"fresh": first["before"], "trained": first["after"]}


def upcycled(moe: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The results of models that were made into mixtures here."""
    return {model: result for model, result in moe.items() if result["kind"] == "upcycled"}


def lenses_of(read: Mapping[str, Any]) -> dict[str, str]:
    """The lenses that something was read with -> their names, in order."""
    return {lens: name for lens, name in NAMES["lenses"].items() if lens in read}
