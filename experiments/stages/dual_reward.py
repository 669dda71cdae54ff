"""Stage dual_reward@model: does a loss on the lens make it say the operation, what does that cost, and who reads it?

Reported protocol: the eight prompts, full-vocabulary top token at layer int(depth * n). Controlled: operands never
trained on, in symbols, words and stories; controls that tell learning from construction; answers and text before and
after. Flaws of the originals are arms of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel

from classifier_emergence.errors import InputError
from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_at, layer_row
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import WordTokens, token_text, word_tokens
from classifier_emergence.tasks.arithmetic import LENS, OPERATIONS, STYLES, labelled
from classifier_emergence.tasks.problems import NEUTRAL, Problem, sample, split
from classifier_emergence.training.evaluation import (
    Alignment,
    Answers,
    alignment,
    answers,
    divergence,
    random_basis,
    subspace_removed,
    word_basis,
)
from classifier_emergence.training.flaws import forgotten
from classifier_emergence.training.supervised import (
    HEAD,
    MLP,
    QK,
    QKVO,
    VO,
    Adapter,
    Example,
    Objective,
    Schedule,
    Trained,
    adapted,
    encode,
    train,
)
from experiments.params import Params
from experiments.shared.runs import Runs, mean_of, share_of, summary_over_seeds
from experiments.shared.stage import main


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    modules: tuple[str, ...] = VO
    depth: float | None = None
    class_weight: float | None = None
    all_layers: bool = False
    targets: str = "words"
    """``words``, ``bare`` (first token of the bare word), ``arbitrary`` (other words) or ``shuffled``."""
    read: Literal["prompt", "answer"] = "prompt"
    answer_shifted: bool = True
    head: bool = False
    several_seeds: bool = False


@dataclass
class Study:
    """What all arms share."""

    lm: LanguageModel
    params: Params
    words: list[WordTokens] = field(init=False)

    def __post_init__(self) -> None:
        self.settings = self.params.dual_reward
        self.n_layers = self.lm.n_layers
        self.layer = layer_at(self.settings.depth, self.n_layers)
        self.words = [word_tokens(operation, self.lm.tokenizer) for operation in OPERATIONS]
        reserved = [Problem.parse(text) for text in labelled(LENS)[0]]
        tested = dict.fromkeys(OPERATIONS, self.settings.test_problems)
        self.problems = split(self.settings.operands, tested, seed=0, reserved=reserved)
        self.own = [OPERATIONS.index(problem.operation) for problem in self.problems.test]

    def prompts(self, style: str) -> list[str]:
        """The test problems in a style; words and stories use every template in turn."""
        if style == "symbol":
            return [problem.symbol for problem in self.problems.test]
        # Problems of the four operations stand in turn: one template serves four problems, one of each.
        return [p.prompt(style, i // len(OPERATIONS)) for i, p in enumerate(self.problems.test)]

    def read(self, style: str, rows: Sequence[int] | None, words: list[WordTokens] | None = None) -> Alignment:
        """The lens on the test problems."""
        lm = self.lm
        return alignment(lm, self.prompts(style), self.own, words or self.words, rows=rows)

    def answer(self) -> Answers:
        """Answers to the test problems."""
        wanted = [f" {problem.answer}" for problem in self.problems.test]
        return answers(self.lm, self.prompts("symbol"), wanted)

    @cached_property
    def base_answers(self) -> Answers:
        """Answers of the base model; ask before an adapter is on."""
        return self.answer()


def run(params: Params, key: str) -> None:
    """Train every arm, measure what each did and write one result."""
    study = Study(load(key, params.registry), params)
    settings = study.settings
    runs = Runs("dual_reward", key, params)
    before = runs.once("base", lambda _: measure(study, None, study.layer, study.words, full=True))
    _ = study.base_answers

    first = settings.seeds[0]
    jobs = {"main": {f"main-{first}": main_arm(study, first, runs.adapters / f"seed-{first}")}}
    for name, arm in all_arms(params).items():
        seeds = settings.seeds if arm.several_seeds else settings.seeds[:1]
        jobs[name] = {f"{name}-{seed}": short_arm(study, name, arm, seed) for seed in seeds}
    found = runs.by_arm(jobs)
    full = found.pop("main")[0]
    arms = {name: summary(seeds) for name, seeds in found.items()}
    result = {
        "model": key,
        "layers": study.lm.layers,
        "layer": study.lm.layers[layer_row(study.layer)],
        "n_trained_on": {operation: len(found) for operation, found in study.problems.train.items()},
        "before": before,
        "steps": {"main": settings.steps, "arms": settings.arm_steps, "further": settings.further_steps},
        "main": full,
        "arms": arms,
    }
    runs.finish(result)


def all_arms(params: Params) -> dict[str, Arm]:
    """Every arm by name; ``vo`` is the main one, over seeds and as short as the others, to compare with."""
    depths = {f"depth_{round(100 * depth)}": Arm(depth=depth) for depth in params.dual_reward.depths}
    weights = {f"weight_{round(100 * w)}": Arm(class_weight=w) for w in params.dual_reward.class_weights}
    return {
        "vo": Arm(several_seeds=True),
        "qk": Arm(QK, several_seeds=True),
        "mlp": Arm(MLP),
        "all_linear": Arm((*QKVO, *MLP), several_seeds=True),
        "vo_all_layers": Arm(all_layers=True),
        **depths,
        **weights,
        "arbitrary_words": Arm(targets="arbitrary"),
        "shuffled_targets": Arm(targets="shuffled"),
        "class_only": Arm(class_weight=1.0),
        "answer_only": Arm(class_weight=0.0),
        "head": Arm(head=True, several_seeds=True),
        "unshifted_answers": Arm(answer_shifted=False),
        "read_after_answer": Arm(read="answer"),
        "bare_targets": Arm(targets="bare"),
    }


def main_arm(study: Study, seed: int, folder: Path) -> Callable[[Path], dict[str, Any]]:
    """The main arm at full length, then on the answer alone, with its adapter saved."""

    def compute(work: Path) -> dict[str, Any]:
        settings, layer = study.settings, study.layer
        data = examples(study, Arm(), seed)
        with adapted(study.lm, adapter(study, Arm()), seed=seed) as wrapped:
            text = f"main, seed {seed}"
            trained = fit(study, wrapped, data, Arm(), seed, settings.steps, work / "main", text, by_layer=True)
            wrapped.save_pretrained(str(folder))
            result = {
                **curve(trained, study.settings.threshold),
                **measure(study, wrapped, layer, study.words, full=True),
                "lone_space": lone_space(study, layer),
                "without_o": without_o(study, wrapped, layer),
                "reading": reading(study, layer),
            }
            alone, text = Arm(class_weight=0.0), f"answers alone, seed {seed}"
            further = fit(study, wrapped, data, alone, seed, settings.further_steps, work / "further", text)
            after = measure(study, wrapped, layer, study.words, full=False)
            result["further"] = {"watched": further.watched, **after}
        return result

    return compute


def short_arm(study: Study, name: str, arm: Arm, seed: int) -> Callable[[Path], dict[str, Any]]:
    """Any other arm, for fewer steps."""

    def compute(work: Path) -> dict[str, Any]:
        layer = layer_of(study, arm)
        classes = len(OPERATIONS) if arm.head else None
        words = arbitrary(study) if arm.targets == "arbitrary" else study.words
        with adapted(study.lm, adapter(study, arm), seed=seed, classes=classes) as wrapped:
            text = f"{name.replace('_', ' ')}, seed {seed}"
            trained = fit(study, wrapped, examples(study, arm, seed), arm, seed, study.settings.arm_steps, work, text)
            result = {**curve(trained, study.settings.threshold), **measure(study, wrapped, layer, words, full=False)}
            if arm.head:
                result["head"] = head_accuracy(study, wrapped, layer)
        return result

    return compute


def layer_of(study: Study, arm: Arm) -> int:
    """The classifier layer of an arm."""
    return study.layer if arm.depth is None else layer_at(arm.depth, study.n_layers)


def adapter(study: Study, arm: Arm) -> Adapter:
    """Where the arm's low-rank update goes."""
    settings = study.settings
    if arm.all_layers:
        return Adapter(arm.modules, settings.rank_all_layers, settings.scale, tuple(range(study.n_layers)))
    return Adapter(arm.modules, settings.rank, settings.scale, tuple(range(layer_of(study, arm))))


