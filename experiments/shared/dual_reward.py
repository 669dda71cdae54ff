"""Dual reward: one arm trained and measured, for the stage and for its runs at full length with more seeds."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from torch import nn

from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_at, layer_row
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import WordTokens
from classifier_emergence.tasks.arithmetic import LENS, STYLES, labelled
from classifier_emergence.tasks.problems import NEUTRAL, Problem, sample
from classifier_emergence.training.adapters import ALONE, Adapter, Start, adapted, adapted_together, head_of
from classifier_emergence.training.evaluation import (
    alignment,
    answers,
    divergence,
    random_basis,
    subspace_removed,
    word_basis,
    words_interchanged,
)
from classifier_emergence.training.examples import Example, Objective, encode
from classifier_emergence.training.flaws import forgotten
from classifier_emergence.training.modules import VO
from classifier_emergence.training.supervised import Member, Trained, train_together
from experiments.params import Params
from experiments.shared.study import ProblemStudy, adapter_of, curves_of, schedule_of
from experiments.shared.summaries import over, summary_over_seeds

READING = (
    "words", "random", "difference", "interchange.followed.before", "interchange.followed.words",
    "interchange.followed.random", "interchange.followed.difference", "interchange.margin.words",
    "interchange.margin.random", "interchange.margin.difference",
)  # fmt: skip
"""The numbers of ``who_reads``."""


@dataclass(frozen=True)
class DualRewardArm:
    """One way to train; the default is the main arm."""

    modules: tuple[str, ...] = VO
    depth: float | None = None
    class_weight: float | None = None
    all_layers: bool = False
    targets: str = "words"
    """``words``, ``bare`` (first token of the bare word), ``arbitrary`` (other words) or ``shuffled``."""
    problems: int | None = None
    """Train on so few distinct problems, as many of each operation; None: on all that are not tested."""
    read: Literal["prompt", "answer"] = "prompt"
    answer_shifted: bool = True
    head: bool = False
    several_seeds: bool = False


class DualRewardStudy(ProblemStudy):
    """What all arms share; of the model of that key, or of another in its place."""

    def __init__(self, params: Params, key: str, lm: LanguageModel | None = None) -> None:
        self.settings = params.dual_reward
        reserved = [Problem.parse(text) for text in labelled(LENS)[0]]
        super().__init__(
            lm or load(key, params.registry), params, self.settings, depth=self.settings.depth, reserved=reserved
        )
        self.base_answers = self.answer()

    def layer_of(self, arm: DualRewardArm) -> int:
        """The classifier layer of an arm."""
        return self.layer if arm.depth is None else layer_at(arm.depth, self.n_layers)

    def words_of(self, arm: DualRewardArm) -> list[WordTokens]:
        """The words that stand for the operations: their own, or some that have nothing to do with them."""
        return self.tokens(self.settings.arbitrary_words) if arm.targets == "arbitrary" else self.words

    def adapter(self, arm: DualRewardArm) -> Adapter:
        """Where the arm's low-rank update goes."""
        if arm.all_layers:
            return adapter_of(self.settings, self.n_layers, arm.modules, rank=self.settings.rank_all_layers)
        return adapter_of(self.settings, self.layer_of(arm), arm.modules)

    def examples(self, arm: DualRewardArm, seed: int) -> list[Example]:
        """Training problems with what the lens (or the head) should say."""
        problems = sample(self.pool(arm.problems, seed), self.settings.samples, seed=seed)
        classes = np.array([self.operations.index(problem.operation) for problem in problems])
        if arm.targets == "shuffled":
            classes = np.random.default_rng(seed).permutation(classes)
        if arm.head:
            targets = list(range(len(self.operations)))
        elif arm.targets == "bare":
            targets = [word.strict_id for word in self.words]
        else:
            targets = self.spaced_ids(self.words_of(arm))
        pairs = zip(problems, classes.tolist(), strict=True)
        return [encode(self.lm.tokenizer, problem.symbol, f" {problem.answer}", targets[c]) for problem, c in pairs]

    def pool(self, n: int | None, seed: int) -> Mapping[str, list[Problem]]:
        """Problems to train on: all, or ``n`` that the seed chooses, as many of each operation."""
        if n is None:
            return self.problems.train
        random, share = np.random.default_rng(seed), n // len(self.operations)
        return {
            operation: [pool[i] for i in random.permutation(len(pool))[:share]]
            for operation, pool in self.problems.train.items()
        }

    def member(self, arm: DualRewardArm, seed: int, *, wide: bool = False) -> Member:
        """How one arm trains; the lens on a few test problems is watched, at the classifier layer or (wide) at all."""
        settings, layer = self.settings, self.layer_of(arm)
        objective = Objective(
            settings.class_weight if arm.class_weight is None else arm.class_weight,
            layer,
            answer_shifted=arm.answer_shifted,
            read=arm.read,
            classes=self.classes_of(arm),
        )
        prompts, row = self.prompts()[: settings.curve_problems], layer_row(layer)

        def watch() -> dict[str, Any]:
            means = self.read(prompts, None if wide else [row], self.words_of(arm)).own_word.mean(-1).tolist()
            return {"alignment": means[row], "by_layer": means} if wide else {"alignment": means[0]}

        return Member(self.examples(arm, seed), objective, seed, watch)

    def classes_of(self, arm: DualRewardArm) -> int | None:
        """Outputs of the arm's head, if it has one."""
        return len(self.operations) if arm.head else None


