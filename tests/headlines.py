"""The key outcomes: about ten numbers of every stage that a reviewer reads in a diff."""

from collections.abc import Iterator, Sequence
from typing import Any

HEADLINES = {
    "fetch": ["architecture", "n_layers", "d_model", "vocabulary", "parameters", "tied_embeddings", "lens_log_gap"],
    "probing": [
        "reported.symbol|word.peak.accuracy|interval|layer|p",
        "reported.word.optimum.peak.accuracy|layer",
        "reported.held_out.score",
        "controlled.symbol|word|story.held_out_operands|held_out_templates.selected.accuracy|interval|layers",
        "controlled.word|story.held_out_templates.minus_bag_of_tokens.selected",
        "flaws.scaled_attention.symbol|word.peak.accuracy|interval|layer",
        "directions.reported.rank",
    ],
    "logit_lens": [
        "reported.most_correct|max_probability|max_probability_at_layer",
        "controlled.symbol|word|story.word.alignment|rank.-1",
        "controlled.symbol|word|story.word.choice.accuracy.-1",
        "controlled.symbol|word|story.word.null.p|contrast_p.-1",
    ],
    "word_lenses": [
        "styles.symbol|word|story.logit|jacobian.selected",
        "styles.symbol|word|story.jacobian.minus_logit",
    ],
    "dual_reward": [
        "main.symbol|word|story.alignment",
        "main.symbol.top",
        "main.answers.exact",
        "main.without_o.top",
        "arms.vo|vo_all_layers|qk|mlp|shuffled_targets|arbitrary_words|answer_only|class_only.symbol.alignment",
        "arms.vo|answer_only|class_only.answers.exact",
        "contrasts.vo_against_all_linear|head_against_lens",
    ],
    "dual_reward_long": [
        "main.symbol|word|story.alignment",
        "main.answers.exact|change",
        "main.without_o|lone_space.top",
        "main.reading.words|difference",
        "reading_before.words|difference",
        "main.reading.interchange.followed.difference",
        "arms.answer_only|qk.symbol.top",
        "contrasts.answer_only.log_prob",
    ],
    "sample_efficiency": [
        "cells.*.symbol|story.top",
    ],
    "lora_sft": [
        "before|final.answers.exact",
        "before|final.symbol|word.peak",
        "before|final.reported.score|control",
    ],
    "cot_alignment": [
        "before|direct|chain_of_thought.answers.exact",
        "direct|chain_of_thought.alignment.last|inner_peak",
        "chain_of_thought.writes_word",
        "chain_against_direct.exact",
    ],
    "lenses": [
        "untrained.logit|jacobian|tuned.symbol|word|story.selected|peak.value",
        "untrained.jacobian|tuned.symbol|word|story.minus_logit",
        "controls.permuted.outputs|layers.symbol.selected",
        "controls.random_weights.jacobian.symbol.selected",
        "trained.dual_reward|cot_alignment.after.logit|jacobian|tuned.symbol.choice|alignment",
    ],
    "trained_words": [
        "ways.*.after.logit|jacobian.at_classifier|selected",
        "ways.*.after.jacobian.minus_logit|change.at_classifier|selected",
    ],
    "conversations": [
        "train|test.ended|right",
    ],
    "tuning": [
        "conversations",
        "models.base|tuned|control.follows.right",
        "models.base|tuned|control.reward.symbol_alignment|steps_to_half",
        "tuned_minus_base|tuned_minus_control.probes.symbol|word",
        "tuned_minus_base|tuned_minus_control.alignment",
    ],
    "other_tasks": [
        "comparison|places.probing.held_out_groups.selected.accuracy|interval|layers",
        "comparison|places.lens.largest",
        "comparison|places.dual_reward.held_out_groups|held_out_templates.alignment",
        "comparison|places.dual_reward.held_out_groups.answers_exact",
        "comparison|places.arbitrary_words|shuffled_targets.held_out_groups.alignment",
    ],
    "grpo": [
        "before.sampled_reward",
        "arms.*.summary.sampled_reward|alignment_peak|answers_exact_change",
        "arms.controlled.summary.statements_selected_change",
    ],
    "collapse": [
        "reported_collapsed",
        "arms.vo_grpo|vo_class|vo_both|whole_grpo|whole_class|whole_both.summary.classes.one_word|balanced_accuracy",
        "arms.vo_grpo|vo_class|vo_both|whole_grpo|whole_class|whole_both.summary.sampled_reward",
        "arms.whole_both.summary.gradients.cosine",
        "causes.*.one_word|reward",
        "contrasts.*",
    ],
    "staged": [
        "before.sampled_reward",
        "orders.*.summary.lens.alignment",
        "orders.*.summary.answers.exact|change",
        "kept_class_weight.alignment|reward",
    ],
    "replication": [
        "trainings.*.log_prob|exact|alignment",
    ],
    "moe_routers": [
        "base.answers",
        "summary.experts|largest_cosine|words_smallest_q|reported_found|controlled_found|coherence_found",
        "summary.context_change|decided_by_token",
        "summary.planted.at_30|at_50",
        "summary.written_found|own_words_smallest_q",
        "summary.paths.symbol|word.beyond_layer|beyond_token",
        "mixture_minus_base|mixture_minus_twin|written_minus_twin.symbol|word",
    ],
}
"""Stage -> dotted keys of its results; ``a|b`` means each of these, ``*`` means all."""

SPREAD = ("by_seed", "largest", "least")
"""What a value over seeds has besides an interval."""


def headline(result: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The part of a result that lies at these keys, without the single seeds."""
    found: dict[str, Any] = {}
    for key in keys:
        for path, value in _at(result, key.split("."), ()):
            node = found
            for part in path[:-1]:
                node = node.setdefault(part, {})
            node[path[-1]] = value
    return found


def _at(tree: Any, parts: Sequence[str], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not parts:
        yield path, {k: v for k, v in tree.items() if k not in SPREAD} if isinstance(tree, dict) else tree
        return
    names = list(tree) if parts[0] == "*" else parts[0].split("|")
    # Of several, a model that is trained in fewer ways has some; a key alone is there or an error.
    for name in [name for name in names if name in tree] if isinstance(tree, dict) and len(names) > 1 else names:
        yield from _at(tree[int(name)] if isinstance(tree, list) else tree[name], parts[1:], (*path, name))


def verdicts(claims: dict[str, Any]) -> dict[str, Any]:
    """Of every claim the headline, and the state of every piece of evidence."""
    return {
        key: {"headline": claim["headline"], "states": [piece["state"] for piece in claim["evidence"]]}
        for key, claim in claims.items()
    }
