"""Stage lora_sft@model: does plain LoRA fine-tuning on answers make the lens say the operation?

Reported protocol: any of the lens's top tokens at any layer that contains a word or sign of the operation. Controlled:
alignment of the operation word at every layer, on operands never trained on.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from classifier_emergence.effects import alignment, answers
from classifier_emergence.layers import layer_labels
from classifier_emergence.models import LanguageModel, load
from classifier_emergence.params import Params
from classifier_emergence.problems import COT_REPORTED, Problem, Split, sample, split
from classifier_emergence.readout import decoder_blocks, find_readout
from classifier_emergence.residuals import residual_stream
from classifier_emergence.results import plain
from classifier_emergence.tasks import N_TEMPLATES
from classifier_emergence.training import MLP, QKVO, Adapter, Objective, Schedule, adapted, encode, train
from classifier_emergence.vocabulary import WordTokens, token_text, word_tokens
from experiments.stage import main
from experiments.training import Runs, mean_of, over_seeds, share_of

PROMPTS = (*COT_REPORTED, "45 * 45")
"""The ten problems of the write-up."""
SUBSTRINGS = {
    "multiply": ("multiply", "times", "product", "*", "×"),
    "add": ("add", "plus", "sum", "+"),
    "subtract": ("subtract", "minus", "difference", "-"),
}
"""What a token must contain, in lower case, to count as a classifier under the reported protocol."""


def run(params: Params, key: str) -> None:
    """Train, measure after so many steps and write one result."""
    lm = load(key, params.registry)
    settings = params.lora_sft
    runs = Runs("lora_sft", key, params)
    reserved = [Problem.parse(text) for text in PROMPTS]
    problems = split(settings.operands, dict.fromkeys(SUBSTRINGS, settings.test_problems), seed=0, reserved=reserved)
    seeds = [runs.once(f"seed-{seed}", one_run(lm, problems, params, seed, runs.adapters)) for seed in settings.seeds]
    result = {
        "model": key,
        "layers": layer_labels(len(decoder_blocks(lm.model))),
        "parameters": seeds[0]["parameters"],
        "steps": [0, *settings.steps],
        "by_seed": seeds,
        "over_seeds": [
            {
                "step": at["step"],
                **{
                    path.replace(".", "_"): over_seeds([seed["measured"][i] for seed in seeds], path)
                    for path in ("reported.score", "reported.control", "symbol.peak", "word.peak", "answers.exact",
                                 "answers.log_prob")
                },
            }
            for i, at in enumerate(seeds[0]["measured"])
        ],
    }  # fmt: skip
    runs.finish(result)


def one_run(
    lm: LanguageModel, problems: Split, params: Params, seed: int, adapters: Path
) -> Callable[[Path], dict[str, Any]]:
    """One seed: the constant learning rate makes the first steps of a long run those of a short one."""
    settings = params.lora_sft

    def compute(work: Path) -> dict[str, Any]:
        n_layers = len(decoder_blocks(lm.model))
        trained_on = sample(problems.train, settings.samples, seed=seed)
        data = [encode(lm.tokenizer, problem.symbol, f" {problem.answer}", 0) for problem in trained_on]
        place = Adapter((*QKVO, *MLP), settings.rank, settings.scale, tuple(range(n_layers)))
        every = math.gcd(*settings.steps)
        schedule = Schedule(max(settings.steps), settings.batch_size, settings.learning_rate, seed, every)
        with adapted(lm.model, place, seed=seed) as wrapped:
            trained = train(
                wrapped,
                lm.tokenizer,
                data,
                Objective(0.0),
                schedule,
                work=work,
                watch=lambda: plain(measure(lm, problems, params)),
                description=f"plain LoRA of {lm.key}: seed {seed}",
            )
            wrapped.save_pretrained(str(adapters / f"seed-{seed}"))
        wanted = (0, *settings.steps)
        return {
            "parameters": trained.parameters,
            "losses": trained.losses,
            "measured": [entry for entry in trained.watched if entry["step"] in wanted],
        }

    return compute


def measure(lm: LanguageModel, problems: Split, params: Params) -> dict[str, Any]:
    """The reported and the controlled metric, and the answers."""
    settings = params.lora_sft
    words = [word_tokens(operation, lm.tokenizer) for operation in SUBSTRINGS]
    operations = list(SUBSTRINGS)
    own = [operations.index(problem.operation) for problem in problems.test]
    symbols = [problem.symbol for problem in problems.test]
    texts = [problem.prompt("word", i // len(operations) % N_TEMPLATES) for i, problem in enumerate(problems.test)]
    found = answers(lm.model, lm.tokenizer, symbols, [f" {problem.answer}" for problem in problems.test])
    return {
        "reported": reported(lm, settings.top),
        "symbol": by_layer(lm, symbols, own, words, params),
        "word": by_layer(lm, texts, own, words, params),
        "answers": {
            "exact": share_of(found.exact, params),
            "log_prob": mean_of(found.log_prob, params, settings.resamples),
        },
    }


def by_layer(
    lm: LanguageModel, prompts: Sequence[str], own: Sequence[int], words: Sequence[WordTokens], params: Params
) -> dict[str, Any]:
    """Mean alignment at every layer, its peak (from L0 on), and how often the word is the top token there."""
    scores = alignment(lm.model, lm.tokenizer, prompts, own, words)
    means = scores.own.mean(-1)
    peak = 1 + int(means[1:].argmax())
    labels = layer_labels(len(means) - 1)
    return {
        "alignment": means,
        "peak": mean_of(scores.own[peak], params, params.lora_sft.resamples),
        "peak_layer": labels[peak],
        "peak_top": share_of(scores.is_top[peak], params),
    }


@torch.no_grad()
def reported(lm: LanguageModel, top: int) -> dict[str, Any]:
    """The write-up's score, on its ten prompts, which end in a lone space.

    For each layer the probability of the first of its top tokens that contains a word or sign of the operation; the
    largest over layers; the mean over the prompts that have one.

    ``control`` is the same score with the words and signs of the two other operations, averaged.
    """
    problems = [Problem.parse(text) for text in PROMPTS]
    states = residual_stream(lm.model, lm.tokenizer, [f"{problem.symbol} " for problem in problems])
    readout = find_readout(lm.model)
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
    return {
        "score": sum(found) / len(found) if found else 0.0,
        "control": sum(other) / len(other) if other else 0.0,
        "prompts_with_hit": len(found),
        "hits": [
            {"prompt": problem.symbol, "layer": hit[1] if hit else None, "hit_token": hit[2] if hit else None,
             "probability": hit[0] if hit else None}
            for problem, hit in zip(problems, own, strict=True)
        ],
    }  # fmt: skip


if __name__ == "__main__":
    main(run, __doc__)
