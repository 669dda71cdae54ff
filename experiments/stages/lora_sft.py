"""Stage lora_sft@model: does plain LoRA fine-tuning on answers make the lens say the operation?

Reported protocol: any of the lens's top tokens at any layer that contains a word or sign of the operation. Controlled:
alignment of the operation word at every layer, on operands never trained on.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_row, peak_row
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import token_text
from classifier_emergence.results import plain
from classifier_emergence.tasks.problems import COT_REPORTED, Problem, sample
from classifier_emergence.training.adapters import Start, adapted_together, save_adapter
from classifier_emergence.training.examples import Objective, encode
from classifier_emergence.training.modules import MLP, QKVO
from classifier_emergence.training.supervised import Member, train_together
from experiments.params import Params
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main
from experiments.shared.study import ProblemStudy, adapter_of, curves_of, schedule_of
from experiments.shared.summaries import summary_over_seeds

PROMPTS = (*COT_REPORTED, "45 * 45")
"""The ten problems of the write-up."""
SUBSTRINGS = {
    "multiply": ("multiply", "times", "product", "*", "×"),
    "add": ("add", "plus", "sum", "+"),
    "subtract": ("subtract", "minus", "difference", "-"),
}
"""What a token must contain, in lower case, to count as a classifier under the reported protocol."""


class LoraSftStudy(ProblemStudy):
    """The model and problems on operands that the write-up does not ask about."""

    def __init__(self, params: Params, key: str) -> None:
        self.settings, reserved = params.lora_sft, [Problem.parse(text) for text in PROMPTS]
        lm, depth = load(key, params.registry), params.logit_lens.depth
        super().__init__(lm, params, self.settings, depth=depth, reserved=reserved)


def run(params: Params, key: str) -> None:
    """Train, measure on the way and after it and write one result."""
    with Runs("lora_sft", key, params, LoraSftStudy) as runs:
        before = runs.once("before", lambda study, _: measure_both(study))
        names = {f"seed-{seed}": seed for seed in params.lora_sft.seeds}
        seeds = list(runs.all([Run("seeds", train_seeds, (names, before, runs.adapters), tuple(names))]).values())
        result = {
            "model": key,
            "layers": runs.study.lm.layers,
            "parameters": seeds[0]["parameters"],
            "before": before,
            "by_step": [by_step([seed["watched"][i] for seed in seeds]) for i in range(len(seeds[0]["watched"]))],
            "final": final_summary([seed["final"] for seed in seeds]),
            "by_seed": seeds,
        }
        runs.finish(result)


def train_seeds(
    study: LoraSftStudy,
    work: Path,
    wanted: Sequence[str],
    seeds: Mapping[str, int],
    before: Mapping[str, Any],
    adapters: Path,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """All seeds together: the constant learning rate makes the first steps of a long run those of a short one."""
    lm, settings = study.lm, study.settings
    adapter = adapter_of(settings, study.n_layers, (*QKVO, *MLP))
    with adapted_together(lm, {name: Start(adapter, seed) for name, seed in seeds.items()}) as wrapped:
        members = {}
        for name, seed in seeds.items():
            trained_on = sample(study.problems.train, settings.samples, seed=seed)
            data = [encode(lm.tokenizer, problem.symbol, f" {problem.answer}") for problem in trained_on]
            members[name] = Member(data, Objective(0.0), seed, lambda: plain(watch(study)))
        text = f"plain LoRA of {lm.key}: {len(seeds)} seeds"
        trained = train_together(lm, wrapped, members, schedule_of(settings, 0), work=work, description=text)
        for name in wanted:
            save_adapter(wrapped, name, adapters / name)
            after = measure_both(study)
            for style in ("symbol", "word"):
                after[style]["growth"] = after[style]["peak"]["mean"] - before[style]["peak"]["mean"]
            yield name, {**curves_of(trained[name]), "final": after}


def watch(study: LoraSftStudy) -> dict[str, Any]:
    """Both metrics on the way, the controlled one on fewer problems."""
    return {
        "reported": reported_score(study.lm, study.settings.top),
        "symbol": alignment_over_layers(study, "symbol", study.settings.curve_problems),
    }


def measure_both(study: LoraSftStudy) -> dict[str, Any]:
    """Both metrics, on every test problem, and the answers."""
    now = study.answer()
    return {
        "reported": reported_score(study.lm, study.settings.top),
        **{style: alignment_over_layers(study, style) for style in ("symbol", "word")},
        "answers": {
            "exact": study.share(now.exact, study.units()),
            "log_prob": study.mean(now.log_prob, study.units()),
        },
    }


def alignment_over_layers(study: LoraSftStudy, style: str, n: int | None = None) -> dict[str, Any]:
    """Mean alignment at every layer, its peak (from L0 on), and how often the word is the top token there."""
    lens, units = study.read(study.prompts(style)[:n]), study.units(style)[:n]
    means = lens.own_word.mean(-1)
    peak = peak_row(means)
    return {
        "by_layer": means,
        "peak": study.mean(lens.own_word[peak], units),
        "peak_layer": study.lm.layers[peak],
        "peak_top": study.share(lens.is_top[peak], units),
    }


def by_step(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One point of the curves, over seeds."""
    paths = ("reported.score", "reported.control", "symbol.peak")
    return {
        "step": seeds[0]["step"],
        **summary_over_seeds(seeds, paths),
        "peak_layers": [seed["symbol"]["peak_layer"] for seed in seeds],
        "by_layer": np.mean([seed["symbol"]["by_layer"] for seed in seeds], axis=0),
    }