def train_main(study: DualRewardStudy, work: Path, seed: int, adapter_folder: Path) -> dict[str, Any]:
    """The main arm at full length, then on the answer alone, with its adapter saved."""
    arm, settings = DualRewardArm(), study.settings
    with adapted(study.lm, study.adapter(arm), seed=seed) as wrapped:

        def train(arm: DualRewardArm, steps: int, name: str, *, wide: bool = False) -> Trained:
            member, schedule = study.member(arm, seed, wide=wide), schedule_of(settings, seed, steps)
            text = f"dual reward of {study.lm.key}: {name}, seed {seed}"
            return train_together(study.lm, wrapped, {ALONE: member}, schedule, work=work / name, description=text)[
                ALONE
            ]

        trained = train(arm, settings.steps, "main", wide=True)
        wrapped.save_pretrained(str(adapter_folder))
        result = {
            **curve(trained, settings.threshold),
            **measure_wide(study, wrapped),
            # Flaws: prompts that end in a lone space, where the originals read; an adapter reloaded without its O part.
            "lone_space": reported_table(study, study.row, study.words, ending=" "),
            "without_o": _without_o(study, wrapped),
            "reading": who_reads(study, study.words),
        }
        further = train(DualRewardArm(class_weight=0.0), settings.further_steps, "answers alone")
        after = measure_arm(study, wrapped, study.layer, study.words)
        del after["items"]
    return {**result, "further": {"watched": further.watched, **after}}


Arms = Mapping[str, tuple[DualRewardArm, int]]
"""Name of a run -> its arm and its seed."""


@contextmanager
def trained_arms(
    study: DualRewardStudy, work: Path, arms: Arms, steps: int
) -> Iterator[tuple[PeftModel, dict[str, Trained]]]:
    """Arms trained together: the model with their adapters, by name of the run, and how each training went."""
    starts = {name: Start(study.adapter(arm), seed, study.classes_of(arm)) for name, (arm, seed) in arms.items()}
    schedule = schedule_of(study.settings, 0, steps)
    with adapted_together(study.lm, starts) as wrapped:
        members = {name: study.member(arm, seed) for name, (arm, seed) in arms.items()}
        text = f"dual reward of {study.lm.key}: {len(arms)} runs"
        yield wrapped, train_together(study.lm, wrapped, members, schedule, work=work, description=text)


