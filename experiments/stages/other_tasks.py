"""Stage other_tasks@model: do probes, lens and dual reward find in other tasks what they find in arithmetic?

Two tasks: how a number compares with another, and what kind of place a name is. For each, before any training, linear
probes and the logit lens at every layer; then dual reward at one layer, with two controls. All is judged on groups
(pairs of numbers, countries) and, apart from that, on templates that were never trained on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor

from classifier_emergence.errors import InputError
from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_at, layer_row
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.probes import fit_probes, shuffled_labels
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import WordTokens, matched_words, row_norms, word_tokens
from classifier_emergence.statistics import bootstrap_mean, permutation_p
from classifier_emergence.tasks.classification import Item, Task, balanced, get_task
from classifier_emergence.tasks.splits import rotations
from classifier_emergence.training.evaluation import Answers, alignment, answers
from classifier_emergence.training.supervised import VO, Adapter, Example, Objective, Schedule, adapted, encode, train
from experiments.params import Params
from experiments.shared.runs import Runs, over_seeds, share_of
from experiments.shared.stage import accuracy_curve, main
from experiments.stages.logit_lens import contrast

NAMES = ("comparison", "places")
ARMS = ("dual_reward", "arbitrary_words", "shuffled_targets")
"""The study, and its controls: words that have nothing to do with the classes, and words that fit at random."""
PARTS = ("held_out_groups", "held_out_templates")
# As in stage probing, relative to the objective.
TOLERANCE = 1e-4


@dataclass
class Study:
    """One task on one model."""

    lm: LanguageModel
    params: Params
    task: Task
    words: list[WordTokens] = field(init=False)

    def __post_init__(self) -> None:
        self.settings = self.params.other_tasks
        self.n_layers = self.lm.n_layers
        self.layer = layer_at(self.settings.depth, self.n_layers)
        self.words = [word_tokens(word, self.lm.tokenizer) for word in self.task.words]
        items, folds = self.task.items, self.settings.folds
        groups, templates = (
            set(next(rotations([getattr(item, by) for item in items], folds, seed=0)).test.tolist())
            for by in ("group", "template")
        )
        parts = {"held_out_groups": groups - templates, "held_out_templates": templates - groups}
        self.train = [item for i, item in enumerate(items) if i not in groups | templates]
        self.test = {
            part: balanced([items[i] for i in sorted(chosen)], self.settings.test_items, seed=0)
            for part, chosen in parts.items()
        }

    def answer(self) -> dict[str, Answers]:
        """Answers to the test items of each part."""
        lm = self.lm
        return {
            part: answers(lm, prompts(items), [str(item.answer) for item in items]) for part, items in self.test.items()
        }

    @cached_property
    def base_answers(self) -> dict[str, Answers]:
        """Answers of the base model; ask before an adapter is on."""
        return self.answer()


def run(params: Params, key: str) -> None:
    """Study each task and write one result."""
    lm = load(key, params.registry)
    runs = Runs("other_tasks", key, params)
    studies = {name: Study(lm, params, get_task(name)) for name in NAMES}
    first = studies[NAMES[0]]
    result = {
        "model": key,
        "layers": first.lm.layers,
        "layer": first.lm.layers[layer_row(first.layer)],
        "steps": params.other_tasks.steps,
        **{name: whole(study, runs) for name, study in studies.items()},
    }
    runs.finish(result)


def whole(study: Study, runs: Runs) -> dict[str, Any]:
    """Everything about one task."""
    task, seeds = study.task, study.settings.seeds
    result: dict[str, Any] = {
        "classes": task.classes,
        "n_trained_on": len(study.train),
        "groups": {part: len({item.group for item in items}) for part, items in study.test.items()},
        **runs.once(f"{task.name}-untrained", lambda _: untrained(study)),
    }
    _ = study.base_answers
    jobs = {
        arm: {
            f"{task.name}-{arm}-{s}": trained(study, arm, s, runs.adapters / task.name)
            for s in (seeds if arm == "dual_reward" else seeds[:1])
        }
        for arm in ARMS
    }
    return result | {arm: summary(found) for arm, found in runs.by_arm(jobs).items()}


def untrained(study: Study) -> dict[str, Any]:
    """Probes and lens at every layer, and what is measured again after training."""
    items = balanced(study.task.items, study.settings.items, seed=0)
    text = f"{study.task.name} on {study.lm.key}: residuals of {len(items)} prompts"
    states = residual_stream(study.lm, prompts(items), description=text)
    return {
        "probing": {
            "held_out_groups": probing(study, items, states, [item.group for item in items]),
            "held_out_templates": probing(study, items, states, [item.template for item in items]),
        },
        "lens": lens(study, items, states),
        "before": measure(study, study.words, study.base_answers),
    }


def probing(study: Study, items: Sequence[Item], states: Tensor, groups: Sequence[int]) -> dict[str, Any]:
    """Accuracy of standardised probes on held-out groups, rotated so that every prompt is tested once.

    Each rotation chooses its layer on its validation groups; ``selected`` reports that choice on the test groups.
    Shuffled labels are permuted on the training part and judged on the true test labels.
    """
    settings, params = study.settings, study.params
    y = torch.tensor(labels(items))
    tokens = bag_of_tokens(items, study.lm)
    correct = torch.zeros(len(states), 1 + settings.shuffles, len(y), dtype=torch.bool)
    selected, of_tokens = torch.zeros_like(correct[0]), torch.zeros(len(y), dtype=torch.bool)
    chosen = []
    for k, split in enumerate(rotations(groups, settings.folds, seed=0)):
        fit, validation, test = (torch.from_numpy(part) for part in (split.train, split.validation, split.test))
        label_sets = torch.cat([y[None, fit], shuffled_labels(y[fit], settings.shuffles, seed=k)])
        probes = fit_probes(states[:, fit], label_sets, C=settings.C, standardise=True, tol=TOLERANCE)
        layer = int((probes.predict(states[:, validation])[:, 0] == y[validation]).double().mean(-1).argmax())
        correct[:, :, test] = probes.predict(states[:, test]) == y[test]
        selected[:, test] = correct[layer][:, test]
        chosen.append(study.lm.layers[layer])
        of_tokens[test] = fit_probes(tokens[:, fit], y[fit], C=settings.C).predict(tokens[:, test])[0] == y[test]
    score = share_of(selected[0], params)
    shuffled = selected[1:].double().mean()
    return {
        **accuracy_curve(correct[:, 0], params.confidence),
        "shuffled_accuracy": correct[:, 1:].double().mean((1, 2)),
        "shuffled_peak_accuracy_95": torch.quantile(correct[:, 1:].double().mean(-1).amax(0), 0.95),
        "selected": {
            "layers": chosen,
            "accuracy": score.accuracy,
            "interval": score.interval,
            "n": score.n,
            "shuffled_accuracy": shuffled,
            "selectivity": score.accuracy - shuffled,
        },
        "bag_of_tokens": share_of(of_tokens, params),
    }


def bag_of_tokens(items: Sequence[Item], lm: LanguageModel) -> Tensor:
    """(1, items, distinct tokens) token counts: what the surface alone gives away."""
    counter = CountVectorizer(analyzer=lambda text: lm.tokenizer(text)["input_ids"])
    return torch.from_numpy(counter.fit_transform(prompts(items)).toarray())[None].float()


def lens(study: Study, items: Sequence[Item], states: Tensor) -> dict[str, Any]:
    """Alignment of the item's own class word at every layer, against other words of the same unembedding norm.

    ``choice``: is the own word the most probable of the class words? ``log_contrast``: how much more probable, in
    nats, words are on their own class than on the others; what a word gains everywhere cancels. ``largest`` is the
    highest alignment of any layer, its null the highest of any layer for the other words.
    """
    params, settings = study.params, study.settings
    readout, own = study.lm.readout, torch.tensor(labels(items))
    n, norms = len(study.words), row_norms(readout.weight, readout.gain)
    null = [
        matched_words(word, norms, study.lm.tokenizer, settings.null_words, exclude=study.task.words)
        for word in study.words
    ]
    ids = [word.ids for word in study.words] + [word.ids for words in null for word in words]
    text = f"{study.task.name} on {study.lm.key}: lens at {len(states)} layers"
    scores = lens_scores(states, readout, ids, ranked=[[label] for label in own.tolist()], description=text)
    # (layers, items, classes, words): the class's own word, then those that are its null.
    null_log = scores.log_alignment[..., n:].unflatten(-1, (n, -1))
    log = torch.cat([scores.log_alignment[..., :n, None], null_log], dim=-1).double()
    contrasts = contrast(log, own)
    by_word = torch.stack([log[:, own == c, c].exp().mean(1) for c in range(n)]).mean(0).numpy()
    aligned, others = by_word[:, 0], by_word[:, 1:]
    own_log = log[:, torch.arange(len(own)), own, 0]
    best, blocks = layer_row(int(aligned[layer_row(0) :].argmax())), slice(layer_row(0), None)
    return {
        "alignment": mean_over_groups(own_log.exp(), items, study),
        "rank": scores.rank[..., 0].double().quantile(0.5, dim=-1),
        "choice": accuracy_curve(log[..., 0].argmax(-1) == own, params.confidence),
        "log_contrast": contrasts[:, 0],
        "null": {
            "words": others.shape[-1],
            "alignment_95": np.quantile(others, 0.95, axis=-1),
            "p": permutation_p(aligned, others),
            "log_contrast_95": np.quantile(contrasts[:, 1:], 0.95, axis=-1),
            "contrast_p": permutation_p(contrasts[:, 0], contrasts[:, 1:]),
        },
        "largest": {
            "layer": study.lm.layers[best],
            "alignment": aligned[best],
            "null_95": np.quantile(others[blocks].max(0), 0.95),
            "p": permutation_p(aligned[best], others[blocks].max(0)),
        },
    }


def trained(study: Study, arm: str, seed: int, folder: Path) -> Callable[[Path], dict[str, Any]]:
    """Train one arm with one seed and measure what it did; the study's first adapter is saved in a folder."""

    def compute(work: Path) -> dict[str, Any]:
        settings, lm = study.settings, study.lm
        words = study.words
        if arm == "arbitrary_words":
            words = [word_tokens(word, lm.tokenizer) for word in settings.arbitrary_words]
        where = Adapter(VO, settings.rank, settings.scale, tuple(range(study.layer)))
        objective = Objective(settings.class_weight, study.layer)
        schedule = Schedule(settings.steps, settings.batch_size, settings.learning_rate, seed, settings.every)
        data = examples(study, words, seed, shuffled=arm == "shuffled_targets")
        text = f"{study.task.name} on {lm.key}: {arm.replace('_', ' ')}, seed {seed}"
        with adapted(lm, where, seed=seed) as wrapped:
            done = train(lm, wrapped, data, objective, schedule, work=work, description=text)
            if (arm, seed) == (ARMS[0], settings.seeds[0]):
                wrapped.save_pretrained(str(folder))
            after = measure(study, words, study.answer())
        return {"parameters": done.parameters, "losses": done.losses, **after}

    return compute