def final_summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers after training, over seeds."""
    paths = ("reported.score", "reported.control", "reported.excess", "symbol.peak", "symbol.growth", "word.peak",
             "word.growth", "answers.exact", "answers.log_prob")  # fmt: skip
    return summary_over_seeds(seeds, paths)


@torch.no_grad()
def reported_score(lm: LanguageModel, top: int) -> dict[str, Any]:
    """The write-up's score, on its ten prompts, which end in a lone space.

    For each layer the probability of the first of its top tokens that contains a word or sign of the operation; the
    largest over layers; the mean over the prompts that have one.

    ``control`` is the same score with the words and signs of the two other operations, averaged.
    """
    problems = [Problem.parse(text) for text in PROMPTS]
    states = residual_stream(lm, [f"{problem.symbol} " for problem in problems])
    blocks = slice(layer_row(0), None)
    best: dict[tuple[int, str], tuple[float, str, str]] = {}
    for label, rows in zip(lm.layers[blocks], states[blocks], strict=True):
        probabilities, ids = lm.readout.logits(rows).softmax(-1).topk(top)
        for i in range(len(problems)):
            tokens = [token_text(lm.tokenizer, int(t)) for t in ids[i]]
            for operation, wanted in SUBSTRINGS.items():
                hits = (j for j, token in enumerate(tokens) if any(w in token.lower() for w in wanted))
                if (j := next(hits, None)) is not None:
                    hit = (float(probabilities[i, j]), label, tokens[j])
                    best[i, operation] = max(best.get((i, operation), hit), hit, key=lambda one: one[0])
    own = [best.get((i, problem.operation)) for i, problem in enumerate(problems)]
    own_probabilities = [hit[0] for hit in own if hit]
    pairs = [(i, op) for i, problem in enumerate(problems) for op in SUBSTRINGS if op != problem.operation]
    others = [best[pair][0] for pair in pairs if pair in best]
    score, control = (sum(p) / len(p) if p else 0.0 for p in (own_probabilities, others))
    return {
        "score": score,
        "control": control,
        "excess": score - control,
        "prompts_with_hit": len(own_probabilities),
        "hits": [
            {
                "prompt": problem.symbol,
                **dict(zip(("probability", "layer", "hit_token"), hit or (None,) * 3, strict=True)),
            }
            for problem, hit in zip(problems, own, strict=True)
        ],
    }


if __name__ == "__main__":
    main(run, __doc__)
