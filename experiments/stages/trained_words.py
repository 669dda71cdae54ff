"""Stage trained_words@model: does a trained word show under another lens than the one that it was trained on?

V/O adapters are trained by dual reward, by GRPO on answers, and by GRPO with the loss on the lens; adapters of all
attention on a word before the answer; each with several seeds. Prompts on operands never trained on, put as in
training, are read before and after: which of the four operation words does the logit lens choose, which the Jacobian
lens of these words, with directions of the untrained model and, for the first seed, of the trained one?
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from classifier_emergence.reading.lens_maps import LensMaps
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.tasks.arithmetic import OPERATIONS
from classifier_emergence.training.adapters import Start, adapted_together
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.modules import QKVO
from classifier_emergence.training.rl.rewards import exact, parse_answer
from classifier_emergence.training.rl.together import PolicyMember, train_grpo_together
from classifier_emergence.training.rl.trainer import PolicyObjective
from experiments.params import Params
from experiments.shared.chain_of_thought import ChainOfThoughtStudy, train_to_write
from experiments.shared.dual_reward import DualRewardArm, DualRewardStudy, trained_arms
from experiments.shared.lens_fits import kept_maps, selected
from experiments.shared.reinforcement import PolicyStudy
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main
from experiments.shared.study import ProblemStudy, adapter_of
from experiments.shared.summaries import accuracy_curve, over, share_of
from experiments.shared.word_lens import WordLens

PLACES = ("at_classifier", "selected")
"""Where a lens chooses: at the layer that dual reward trains, and at the layer that is best on other problems."""


class TrainedWordsStudy:
    """A model, the problems of every way of training, and the words that lenses choose among."""

    def __init__(self, params: Params, key: str) -> None:
        self.params, self.policy = params, PolicyStudy(params, key)
        self.lm = self.policy.lm
        self.dual = DualRewardStudy(params, key, self.lm)
        self.chain = ChainOfThoughtStudy(params, key, self.lm)
        self.words = WordLens(self.lm, params.lenses)
        self.problems: dict[str, ProblemStudy] = {
            "dual_reward": self.dual,
            "chain_of_thought": self.chain,
            "grpo": self.policy,
            "grpo_and_class": self.policy,
        }

    def prompts(self, way: str) -> list[str]:
        """The first held-out problems, put as in training."""
        study, n = self.problems[way], self.params.lenses.problems
        if study is self.policy:
            return [self.policy.prompt(problem) for problem in study.problems.test[:n]]
        return study.prompts()[:n]


def run(params: Params, key: str) -> None:
    """Train in every way, read before and after and write one result."""
    sections = ("lenses", "dual_reward", "cot_alignment", "grpo", "collapse", "bank")
    with Runs("trained_words", key, params, TrainedWordsStudy, *sections) as runs:
        study = runs.study
        lenses = {"logit": study.words.logit, "jacobian": fit(runs)}
        before = {way: runs.once(f"{way}-before", read, way, lenses) for way in study.problems}
        members = {way: {f"{way}-{seed}": (way, seed) for seed in params.trained_words.seeds} for way in study.problems}
        of_policy = members["grpo"] | members["grpo_and_class"]  # one training: they have their draws in common
        trainings = [(train_dual, members["dual_reward"]), (train_chain, members["chain_of_thought"])]
        calls = [Run(f.__name__, f, (of, lenses), tuple(of)) for f, of in (*trainings, (train_policy, of_policy))]
        made = runs.all(calls)
        ways = {way: summary(study, way, before[way], [made[one] for one in of]) for way, of in members.items()}
        runs.finish({
            "model": key, "layers": study.lm.layers, "texts": len(study.words.texts), "ways": ways,
        })  # fmt: skip


def fit(runs: Runs) -> LensMaps:
    """The words' directions at every layer of the untrained model: a mean over all texts."""
    words: WordLens = runs.study.words

    def of_text(i: int) -> LensMaps:
        return words.jacobian(words.texts[i], f"directions of words in {runs.key}: text {i + 1} of {len(words.texts)}")

    return LensMaps.mean([kept_maps(runs, f"text-{i}", partial(of_text, i)) for i in range(len(words.texts))])


# --- Training ---

Members = Mapping[str, tuple[str, int]]
"""Name of a run -> its way and its seed."""


