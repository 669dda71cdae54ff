"""Stage other_tasks@model: do probes, lens and dual reward find in other tasks what they find in arithmetic?

Two tasks: how a number compares with another, and what kind of place a name is. For each, before any training, linear
probes and the logit lens at every layer; then dual reward at one layer, with two controls. All is judged on groups
(pairs of numbers, countries) and, apart from that, on templates that were never trained on.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_row, peak_row
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import WordTokens
from classifier_emergence.statistics import permutation_p
from classifier_emergence.tasks.classification import Item, Task, balanced, get_task
from classifier_emergence.tasks.splits import rotations
from classifier_emergence.training.adapters import Start, adapted_together, save_adapter
from classifier_emergence.training.evaluation import Answers, alignment, answers
from classifier_emergence.training.examples import Example, Objective, encode
from classifier_emergence.training.supervised import Member, train_together
from experiments.params import Params
from experiments.shared.lens import against_null, contrast, null_words, own_alignment, own_class
from experiments.shared.probing import bag_of_tokens, held_out_probes
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main
from experiments.shared.study import Study, adapter_of, schedule_of
from experiments.shared.summaries import accuracy_curve, summary_over_seeds

NAMES = ("comparison", "places")
ARMS = ("dual_reward", "arbitrary_words", "shuffled_targets")
"""The study, and its controls: words that have nothing to do with the classes, and words that fit at random."""
HELD_OUT = {"held_out_groups": "group", "held_out_templates": "template"}
"""What is tested on -> what of an item is never trained on."""


class TaskStudy(Study):
    """One task on one model; a quarter of its groups and of its templates are held out, one thing at a time."""

    def __init__(self, lm: LanguageModel, params: Params, task: Task) -> None:
        self.settings, self.task = params.other_tasks, task
        super().__init__(lm, params, depth=self.settings.depth, resamples=self.settings.resamples)
        self.words = self.tokens(task.words)
        items = task.items
        groups, templates = (
            set(next(rotations([getattr(item, by) for item in items], self.settings.folds, seed=0)).test.tolist())
            for by in HELD_OUT.values()
        )
        self.train = [item for i, item in enumerate(items) if i not in groups | templates]
        self.test = {
            part: balanced([items[i] for i in sorted(chosen)], self.settings.test_items, seed=0)
            for part, chosen in zip(HELD_OUT, (groups - templates, templates - groups), strict=True)
        }
        self.base_answers = self.answer()

    def answer(self) -> dict[str, Answers]:
        """Answers to the test items of each part."""
        return {
            part: answers(self.lm, prompts(items), [str(item.answer) for item in items])
            for part, items in self.test.items()
        }

    def mean_over_groups(self, values: Tensor, items: Sequence[Item]) -> dict[str, Any]:
        """Mean over items; its interval resamples whole groups, as items of one group are alike."""
        return self.mean(values, [item.group for item in items])


def build(params: Params, key: str) -> dict[str, TaskStudy]:
    """The study of each task."""
    lm = load(key, params.registry)
    return {name: TaskStudy(lm, params, get_task(name)) for name in NAMES}


def run(params: Params, key: str) -> None:
    """Study each task and write one result."""
    with Runs("other_tasks", key, params, build) as runs:
        first, arms = runs.study[NAMES[0]], arms_of(params)
        untrained = {name: runs.once(f"{name}-untrained", measure_untrained, name) for name in NAMES}
        calls = [
            Run(name, train_arms, (name, arms, runs.adapters / name), tuple(f"{name}-{arm}" for arm in arms))
            for name in NAMES
        ]
        results = runs.all(calls)
        result = {
            "model": key,
            "layers": first.lm.layers,
            "layer": first.lm.layers[first.row],
            "steps": params.other_tasks.steps,
            **{
                name: {
                    **facts_of(runs.study[name]),
                    **untrained[name],
                    **{
                        arm: arm_summary([results[f"{name}-{run}"] for run in arms if arms[run][0] == arm])
                        for arm in ARMS
                    },
                }
                for name in NAMES
            },
        }
        runs.finish(result)


def arms_of(params: Params) -> dict[str, tuple[str, int]]:
    """Arm and seed of every run of a task."""
    seeds = params.other_tasks.seeds
    return {f"{arm}-{seed}": (arm, seed) for arm in ARMS for seed in (seeds if arm == ARMS[0] else seeds[:1])}


def facts_of(study: TaskStudy) -> dict[str, Any]:
    """What a task consists of."""
    return {
        "classes": study.task.classes,
        "n_trained_on": len(study.train),
        "groups": {part: len({item.group for item in items}) for part, items in study.test.items()},
    }


def measure_untrained(studies: Mapping[str, TaskStudy], _: Path, name: str) -> dict[str, Any]:
    """Probes and lens at every layer, and what is measured again after training."""
    study = studies[name]
    items = balanced(study.task.items, study.settings.items, seed=0)
    text = f"{study.task.name} on {study.lm.key}: residuals of {len(items)} prompts"
    states = residual_stream(study.lm, prompts(items), description=text)
    return {
        "probing": {
            part: probe_task(study, items, states, [getattr(item, by) for item in items])
            for part, by in HELD_OUT.items()
        },
        "lens": lens_of_task(study, items, states),
        "before": measure_held_out(study, study.words, study.base_answers),
    }


def probe_task(study: TaskStudy, items: Sequence[Item], states: Tensor, groups: Sequence[int]) -> dict[str, Any]:
    """Accuracy of standardised probes and of token counts on held-out groups; see ``held_out_probes``."""
    settings, y = study.settings, torch.tensor(labels(items))
    bag = bag_of_tokens(prompts(items), study.lm.tokenizer, y, groups, settings, seed=0)
    probes = held_out_probes(states, y, groups, settings, seed=0)
    return {
        **probes.with_selectivity(study.params.confidence, clusters=groups),
        "bag_of_tokens": study.share(bag, groups),
        "selected_minus_bag": study.mean(probes.selected[0].double() - bag.double(), groups),
    }


def lens_of_task(study: TaskStudy, items: Sequence[Item], states: Tensor) -> dict[str, Any]:
    """Alignment of the item's own class word at every layer, against other words of the same unembedding norm.

    ``choice``: is the own word the most probable of the class words? ``log_contrast``: how much more probable, in
    nats, words are on their own class than on the others; what a word gains everywhere cancels. ``largest`` is the
    highest alignment of any layer, its null the highest of any layer for the other words.
    """
    own, n, lm = torch.tensor(labels(items)), len(study.words), study.lm
    null = null_words(lm, study.words, study.settings.null_words, study.task.words)
    ids = [word.ids for words in (study.words, *null) for word in words]
    text = f"{study.task.name} on {lm.key}: lens at {len(states)} layers"
    scores = lens_scores(states, lm.readout, ids, ranked=[[label] for label in own.tolist()], description=text)
    log = scores.log_alignment.double()
    words, null_log = log[..., :n], log[..., n:].unflatten(-1, (n, -1))  # (layers, items, classes[, words])
    aligned, log_contrast = own_alignment(words[..., None], own)[:, 0], contrast(words[..., None], own)[:, 0]
    table, others = against_null(aligned, log_contrast, null_log, own)
    best, largest_others = peak_row(aligned), others[layer_row(0) :].max(0)
    return {
        "alignment": study.mean_over_groups(own_class(words, own).exp(), items),
        "rank": scores.rank[..., 0].double().quantile(0.5, dim=-1),
        "choice": accuracy_curve(
            words.argmax(-1) == own, study.params.confidence, clusters=[item.group for item in items]
        ),
        "log_contrast": log_contrast,
        "null": table,
        "largest": {
            "layer": lm.layers[best],
            "alignment": aligned[best],
            "null_95": np.quantile(largest_others, 0.95),
            "p": permutation_p(aligned[best], largest_others),
        },
    }


def train_arms(
    studies: Mapping[str, TaskStudy],
    work: Path,
    wanted: Sequence[str],
    name: str,
    arms: Mapping[str, tuple[str, int]],
    adapter_folder: Path,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train the arms of a task together and measure what each did; the study's first adapter is saved in a folder."""
    study = studies[name]
    settings, lm = study.settings, study.lm
    words = {arm: study.tokens(settings.arbitrary_words) if arm == "arbitrary_words" else study.words for arm in ARMS}
    adapter, objective = adapter_of(settings, study.layer), Objective(settings.class_weight, study.layer)
    with adapted_together(lm, {run: Start(adapter, seed) for run, (_, seed) in arms.items()}) as wrapped:
        members = {
            run: Member(examples(study, words[arm], seed, shuffled=arm == "shuffled_targets"), objective, seed)
            for run, (arm, seed) in arms.items()
        }
        text = f"{name} on {lm.key}: {len(arms)} arms"
        trained = train_together(lm, wrapped, members, schedule_of(settings, 0), work=work, description=text)
        save_adapter(wrapped, next(iter(arms)), adapter_folder)
        for run, (arm, _) in arms.items():
            if f"{name}-{run}" in wanted:
                wrapped.set_adapter(run)
                after = measure_held_out(study, words[arm], study.answer())
                yield f"{name}-{run}", {"parameters": trained[run].parameters, "losses": trained[run].losses, **after}


