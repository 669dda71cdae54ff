"""What the paper calls the parts of its studies: key of a result -> name in tables and figures, in their order."""

from collections.abc import Mapping
from typing import Any

DUAL_REWARD_ARMS = {
    "vo": "V and O (main)", "vo_all_layers": "V and O, all layers", "qk": "Q and K", "mlp": "MLP",
    "all_linear": "all linear maps", "class_only": "lens alone", "answer_only": "answers alone",
    "arbitrary_words": "arbitrary words", "shuffled_targets": "shuffled targets", "head": "separate head",
}  # fmt: skip
"""Arms of ``dual_reward`` in order; depths and weights follow (see ``arm_name``)."""

DUAL_REWARD_FLAWS = {
    "unshifted_answers": "answer labels not shifted", "read_after_answer": "lens trained after the answer",
    "bare_targets": "targets without a space",
}  # fmt: skip
"""Its arms that have one flaw of the originals."""

FORMATS = {"before": "before training", "direct": "answer", "chain_of_thought": "word and answer"}
"""What ``cot_alignment`` trains on."""

OTHER_TASKS = ("comparison", "places")
OTHER_TASKS_ARMS = {
    "before": "before training", "dual_reward": "dual reward",
    **{key: DUAL_REWARD_ARMS[key] for key in ("arbitrary_words", "shuffled_targets")},
}  # fmt: skip
HELD_OUT = {"held_out_groups": "groups", "held_out_templates": "templates"}
"""What of ``other_tasks`` no training example had."""

GRPO_ARMS = {
    "controlled": "controlled", "reported": "as reported", "reported_without_flaws": "as reported, without flaws",
}  # fmt: skip

COLLAPSE_ATTEMPTS = {
    "reported_first": "weight 0.4", "reported_own_targets": "+ balanced, own targets",
    "reported_entropy_bonus": "+ entropy bonus", "reported_low_rate": "+ low learning rate",
    "reported_class_focus": "weight 0.9, no KL",
}  # fmt: skip
"""The originals' configurations."""
COLLAPSE_IN_32_BITS = {
    "reported_first_in_32_bits": "weight 0.4, 32 bits", "reported_own_targets_in_32_bits": "+ own targets, 32 bits",
}  # fmt: skip
"""The first two, made without half precision."""
COLLAPSE_FACTORIAL = {
    f"{place}_{part}": (trained, loss)
    for place, trained in (("whole", "whole model"), ("vo", "V and O"))
    for part, loss in (("grpo", "GRPO"), ("class", "class loss"), ("both", "both"))
}
"""Cells of the factorial: what is trained, and on what."""
COLLAPSE_FLAWS = {
    "flaw_signed_kl": "signed divergence", "flaw_shared_target": "one target a step",
    "flaw_half_precision": "half precision", "without_half_precision": "its learning rate alone",
}  # fmt: skip

STAGED_ORDERS = {
    "dual_then_grpo": "dual reward, then GRPO", "grpo_then_dual": "GRPO, then dual reward",
    "together": "both from the start",
}  # fmt: skip
STAGED_REWARDS = {"dual": "dual reward", "grpo": "GRPO", "together": "both"}
"""What one part of ``staged`` trains on."""

ROUTERS = {"before": "fresh routers", "after": "trained routers"}
"""Of a mixture that was made here, before and after its joint training."""


def arm_name(key: str) -> str:
    """What tables and figures call an arm of ``dual_reward``; depths and weights name themselves."""
    kind, _, value = key.rpartition("_")
    if kind in ("depth", "weight"):
        return f"{kind} {int(value) / 100:g}"
    return DUAL_REWARD_ARMS.get(key, key.replace("_", " "))


def router_readings(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What was read of a mixture: as published, or before and after its routers were trained (first seed)."""
    if result["kind"] == "mixture":
        return {"as published": result}
    first = result["mixtures"][0]
    return {"fresh": first["before"], "trained": first["after"]}


def upcycled(moe: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The results of models that were made into mixtures here."""
    return {model: result for model, result in moe.items() if result["kind"] == "upcycled"}
