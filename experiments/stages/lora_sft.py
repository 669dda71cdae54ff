"""Stage lora_sft@model: does plain LoRA fine-tuning on answers make the lens say the operation?

Reported protocol: any of the lens's top tokens at any layer that contains a word or sign of the operation. Controlled:
alignment of the operation word at every layer, on operands never trained on.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_labels
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import token_text, word_tokens
from classifier_emergence.results import plain
from classifier_emergence.tasks.problems import COT_REPORTED, Problem, ProblemSplit, sample, split
from classifier_emergence.training.evaluation import alignment, answers
from classifier_emergence.training.supervised import MLP, QKVO, Adapter, Objective, Schedule, adapted, encode, train
from experiments.params import Params
from experiments.shared.runs import Runs, mean_of, share_of, summary_over_seeds
from experiments.shared.stage import main

PROMPTS = (*COT_REPORTED, "45 * 45")
"""The ten problems of the write-up."""
SUBSTRINGS = {
    "multiply": ("multiply", "times", "product", "*", "×"),
    "add": ("add", "plus", "sum", "+"),
    "subtract": ("subtract", "minus", "difference", "-"),
}
"""What a token must contain, in lower case, to count as a classifier under the reported protocol."""


def run(params: Params, key: str) -> None:
    """Train, measure on the way and after it and write one result."""
    lm = load(key, params.registry)
    settings = params.lora_sft
    runs = Runs("lora_sft", key, params)
    reserved = [Problem.parse(text) for text in PROMPTS]
    problems = split(settings.operands, dict.fromkeys(SUBSTRINGS, settings.test_problems), seed=0, reserved=reserved)
    before = runs.once("before", lambda _: measure(lm, problems, params))
    jobs = {f"seed-{seed}": one_run(lm, problems, before, params, seed, runs.adapters) for seed in settings.seeds}
    seeds = list(runs.all(jobs).values())
    result = {
        "model": key,
        "layers": lm.layers,
        "parameters": seeds[0]["parameters"],
        "before": before,
        "by_step": [by_step([seed["watched"][i] for seed in seeds]) for i in range(len(seeds[0]["watched"]))],
        "final": final([seed["final"] for seed in seeds]),
        "by_seed": seeds,
    }
    runs.finish(result)


def one_run(
    lm: LanguageModel, problems: ProblemSplit, before: Mapping[str, Any], params: Params, seed: int, adapters: Path
) -> Callable[[Path], dict[str, Any]]:
    """One seed: the constant learning rate makes the first steps of a long run those of a short one."""
    settings = params.lora_sft

    def compute(work: Path) -> dict[str, Any]:
        n_layers = lm.n_layers
        trained_on = sample(problems.train, settings.samples, seed=seed)
        data = [encode(lm.tokenizer, problem.symbol, f" {problem.answer}") for problem in trained_on]
        place = Adapter((*QKVO, *MLP), settings.rank, settings.scale, tuple(range(n_layers)))
        schedule = Schedule(settings.steps, settings.batch_size, settings.learning_rate, seed, settings.every)
        title = f"plain LoRA of {lm.key}: seed {seed}"
        with adapted(lm, place, seed=seed) as wrapped:
            trained = train(
                lm, wrapped, data, Objective(0.0), schedule, work=work, description=title,
                watch=lambda: plain(watch(lm, problems, params)),
            )  # fmt: skip
            wrapped.save_pretrained(str(adapters / f"seed-{seed}"))
            after = measure(lm, problems, params)
        for style in ("symbol", "word"):
            after[style]["growth"] = after[style]["peak"]["mean"] - before[style]["peak"]["mean"]
        return {
            "parameters": trained.parameters,
            "losses": trained.losses,
            "watched": trained.watched,
            "final": after,
        }

    return compute


def watch(lm: LanguageModel, problems: ProblemSplit, params: Params) -> dict[str, Any]:
    """Both metrics on the way, the controlled one on fewer problems."""
    settings = params.lora_sft
    return {
        "reported": reported(lm, settings.top),
        "symbol": read(lm, "symbol", problems.test[: settings.curve_problems], params),
    }


def measure(lm: LanguageModel, problems: ProblemSplit, params: Params) -> dict[str, Any]:
    """Both metrics, on every test problem, and the answers."""
    settings = params.lora_sft
    wanted = [f" {problem.answer}" for problem in problems.test]
    found = answers(lm, [problem.symbol for problem in problems.test], wanted)
    return {
        "reported": reported(lm, settings.top),
        "symbol": read(lm, "symbol", problems.test, params),
        "word": read(lm, "word", problems.test, params),
        "answers": {
            "exact": share_of(found.exact, params),
            "log_prob": mean_of(found.log_prob, params, settings.resamples),
        },
    }


def read(lm: LanguageModel, style: str, problems: Sequence[Problem], params: Params) -> dict[str, Any]:
    """Mean alignment at every layer, its peak (from L0 on), and how often the word is the top token there."""
    operations = list(SUBSTRINGS)
    words = [word_tokens(operation, lm.tokenizer) for operation in operations]
    own = [operations.index(problem.operation) for problem in problems]
    # Problems of the operations stand in turn: one template serves one of each.
    prompts = [
        problem.symbol if style == "symbol" else problem.prompt(style, i // len(operations))
        for i, problem in enumerate(problems)
    ]
    scores = alignment(lm, prompts, own, words)
    means = scores.own_word.mean(-1)
    peak = 1 + int(means[1:].argmax())
    return {
        "by_layer": means,
        "peak": mean_of(scores.own_word[peak], params, params.lora_sft.resamples),
        "peak_layer": layer_labels(len(means) - 1)[peak],
        "peak_top": share_of(scores.is_top[peak], params),
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


def final(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers after training, over seeds."""
    paths = ("reported.score", "reported.control", "reported.excess", "symbol.peak", "symbol.growth", "word.peak",
             "word.growth", "answers.exact", "answers.log_prob")  # fmt: skip
    return summary_over_seeds(seeds, paths)