def arbitrary(study: Study) -> list[WordTokens]:
    """Words that have nothing to do with the operations, one for each."""
    return [word_tokens(word, study.lm.tokenizer) for word in study.settings.arbitrary_words]


def target_ids(study: Study, arm: Arm) -> list[int]:
    """What the lens (or the head) should say for each operation."""
    if arm.head:
        return list(range(len(OPERATIONS)))
    words = arbitrary(study) if arm.targets == "arbitrary" else study.words
    if arm.targets == "bare":
        return [word.strict_id for word in words]
    for word in words:
        if f" {word.word}" not in word.forms:
            raise InputError(f"target word {word.word!r}: with a leading space it is no single token of {study.lm.key}")
    return [word.forms[f" {word.word}"] for word in words]


def examples(study: Study, arm: Arm, seed: int) -> list[Example]:
    """Training problems with their targets."""
    problems = sample(study.problems.train, study.settings.samples, seed=seed)
    classes = np.array([OPERATIONS.index(problem.operation) for problem in problems])
    if arm.targets == "shuffled":
        classes = np.random.default_rng(seed).permutation(classes)
    ids = target_ids(study, arm)
    pairs = zip(problems, classes.tolist(), strict=True)
    return [encode(study.lm.tokenizer, problem.symbol, f" {problem.answer}", ids[c]) for problem, c in pairs]