def examples(study: Study, words: Sequence[WordTokens], seed: int, *, shuffled: bool) -> list[Example]:
    """Training items with the words that the lens should say."""
    for word in words:
        if f" {word.word}" not in word.forms:
            raise InputError(f"word {word.word!r}: with a leading space it is no single token of {study.lm.key}")
    classes = np.array(labels(study.train))
    if shuffled:
        classes = np.random.default_rng(seed).permutation(classes)
    ids = [word.forms[f" {word.word}"] for word in words]
    pairs = zip(study.train, classes.tolist(), strict=True)
    return [encode(study.lm.tokenizer, item.prompt, str(item.answer), ids[label]) for item, label in pairs]


def measure(study: Study, words: list[WordTokens], found: dict[str, Answers]) -> dict[str, Any]:
    """Lens at the classifier layer and answers, on held-out groups and on held-out templates.

    Intervals of means resample groups; those of accuracies take items as independent.
    """
    lm, params, row = study.lm, study.params, layer_row(study.layer)
    result = {}
    for part, items in study.test.items():
        own = labels(items)
        scores = alignment(lm, prompts(items), own, words, rows=[row])
        log_prob = found[part].log_prob
        change = log_prob - study.base_answers[part].log_prob
        result[part] = {
            "alignment": mean_over_groups(scores.own_word[0], items, study),
            "top": share_of(scores.is_top[0], params),
            "choice": share_of(scores.choice[0] == torch.tensor(own), params),
            "answers_exact": share_of(found[part].exact, params),
            "answers_log_prob": mean_over_groups(log_prob, items, study),
            "answers_change": mean_over_groups(change, items, study),
        }
    return result


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of an arm over its seeds."""
    return {
        "seeds": len(runs),
        "parameters": runs[0]["parameters"],
        "final_losses": [run["losses"][-1] for run in runs],
        **{part: {what: over_seeds(runs, f"{part}.{what}") for what in runs[0][part]} for part in PARTS},
    }


def mean_over_groups(values: ArrayLike, items: Sequence[Item], study: Study) -> dict[str, Any]:
    """Mean over the last axis; its interval resamples whole groups, as items of one group are alike."""
    array = np.asarray(values, dtype=np.float64)
    resamples, confidence = study.settings.resamples, study.params.confidence
    clusters = [item.group for item in items]
    ends = bootstrap_mean(array, confidence=confidence, resamples=resamples, seed=0, clusters=clusters)
    return {"mean": array.mean(-1), "interval": np.stack(ends, axis=-1), "n": array.shape[-1]}


def prompts(items: Sequence[Item]) -> list[str]:
    """Their prompts."""
    return [item.prompt for item in items]


def labels(items: Sequence[Item]) -> list[int]:
    """Their classes."""
    return [item.label for item in items]


if __name__ == "__main__":
    main(run, __doc__)