def train_arms(
    study: DualRewardStudy, work: Path, wanted: Sequence[str], arms: Arms, steps: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Any arms, with a seed each, together; then what each of them did."""
    with trained_arms(study, work, arms, steps) as (wrapped, trained):
        for name in wanted:
            arm, layer = arms[name][0], study.layer_of(arms[name][0])
            wrapped.set_adapter(name)
            measured = measure_arm(study, wrapped, layer, study.words_of(arm))
            if (head := head_of(study.lm, name)) is not None:
                named = {style: head_is_right(study, head, layer, style) for style in STYLES[:2]}
                measured["head"] = {style: study.share(hits, study.units(style)) for style, hits in named.items()}
                measured["items"]["head"] = named["symbol"]
            if arm.targets == "arbitrary":
                measured["reading"] = who_reads(study, study.words_of(arm))
            yield name, {**curve(trained[name], study.settings.threshold), **measured}


def head_is_right(study: DualRewardStudy, head: nn.Linear, layer: int, style: str) -> torch.Tensor:
    """Whether the linear head names the operation of each test problem, at the classifier layer."""
    states = residual_stream(study.lm, study.prompts(style))[layer_row(layer)]
    with torch.no_grad():
        guess: torch.Tensor = head(study.lm.readout.norm(states)).argmax(-1)
    return guess == torch.tensor(study.own)


def curve(trained: Trained, threshold: float) -> dict[str, Any]:
    """Losses and alignment by step, and the first step at which alignment passed the threshold."""
    passed = [entry["step"] for entry in trained.watched if entry["alignment"] >= threshold]
    return {**curves_of(trained), "first_step_above_threshold": passed[0] if passed else None}


def measure_arm(study: DualRewardStudy, wrapped: PeftModel, layer: int, words: list[WordTokens]) -> dict[str, Any]:
    """What the model does now, at one layer: the reported table, alignment on held-out operands, answers, divergence.

    Stories are long, so only ``measure_wide`` reads them.
    """
    row = layer_row(layer)
    return _measured(study, wrapped, words, {style: ([row], 0) for style in STYLES[:2]}, row)


def measure_wide(study: DualRewardStudy, wrapped: PeftModel | None) -> dict[str, Any]:
    """The same at every layer and on stories, too; without an adapter there is no divergence."""
    return _measured(study, wrapped, study.words, dict.fromkeys(STYLES, (None, study.row)), study.row)


def measure_held_out(study: DualRewardStudy, style: str) -> dict[str, Any]:
    """The lens on held-out operands in one style, at the classifier layer."""
    measured = _held_out(study, style, study.words, [study.row], 0)
    del measured["hits"]
    return measured


def _measured(
    study: DualRewardStudy,
    wrapped: PeftModel | None,
    words: list[WordTokens],
    styles: Mapping[str, tuple[list[int] | None, int]],
    row: int,
) -> dict[str, Any]:
    """``items`` keeps, problem by problem, what arms are compared by."""
    held_out = {style: _held_out(study, style, words, *where) for style, where in styles.items()}
    now, base, units = study.answer(), study.base_answers, study.units()
    answered: dict[str, Any] = {
        "exact": study.share(now.exact, units),
        "log_prob": study.mean(now.log_prob, units),
        "loss": -now.per_token.mean(),
        "by_operation": study.by_operation(now.exact),
    }
    result = {"reported": reported_table(study, row, words), **held_out, "answers": answered}
    hits = {style: measured.pop("hits") for style, measured in held_out.items()}
    if wrapped is not None:
        result["items"] = {"top": hits["symbol"], "log_prob": now.log_prob}
        answered["change"] = study.mean(now.log_prob - base.log_prob, units)
        answered["exact_change"] = study.mean(now.exact.double() - base.exact.double(), units)
        result["kl"] = study.mean(divergence(study.lm, wrapped, NEUTRAL))
    return result


def _held_out(
    study: DualRewardStudy, style: str, words: list[WordTokens], rows: list[int] | None, at: int
) -> dict[str, Any]:
    lens, units = study.read(study.prompts(style), rows, words), study.units(style)
    return {
        "alignment": study.mean(lens.own_word[at], units),
        "top": study.share(lens.is_top[at], units),
        "choice": study.share(lens.choice[at] == torch.tensor(study.own), units),
        "hits": lens.is_top[at],
        **({} if rows else {"by_layer": study.mean(lens.own_word, units)}),
    }


def reported_table(study: DualRewardStudy, row: int, words: list[WordTokens], *, ending: str = "") -> dict[str, Any]:
    """The originals' table: eight prompts, top token over the full vocabulary at one layer."""
    prompts, own = labelled(LENS)
    lens = alignment(study.lm, [prompt + ending for prompt in prompts], own, words, rows=[row])
    return {
        "prompts": study.table(prompts, lens),
        "top": study.share(lens.is_top[0]),
        "least_probability": lens.own_word[0].min(),
        "largest_probability": lens.own_word[0].max(),
    }


def _without_o(study: DualRewardStudy, wrapped: PeftModel) -> dict[str, Any]:
    with forgotten(wrapped, ["o_proj"]):
        return reported_table(study, study.row, study.words)


def who_reads(study: DualRewardStudy, words: list[WordTokens]) -> dict[str, Any]:
    """Does anything read the words' directions?

    Answers where the words' directions are removed, against random directions that take away a vector of equal norm;
    and where the lens is made to say "add" for "multiply" and the other way round (``interchange``). Changes are paired
    by problem.
    """
    basis, units = word_basis(words, study.lm.readout), study.units()
    intact, draws = study.answer().log_prob, range(study.settings.random_removals)

    def change(along: torch.Tensor | None) -> torch.Tensor:
        with subspace_removed(study.lm, study.layer, basis, along):
            return study.answer().log_prob - intact

    no_words = change(None)
    null = torch.stack([change(random_basis(basis, seed=draw)) for draw in draws])
    return {
        "directions": len(basis),
        "words": study.mean(no_words, units),
        "random": study.mean(null.mean(0), units),
        "random_by_draw": null.mean(-1),
        "difference": study.mean(no_words - null.mean(0), units),
        "interchange": interchange(study, words),
    }


def interchange(study: DualRewardStudy, words: list[WordTokens]) -> dict[str, Any]:
    """Do answers follow the word? Products and sums of the test problems, the two operations' words interchanged.

    An answer follows if that of the other operation (15 for ``7 * 8 =``) becomes the more probable of the two.
    ``followed`` is the share of problems where it does, with the words intact (``before``), interchanged, and with the
    same amount added along a random direction; ``margin`` is what interchanging changes of the other answer's
    log-probability less the own one's, in nats, against the random direction.
    """
    swapped = {"multiply": "add", "add": "multiply"}
    pairs = [(p, Problem(swapped[p.operation], p.a, p.b)) for p in study.problems.test if p.operation in swapped]
    pairs = [(problem, other) for problem, other in pairs if problem.answer != other.answer]
    prompts, units = [problem.symbol for problem, _ in pairs], [str(sorted(p.operands)) for p, _ in pairs]
    own, other = ([f" {each.answer}" for each in side] for side in zip(*pairs, strict=True))
    ids = study.spaced_ids([words[study.operations.index(name)] for name in swapped])

    def margin() -> torch.Tensor:
        return answers(study.lm, prompts, other).log_prob - answers(study.lm, prompts, own).log_prob

    def moved(seed: int | None) -> torch.Tensor:
        with words_interchanged(study.lm, study.layer, ids, seed):
            return margin()

    before, after = margin(), moved(None)
    null = torch.stack([moved(draw) for draw in range(study.settings.random_removals)])
    followed = {"before": before > 0, "words": after > 0}
    return {
        "followed": {
            **{name: study.share(hits, units) for name, hits in followed.items()},
            "random": study.mean((null > 0).double().mean(0), units),
            "difference": study.mean((after > 0).double() - (null > 0).double().mean(0), units),
        },
        "margin": {
            "words": study.mean(after - before, units),
            "random": study.mean(null.mean(0) - before, units),
            "difference": study.mean(after - null.mean(0), units),
        },
    }


def against(
    study: DualRewardStudy, runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], item: str, of: str = ""
) -> dict[str, Any]:
    """An arm minus another, problem by problem and seed by seed; ``of`` names the other's item if it is another."""
    return over([study.paired(*pair, item, of or item) for pair in zip(runs, others, strict=True)])


def arm_summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of an arm over its seeds."""
    paths = ["reported.top", "reported.least_probability", "reported.largest_probability", "answers.exact",
             "answers.log_prob", "answers.loss", "answers.change", "answers.exact_change", "kl"]  # fmt: skip
    paths += [f"{style}.{what}" for style in STYLES for what in ("alignment", "top", "choice") if style in runs[0]]
    paths += ["head.symbol", "head.word"] if "head" in runs[0] else []
    paths += [f"reading.{path}" for path in READING] if "reading" in runs[0] else []
    return {
        "seeds": len(runs),
        "parameters": runs[0]["parameters"],
        "first_step_above_threshold": [run["first_step_above_threshold"] for run in runs],
        "final_losses": [run["losses"][-1] for run in runs],
        **summary_over_seeds(runs, paths),
    }