def fit(
    study: Study,
    wrapped: PeftModel,
    data: list[Example],
    arm: Arm,
    seed: int,
    steps: int,
    work: Path,
    text: str,
    *,
    by_layer: bool = False,
) -> Trained:
    """Train one arm, watching the lens on a few test problems: at the classifier layer, or at every one."""
    settings = study.settings
    weight = settings.class_weight if arm.class_weight is None else arm.class_weight
    objective = Objective(
        weight,
        layer_of(study, arm),
        answer_shifted=arm.answer_shifted,
        read=arm.read,
        classes=len(OPERATIONS) if arm.head else None,
    )
    schedule = Schedule(steps, settings.batch_size, settings.learning_rate, seed, settings.every)
    n = settings.curve_problems
    prompts, own = study.prompts("symbol")[:n], study.own[:n]
    words = arbitrary(study) if arm.targets == "arbitrary" else study.words

    row = layer_row(layer_of(study, arm))

    def watch() -> dict[str, Any]:
        scores = alignment(study.lm, prompts, own, words, rows=None if by_layer else [row])
        means = scores.own_word.mean(-1).tolist()
        return {"alignment": means[row], "by_layer": means} if by_layer else {"alignment": means[0]}

    title = f"dual reward of {study.lm.key}: {text}"
    return train(study.lm, wrapped, data, objective, schedule, work=work, watch=watch, description=title)


def curve(trained: Trained, threshold: float) -> dict[str, Any]:
    """Losses and alignment by step, and the first step at which alignment passed the threshold."""
    passed = [entry["step"] for entry in trained.watched if entry["alignment"] >= threshold]
    return {
        "parameters": trained.parameters,
        "losses": trained.losses,
        "watched": trained.watched,
        "first_step_above_threshold": passed[0] if passed else None,
    }


def measure(
    study: Study, wrapped: PeftModel | None, layer: int, words: list[WordTokens], *, full: bool
) -> dict[str, Any]:
    """What the model does now: the reported table, alignment on held-out operands, answers, distance from the base."""
    params, resamples = study.params, study.settings.resamples
    row = layer_row(layer)
    styles = STYLES if full else STYLES[:2]  # stories are long, so only the main arm reads them
    result: dict[str, Any] = {"reported": reported(study, row, words)}
    for style in styles:
        scores = study.read(style, None if full else [row], words)
        at = row if full else 0
        result[style] = {
            "alignment": mean_of(scores.own_word[at], params, resamples),
            "top": share_of(scores.is_top[at], params),
            "choice": share_of(scores.choice[at] == torch.tensor(study.own), params),
        }
        if full:
            result[style]["by_layer"] = mean_of(scores.own_word, params, resamples)
    found = study.answer()
    result["answers"] = {
        "exact": share_of(found.exact, params),
        "log_prob": mean_of(found.log_prob, params, resamples),
        "loss": -found.per_token.mean(),
        "by_operation": {
            op: share_of(found.exact[torch.tensor(study.own) == o], params) for o, op in enumerate(OPERATIONS)
        },
    }
    if wrapped is not None:
        result["answers"]["change"] = mean_of(found.log_prob - study.base_answers.log_prob, params, resamples)
        result["kl"] = mean_of(divergence(study.lm, wrapped, NEUTRAL), params, resamples)
    return result