def examples(study: TaskStudy, words: Sequence[WordTokens], seed: int, *, shuffled: bool) -> list[Example]:
    """Training items with the words that the lens should say."""
    ids, classes = study.spaced_ids(words), np.array(labels(study.train))
    if shuffled:
        classes = np.random.default_rng(seed).permutation(classes)
    pairs = zip(study.train, classes.tolist(), strict=True)
    return [encode(study.lm.tokenizer, item.prompt, str(item.answer), ids[label]) for item, label in pairs]


def measure_held_out(study: TaskStudy, words: Sequence[WordTokens], now: Mapping[str, Answers]) -> dict[str, Any]:
    """Lens at the classifier layer and answers, on held-out groups and on held-out templates.

    Intervals resample groups, in both parts: of the two templates that are held out none can be made.
    """
    result = {}
    for part, items in study.test.items():
        own, groups = labels(items), [item.group for item in items]
        lens = alignment(study.lm, prompts(items), own, words, rows=[study.row])
        log_prob, base = now[part].log_prob, study.base_answers[part].log_prob
        result[part] = {
            "alignment": study.mean_over_groups(lens.own_word[0], items),
            "top": study.share(lens.is_top[0], groups),
            "choice": study.share(lens.choice[0] == torch.tensor(own), groups),
            "answers_exact": study.share(now[part].exact, groups),
            "answers_log_prob": study.mean_over_groups(log_prob, items),
            "answers_change": study.mean_over_groups(log_prob - base, items),
        }
    return result


def arm_summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of an arm over its seeds."""
    return {
        "seeds": len(runs),
        "parameters": runs[0]["parameters"],
        "final_losses": [run["losses"][-1] for run in runs],
        **summary_over_seeds(runs, [f"{part}.{what}" for part in HELD_OUT for what in runs[0][part]]),
    }


def prompts(items: Sequence[Item]) -> list[str]:
    """Their prompts."""
    return [item.prompt for item in items]


def labels(items: Sequence[Item]) -> list[int]:
    """Their classes."""
    return [item.label for item in items]


if __name__ == "__main__":
    main(run, __doc__)