@torch.no_grad()
def reported(lm: LanguageModel, top: int) -> dict[str, Any]:
    """The write-up's score, on its ten prompts, which end in a lone space.

    For each layer the probability of the first of its top tokens that contains a word or sign of the operation; the
    largest over layers; the mean over the prompts that have one.

    ``control`` is the same score with the words and signs of the two other operations, averaged.
    """
    problems = [Problem.parse(text) for text in PROMPTS]
    states = residual_stream(lm, [f"{problem.symbol} " for problem in problems])
    readout = lm.readout
    best: dict[tuple[int, str], tuple[float, str, str]] = {}
    for label, rows in zip(layer_labels(len(states) - 1)[1:], states[1:], strict=True):
        probabilities, ids = readout.logits(rows).softmax(-1).topk(top)
        for i in range(len(problems)):
            tokens = [token_text(lm.tokenizer, int(t)) for t in ids[i]]
            for operation, wanted in SUBSTRINGS.items():
                hits = (j for j, token in enumerate(tokens) if any(w in token.lower() for w in wanted))
                if (j := next(hits, None)) is not None:
                    hit = (float(probabilities[i, j]), label, tokens[j])
                    best[i, operation] = max(best.get((i, operation), hit), hit, key=lambda found: found[0])
    own = [best.get((i, problem.operation)) for i, problem in enumerate(problems)]
    other = [best[i, op][0] for i, problem in enumerate(problems) for op in SUBSTRINGS
             if op != problem.operation and (i, op) in best]  # fmt: skip
    found = [hit[0] for hit in own if hit]
    score = sum(found) / len(found) if found else 0.0
    control = sum(other) / len(other) if other else 0.0
    return {
        "score": score,
        "control": control,
        "excess": score - control,
        "prompts_with_hit": len(found),
        "hits": [
            {"prompt": problem.symbol, "layer": hit[1] if hit else None, "hit_token": hit[2] if hit else None,
             "probability": hit[0] if hit else None}
            for problem, hit in zip(problems, own, strict=True)
        ],
    }  # fmt: skip


if __name__ == "__main__":
    main(run, __doc__)