def reported(study: Study, row: int, words: list[WordTokens], *, ending: str = "") -> dict[str, Any]:
    """The originals' table: eight prompts, top token over the full vocabulary at one layer."""
    prompts, own = labelled(LENS)
    texts = [prompt + ending for prompt in prompts]
    scores = alignment(study.lm, texts, own, words, rows=[row])
    shown = [token_text(study.lm.tokenizer, int(i)) for i in scores.top_id[0]]
    table = [
        {"prompt": prompt, "top_token": top, "top_probability": p, "own_probability": q}
        for prompt, top, p, q in zip(prompts, shown, scores.top_probability[0], scores.own_word[0], strict=True)
    ]
    probabilities = scores.own_word[0]
    return {
        "prompts": table,
        "top": share_of(scores.is_top[0], study.params),
        "least_probability": probabilities.min(),
        "largest_probability": probabilities.max(),
    }


def lone_space(study: Study, layer: int) -> dict[str, Any]:
    """Flaw: the same table with prompts that end in a lone space, where the originals read."""
    return reported(study, layer_row(layer), study.words, ending=" ")


def without_o(study: Study, wrapped: PeftModel, layer: int) -> dict[str, Any]:
    """Flaw: the same table with an adapter that was reloaded without its O part."""
    with forgotten(wrapped, ["o_proj"]):
        return reported(study, layer_row(layer), study.words)


def head_accuracy(study: Study, wrapped: PeftModel, layer: int) -> dict[str, Any]:
    """How often the linear head names the operation, at the classifier layer."""
    head = wrapped.get_base_model().get_submodule(HEAD)
    norm = study.lm.readout.norm
    found = {}
    for style in STYLES[:2]:
        states = residual_stream(study.lm, study.prompts(style))[layer_row(layer)]
        with torch.no_grad():
            guess = head(norm(states)).argmax(-1)
        found[style] = share_of(guess == torch.tensor(study.own), study.params)
    return found


def reading(study: Study, layer: int) -> dict[str, Any]:
    """Does anything read the words' directions? Answers without them, against answers without random directions.

    The random direction takes away a vector of equal norm. Changes are paired by problem.
    """
    params, settings = study.params, study.settings
    basis = word_basis(study.words, study.lm.readout)
    whole = study.answer().log_prob
    with subspace_removed(study.lm, layer, basis):
        no_words = study.answer().log_prob - whole
    random = []
    for draw in range(settings.random_removals):
        with subspace_removed(study.lm, layer, basis, random_basis(basis, seed=draw)):
            random.append(study.answer().log_prob - whole)
    null = torch.stack(random)
    return {
        "directions": len(basis),
        "words": mean_of(no_words, params, settings.resamples),
        "random": mean_of(null.mean(0), params, settings.resamples),
        "random_by_draw": null.mean(-1),
        "difference": mean_of(no_words - null.mean(0), params, settings.resamples),
    }


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of an arm over its seeds."""
    paths = ["reported.top", "reported.least_probability", "reported.largest_probability", "answers.exact",
             "answers.log_prob", "answers.loss", "answers.change", "kl"]  # fmt: skip
    paths += [f"{style}.{what}" for style in STYLES for what in ("alignment", "top", "choice") if style in runs[0]]
    paths += ["head.symbol", "head.word"] if "head" in runs[0] else []
    return {
        "seeds": len(runs),
        "parameters": runs[0]["parameters"],
        "first_step_above_threshold": [run["first_step_above_threshold"] for run in runs],
        "final_losses": [run["losses"][-1] for run in runs],
        **summary_over_seeds(runs, paths),
    }


if __name__ == "__main__":
    main(run, __doc__)
