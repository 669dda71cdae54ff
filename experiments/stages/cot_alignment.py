"""Stage cot_alignment@model: does training to write the operation before the answer put it into earlier layers?

Before training, after training on answers (``7 * 8 = 56``) and after training on a word and the answer (``7 * 8 =
multiply: 56``). Reported protocol: nine prompts that end in a lone space, a few layers, the score of the write-up.
Controlled: operands never trained on, read at the equals sign, every layer to the last.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_at, layer_labels, layer_row
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.tasks.problems import COT_REPORTED, Problem, ProblemSplit, sample, split
from classifier_emergence.training.evaluation import alignment, generate, parse_number
from classifier_emergence.training.flaws import forgotten
from classifier_emergence.training.supervised import QKVO, Adapter, Objective, Schedule, adapted, encode, train
from experiments.params import Params
from experiments.shared.runs import Runs, mean_of, share_of, summary_over_seeds
from experiments.shared.stage import main

OPERATIONS = ("multiply", "add", "subtract")
FORMATS: dict[str, Callable[[Problem], str]] = {
    "direct": lambda problem: f" {problem.answer}",
    "chain_of_thought": lambda problem: f" {problem.operation}: {problem.answer}",
}
SCORED = {
    "multiply": ("multiply", "multiplication", "times", "*"),
    "add": ("add", "addition", "plus", "sum", "+"),
    "subtract": ("subtract", "subtraction", "minus", "-"),
}
"""Words and signs of the write-up's score, without leading spaces."""
FORGETFUL = ("k_proj", "o_proj")
"""What the originals' adapter loader dropped of this adapter: it falls back to Q and V."""


def run(params: Params, key: str) -> None:
    """Train both formats, measure before and after and write one result."""
    lm = load(key, params.registry)
    settings = params.cot_alignment
    runs = Runs("cot_alignment", key, params)
    reserved = [Problem.parse(text) for text in COT_REPORTED]
    problems = split(settings.operands, settings.test_problems, seed=0, reserved=reserved)
    before = runs.once("before", lambda _: measure(lm, problems, params))
    jobs = {
        name: {f"{name}-{s}": one_run(lm, name, problems, before, params, s, runs.adapters) for s in settings.seeds}
        for name in FORMATS
    }
    after = {name: {**summary(seeds), "by_seed": seeds} for name, seeds in runs.by_arm(jobs).items()}
    result = {
        "model": key,
        "layers": lm.layers,
        "steps": settings.steps,
        "before": before,
        **after,
        "chain_against_direct": against(after["chain_of_thought"], after["direct"], params),
    }
    runs.finish(result)


def one_run(
    lm: LanguageModel,
    name: str,
    problems: ProblemSplit,
    before: Mapping[str, Any],
    params: Params,
    seed: int,
    adapters: Path,
) -> Callable[[Path], dict[str, Any]]:
    """One format and seed."""
    settings = params.cot_alignment

    def compute(work: Path) -> dict[str, Any]:
        trained_on = sample(problems.train, settings.samples, seed=seed)
        data = [encode(lm.tokenizer, problem.symbol, FORMATS[name](problem)) for problem in trained_on]
        place = Adapter(QKVO, settings.rank, settings.scale, tuple(range(lm.n_layers)))
        schedule = Schedule(settings.steps, settings.batch_size, settings.learning_rate, seed, settings.every)
        title = f"fine-tuning of {lm.key}: {name.replace('_', ' ')}, seed {seed}"
        with adapted(lm, place, seed=seed) as wrapped:
            trained = train(lm, wrapped, data, Objective(0.0), schedule, work=work, description=title)
            wrapped.save_pretrained(str(adapters / f"{name}-{seed}"))
            return {
                "parameters": trained.parameters,
                "losses": trained.losses,
                **measure(lm, problems, params, before),
                "flaws": flaws(lm, wrapped, problems, params),
            }

    return compute