def train_dual(
    study: TrainedWordsStudy, work: Path, wanted: Sequence[str], of: Members, lenses: Mapping[str, LensMaps]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """On the word in the logit lens and on the answer: the main arm of ``dual_reward``."""
    arms = {name: (DualRewardArm(), seed) for name, (_, seed) in of.items()}
    with trained_arms(study.dual, work, arms, study.dual.settings.arm_steps) as (wrapped, _):
        yield from read_all(study, wrapped, wanted, of, lenses)


def train_chain(
    study: TrainedWordsStudy, work: Path, wanted: Sequence[str], of: Members, lenses: Mapping[str, LensMaps]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """On the word and then the answer, both written, as in ``cot_alignment``."""
    adapter, seeds = adapter_of(study.chain.settings, study.lm.n_layers, QKVO), {name: s for name, (_, s) in of.items()}
    with adapted_together(study.lm, {name: Start(adapter, seed) for name, seed in seeds.items()}) as wrapped:
        text, steps = f"fine-tuning of {study.lm.key}: word and answer, {len(of)} seeds", study.params.trained_words
        train_to_write(study.chain, wrapped, "chain_of_thought", seeds, work, text, steps=steps.chain_steps)
        yield from read_all(study, wrapped, wanted, of, lenses)


def train_policy(
    study: TrainedWordsStudy, work: Path, wanted: Sequence[str], of: Members, lenses: Mapping[str, LensMaps]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """On the reward of drawn answers, and some on the word in the logit lens as well, as on V and O in ``collapse``."""
    policy, settings = study.policy, study.params.collapse
    starts = {name: Start(adapter_of(settings, policy.layer), seed) for name, (_, seed) in of.items()}
    with adapted_together(study.lm, starts) as wrapped:
        members = {}
        for name, (way, seed) in of.items():
            tasks = policy.tasks(settings.steps * settings.prompts, seed)
            weight = settings.class_weight if way == "grpo_and_class" else 0.0
            members[name] = PolicyMember(tasks, PolicyObjective(policy.settings.kl_weight, weight, policy.layer), seed)
        train_grpo_together(
            study.lm, wrapped, members, exact(parse_answer), policy.sampling,
            Schedule(settings.steps, settings.prompts, settings.vo_learning_rate, 0, settings.every), work=work,
            checkpoint_every=settings.checkpoint_every,
            description=f"GRPO of {study.lm.key}: {len(of)} runs on V and O",
        )  # fmt: skip
        yield from read_all(study, wrapped, wanted, of, lenses)


# --- Reading ---


def read_all(
    study: TrainedWordsStudy, wrapped: PeftModel, wanted: Sequence[str], of: Members, lenses: Mapping[str, LensMaps]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every wanted run, with its adapter on; that of the first seed also by Jacobians of the model as it is then."""
    words = study.words
    for name in wanted:
        way, seed = of[name]
        wrapped.set_adapter(name)
        own = dict(lenses)
        if seed == study.params.trained_words.seeds[0]:
            texts = words.texts[: study.params.lenses.control_texts]
            maps = [words.jacobian(ids, f"directions of words after {way.replace('_', ' ')}") for ids in texts]
            own["jacobian_after"] = LensMaps.mean(maps)
        yield name, read(study, Path(), way, own)


def read(study: TrainedWordsStudy, _: Path, way: str, lenses: Mapping[str, LensMaps]) -> dict[str, Any]:
    """What every lens chooses on the held-out problems of a way of training; ``items`` keeps it problem by problem."""
    problems, confidence, prompts = study.problems[way], study.params.confidence, study.prompts(way)
    own = torch.tensor([OPERATIONS.index(problem.operation) for problem in problems.problems.test[: len(prompts)]])
    units, states = problems.units()[: len(prompts)], residual_stream(study.lm, prompts)
    found: dict[str, Any] = {}
    for name, maps in lenses.items():
        right, null = study.words.choose(maps, states, own)
        best, rows = selected(right, units)
        hits = {"at_classifier": right[problems.row], "selected": best}
        found[name] = {
            **{place: share_of(hits[place], confidence, clusters=units) for place in PLACES},
            "layers": [study.lm.layers[row] for row in rows],
            "by_layer": accuracy_curve(right, confidence, clusters=units),
            "null": {"mean": null.mean(-1), "largest": null.max(-1)},
            "items": hits,
        }
    alignment = problems.read(prompts, [problems.row]).own_word[0]
    found["logit"]["alignment"] = problems.mean(alignment, units)
    return found


def summary(
    study: TrainedWordsStudy, way: str, before: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A way of training over its seeds: the choice by every lens, its change, and its difference from the logit lens.

    Both are paired by problem.
    """
    problems = study.problems[way]

    def paired(after: Mapping[str, Any], other: Mapping[str, Any], place: str) -> dict[str, Any]:
        hits = [np.array(each["items"][place], dtype=float) for each in (after, other)]
        return problems.mean(hits[0] - hits[1], problems.units()[: len(hits[0])])

    after: dict[str, Any] = {}
    for lens in runs[0]:
        read_by = [run for run in runs if lens in run]
        was = before["jacobian" if lens == "jacobian_after" else lens]
        after[lens] = {
            **{place: over([run[lens][place] for run in read_by]) for place in PLACES},
            "change": {place: over([paired(run[lens], was, place) for run in read_by]) for place in PLACES},
            "minus_logit": {
                place: over([paired(run[lens], run["logit"], place) for run in read_by]) for place in PLACES
            },
        }
    after["logit"]["alignment"] = over([run["logit"]["alignment"] for run in runs])
    kept = [{lens: {k: v for k, v in read_by.items() if k != "items"} for lens, read_by in each.items()}
            for each in (before, *runs)]  # fmt: skip
    return {"layer": study.lm.layers[problems.row], "before": kept[0], "runs": kept[1:], "after": after}


if __name__ == "__main__":
    main(run, __doc__)