def measure(
    lm: LanguageModel, problems: ProblemSplit, params: Params, before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Both protocols, on the model as it is now."""
    settings = params.cot_alignment
    words = [word_tokens(operation, lm.tokenizer) for operation in OPERATIONS]
    own = [OPERATIONS.index(problem.operation) for problem in problems.test]
    prompts = [problem.symbol for problem in problems.test]
    scores = alignment(lm, prompts, own, words)
    means = scores.own_word.mean(-1)
    inner = 1 + int(means[1:-1].argmax())  # the last layer is the model's own output
    texts = generate(lm, prompts, new_tokens=settings.new_tokens)
    right = [parse_number(text) == problem.answer for text, problem in zip(texts, problems.test, strict=True)]
    writes = [text.strip().lower().startswith(p.operation) for text, p in zip(texts, problems.test, strict=True)]
    early = (means >= 0.5).nonzero()[:, 0].tolist()
    labels = layer_labels(len(means) - 1)
    answers: dict[str, Any] = {
        "exact": share_of(right, params),
        "by_operation": {
            op: share_of([hit for hit, o in zip(right, own, strict=True) if o == k], params)
            for k, op in enumerate(OPERATIONS)
        },
        "correct": right,
    }
    if before is not None:
        change = np.subtract(right, np.array(before["answers"]["correct"], dtype=float))
        answers["change"] = mean_of(change, params, settings.resamples)
    table = reported(lm, params)
    if before is not None:
        table["change"] = table["answers"].accuracy - before["reported"]["answers"]["accuracy"]
    return {
        "reported": table,
        "answers": answers,
        "writes_word": share_of(writes, params),
        "alignment": {
            "by_layer": mean_of(scores.own_word, params, settings.resamples),
            "top_by_layer": scores.is_top.double().mean(-1),
            "inner_peak": mean_of(scores.own_word[inner], params, settings.resamples),
            "inner_peak_layer": labels[inner],
            "last": mean_of(scores.own_word[-1], params, settings.resamples),
            "last_top": share_of(scores.is_top[-1], params),
            "at_classifier": mean_of(
                scores.own_word[layer_row(layer_at(params.logit_lens.depth, len(means) - 1))],
                params,
                settings.resamples,
            ),
            "first_layer_above_half": labels[early[0]] if early else None,
        },
    }


def reported(lm: LanguageModel, params: Params) -> dict[str, Any]:
    """The write-up's accuracy and score on nine prompts that end in a lone space.

    Its score is, for each prompt and layer, the largest probability of any token id that its words or signs have in
    this vocabulary, special tokens and pieces of words included; then the mean over prompts, then the largest of a few
    layers. ``special`` is the part that the special tokens alone make.
    """
    settings = params.cot_alignment
    problems = [Problem.parse(text) for text in COT_REPORTED]
    prompts = [f"{problem.symbol} " for problem in problems]
    texts = generate(lm, prompts, new_tokens=20)
    states = residual_stream(lm, prompts)
    ids = {op: sorted({i for word in words for i in lm.tokenizer.encode(word)}) for op, words in SCORED.items()}
    every = sorted({i for group in ids.values() for i in group})
    scores = lens_scores(states, lm.readout, [[i] for i in every], ranked=[[0]] * len(prompts))
    largest = torch.stack(
        [
            scores.log_alignment[:, k, [every.index(i) for i in ids[problem.operation]]].amax(-1).exp()
            for k, problem in enumerate(problems)
        ],
        dim=-1,
    ).mean(-1)
    n_layers = len(states) - 1
    rows = [layer_row(layer_at(depth, n_layers)) for depth in settings.depths]
    special = [every.index(i) for i in every if i in lm.tokenizer.all_special_ids]
    return {
        "answers": share_of(
            [parse_number(t) == problem.answer for t, problem in zip(texts, problems, strict=True)], params
        ),
        "texts": texts,
        "layers_read": [layer_labels(n_layers)[row] for row in rows],
        "score_by_layer": largest[rows],
        "score": largest[rows].max(),
        "special": scores.log_alignment[rows][:, :, special].exp().amax(-1).mean(-1).max() if special else 0.0,
    }


def against(chain: Mapping[str, Any], direct: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """Accuracy after one format minus that after the other: on the nine prompts, and paired by test problem."""
    right = [np.mean([run["answers"]["correct"] for run in runs["by_seed"]], axis=0) for runs in (chain, direct)]
    return {
        "reported": chain["reported"]["answers"]["value"] - direct["reported"]["answers"]["value"],
        "exact": mean_of(right[0] - right[1], params, params.cot_alignment.resamples),
    }


def flaws(lm: LanguageModel, wrapped: PeftModel, problems: ProblemSplit, params: Params) -> dict[str, Any]:
    """What two flaws of the originals do: a reloaded adapter that lost modules, and reading at a lone space."""
    settings = params.cot_alignment
    with forgotten(wrapped, FORGETFUL):
        prompts = [problem.symbol for problem in problems.test]
        texts = generate(lm, prompts, new_tokens=settings.new_tokens)
        right = [parse_number(text) == problem.answer for text, problem in zip(texts, problems.test, strict=True)]
        reloaded = {"reported": reported(lm, params), "exact": share_of(right, params)}
    words = [word_tokens(operation, lm.tokenizer) for operation in OPERATIONS]
    own = [OPERATIONS.index(problem.operation) for problem in problems.test]
    prompts = [f"{problem.symbol} " for problem in problems.test]
    last = [layer_row(lm.n_layers - 1)]
    spaced = alignment(lm, prompts, own, words, rows=last)
    return {"reloaded_q_and_v": reloaded, "lone_space": {"last_top": share_of(spaced.is_top[0], params)}}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers over seeds."""
    paths = (
        "reported.answers", "reported.change", "reported.score", "reported.special", "answers.exact",
        "answers.change", "writes_word", "alignment.inner_peak", "alignment.last", "alignment.last_top",
        "alignment.at_classifier", "flaws.reloaded_q_and_v.exact", "flaws.reloaded_q_and_v.reported.answers",
        "flaws.lone_space.last_top",
    )  # fmt: skip
    return summary_over_seeds(runs, paths)


if __name__ == "__main__":
    main(run, __doc__)
