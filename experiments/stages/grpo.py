"""Stage grpo@model: does reinforcement learning on answers alone make the operation, or the truth, readable?

Reported protocol: the originals' prompts, reward and settings; a probe for true and false statements on 20 items, its
direction in the vocabulary, clusters, rank and probability of the answer. Controlled: a task that the model solves
sometimes, several seeds; alignment of the operation words at every layer against other words; statements and answers on
operands never trained on. Flaws of the originals are switched off in an arm of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifier_emergence.models.loading import load
from classifier_emergence.reading.directions import project
from classifier_emergence.reading.layers import peak_row, row_at
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.probes import fit_probes, stratified_folds
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import token_text
from classifier_emergence.statistics import cohens_d, expected_max_cosine
from classifier_emergence.tasks.arithmetic import prompt_bank
from classifier_emergence.tasks.problems import Problem, sample
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.rl.rewards import exact, parse_answer, parse_reported
from classifier_emergence.training.rl.run import all_weights_trainable, train_grpo
from classifier_emergence.training.rl.trainer import PolicyObjective, PolicyTask
from experiments.params import Params
from experiments.shared.lens import OPERATION_WORDS, TRUTH_WORDS, bank_lens, null_words
from experiments.shared.probing import held_out_probes
from experiments.shared.reinforcement import PolicyStudy, early_and_late, reported_problems, reported_prompt
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main
from experiments.shared.summaries import difference, over_seeds, summary_over_seeds

LENS_NUMBERS = ("alignment", "interval", "choice", "null")
NEAR_MISSES = (-10, -2, -1, 1, 2, 10)


@dataclass(frozen=True)
class GrpoArm:
    """One way to train."""

    reported: bool = False
    """The originals' prompts, rule for the reward, learning rate and weight of the divergence."""
    flaws: bool = False
    """Half-precision weights, Adam's moments uncorrected, and the signed divergence of prompt and response."""


ARMS = {
    "controlled": GrpoArm(),
    "reported": GrpoArm(reported=True, flaws=True),
    "reported_without_flaws": GrpoArm(reported=True),
}


class GrpoStudy(PolicyStudy):
    """The same with words like the operation words, for the null; the unembedding chooses them before it is trained."""

    def __init__(self, params: Params, key: str) -> None:
        super().__init__(params, key)
        self.null = null_words(self.lm, list(self.targets.values()), params.logit_lens.null_words, OPERATION_WORDS)
        self.probe_row = row_at(self.settings.probe_depth, self.n_layers)


def run(params: Params, key: str) -> None:
    """Train every arm, measure before and after and write one result."""
    with Runs("grpo", key, params, GrpoStudy, "bank", "probing") as runs:
        before = runs.once("base", lambda study, _: measure_model(study))
        calls = {
            name: [Run(f"{name}-{s}", train_arm, (name, s)) for s in params.grpo.seeds[: 1 if arm.reported else None]]
            for name, arm in ARMS.items()
        }
        results, study = runs.by_arm(calls), runs.study
        result = {
            "model": key,
            "layers": study.lm.layers,
            "layer": study.lm.layers[study.row],
            "probe_layer": study.lm.layers[study.probe_row],
            "n_trained_on": {operation: len(problems) for operation, problems in study.problems.train.items()},
            "before": before,
            "arms": {
                name: {"runs": seeds, "summary": arm_summary(study, seeds, before)} for name, seeds in results.items()
            },
        }
        runs.finish(result)


def train_arm(study: GrpoStudy, work: Path, name: str, seed: int) -> dict[str, Any]:
    """Train all weights of the model as the arm says and measure what it did."""
    arm, settings, lm = ARMS[name], study.settings, study.lm
    how = settings.reported if arm.reported else settings
    dtype = torch.bfloat16 if arm.flaws else torch.float32
    with all_weights_trainable(lm) as model:
        trained = train_grpo(
            lm, model, tasks(study, seed, reported=arm.reported),
            exact(parse_reported if arm.reported else parse_answer),
            PolicyObjective(how.kl_weight, signed_kl=arm.flaws), study.sampling,
            Schedule(settings.steps, settings.prompts, how.learning_rate, seed, settings.every),
            work=work, dtype=dtype, bias_correction=not arm.flaws,
            description=f"GRPO of {lm.key}: {name.replace('_', ' ')}, seed {seed}",
        )  # fmt: skip
        # Loaded anew: next to all that training holds, a copy of the model is large.
        start = load(lm.key, study.params.registry).model.parameters()
        moved = sum(int((p != q.to(dtype)).sum()) for p, q in zip(model.parameters(), start, strict=True))
        del start
        after = measure_model(study)
    return {
        "steps": trained.steps,
        "parameters": trained.parameters,
        "share_of_weights_changed": moved / trained.parameters,
        "reward": early_and_late(trained.steps),
        **after,
    }


def tasks(study: GrpoStudy, seed: int, *, reported: bool) -> list[PolicyTask]:
    """The originals' problems and prompts, or problems whose operands are not tested; operations uniform."""
    n = study.settings.steps * study.settings.prompts
    problems = reported_problems(n, seed) if reported else sample(study.problems.train, n, seed=seed)
    prompt = reported_prompt if reported else study.prompt
    return [PolicyTask(prompt(p), p.answer, study.targets[p.operation].strict_id) for p in problems]


def measure_model(study: GrpoStudy) -> dict[str, Any]:
    """What the model is now, by both protocols."""
    states = residual_stream(study.lm, [prompt.text for prompt in prompt_bank("symbol", study.params.bank)])
    lens = bank_lens(study.lm, states, "symbol", list(study.targets.values()), study.null, study.params)
    return {
        "alignment": {"n": lens["n"], **{key: lens["word"][key] for key in LENS_NUMBERS}},
        **study.behaviour(),
        "statements": controlled_statements(study),
        "reported": reported_statements(study),
    }


# --- Statements: does a probe find whether they are true? ---


def controlled_statements(study: GrpoStudy) -> dict[str, Any]:
    """Accuracy of standardised probes at every layer; every problem is stated rightly and by a near miss.

    All statements of an operand pair are held out together. ``selected`` is the layer that the validation part chose.
    """
    random = np.random.default_rng(0)
    texts, groups = [], []
    for problem in study.problems.test:
        answer = int(problem.answer)
        misses = [answer + gap for gap in NEAR_MISSES if answer + gap >= 0]
        texts += [f"{problem.symbol} {stated}" for stated in (answer, int(random.choice(misses)))]
        groups += [tuple(sorted(problem.operands))] * 2
    y = torch.tensor([1, 0]).repeat(len(study.problems.test))
    settings, confidence = study.params.probing, study.params.confidence
    probes = held_out_probes(residual_stream(study.lm, texts), y, groups, settings, seed=settings.seed)
    selected = study.share(probes.selected[0])
    return {**probes.curve(confidence), "selected": selected, "selected_layers": probes.layers}


def reported_statements(study: GrpoStudy) -> dict[str, Any]:
    """The originals' measures, where they are known; wrong answers are ours (up to 10 off)."""
    n, trials = study.settings.reported.statements, study.settings.reported.trials
    texts, problems, y = [], [], torch.arange(n) % 2
    for trial in range(trials):
        random = np.random.default_rng(trial)
        drawn = reported_problems(n, trial)
        for label, problem in zip(y.tolist(), drawn, strict=True):
            gap = int(random.choice([gap for gap in range(-10, 11) if gap]))
            texts.append(f"{problem.symbol} {int(problem.answer) + (0 if label else gap)}")
        problems += drawn
    states = residual_stream(study.lm, texts).unflatten(1, (trials, -1))
    accuracy = torch.stack([cross_validated(states[:, trial], y) for trial in range(trials)])
    at_layer = states[study.probe_row]
    return {
        "n": n,
        "trials": trials,
        "curve": accuracy[0],
        "accuracy": accuracy.mean(0),
        "std": accuracy.std(0),
        "by_trial": accuracy[:, study.probe_row],
        "direction": truth_direction(study, at_layer[0], y),
        "separation": torch.stack([separation(x, y) for x in at_layer]).mean(),
        "first_token": first_token(study, problems),
    }


def cross_validated(x: Tensor, y: Tensor) -> Tensor:
    """(layers,) accuracy of unscaled probes over five unshuffled stratified folds."""
    hits = torch.zeros(x.shape[:2], dtype=torch.bool)
    for train, test in stratified_folds(y, 5):
        hits[:, test] = fit_probes(x[:, train], y[train]).predict(x[:, test]) == y[test]
    return hits.double().mean(-1)


def truth_direction(study: GrpoStudy, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Where the probe's direction points in the vocabulary, as the originals looked, and by cosine with its null."""
    tokenizer, readout = study.lm.tokenizer, study.lm.readout
    coef = fit_probes(x[None], y).coef[0]
    words, both = study.tokens(TRUTH_WORDS), torch.stack([coef[1] - coef[0], coef[0] - coef[1]])
    ends = project(both, readout, [[word.strict_id] for word in words], cosine=False, top=30)
    shown = {int(i) for i in ends.top_ids.flatten()}
    cosine = project(both, readout, [word.ids or [word.strict_id] for word in words], cosine=True, top=1)
    return {
        "top_tokens": [token_text(tokenizer, int(i)) for i in ends.top_ids[0]],
        "bottom_tokens": [token_text(tokenizer, int(i)) for i in ends.top_ids[1]],
        "found": [word.word for word in words if shown & {word.strict_id, *word.ids}],
        "best_rank": cosine.rank.min(),
        "max_cosine": cosine.top_scores.max(),
        "expected_max_cosine": expected_max_cosine(*readout.weight.shape),
    }


def separation(x: Tensor, y: Tensor) -> Tensor:
    """Mean cosine within classes less that between them, for states (n, d)."""
    normed = x.double() / x.double().norm(dim=-1, keepdim=True)
    cosine = normed @ normed.T
    same = y[:, None] == y
    other = ~torch.eye(len(y), dtype=torch.bool)
    within = torch.stack([cosine[(y == c)[:, None] & same & other].mean() for c in y.unique()])
    difference: Tensor = within.mean() - cosine[~same].mean()
    return difference


def first_token(study: GrpoStudy, problems: Sequence[Problem]) -> dict[str, Any]:
    """Rank and probability of the first token of the right answer after the originals' prompts."""
    lm, prompts = study.lm, [reported_prompt(problem) for problem in problems]
    firsts = []
    for prompt, problem in zip(prompts, problems, strict=True):
        ids = lm.tokenizer(prompt)["input_ids"]
        full = lm.tokenizer(f"{prompt}{problem.answer}")["input_ids"]
        # Where the answer changes how the prompt is split (its lone space), the changed token is the answer's first.
        firsts.append(full[next((i for i, (a, b) in enumerate(zip(ids, full, strict=False)) if a != b), len(ids))])
    states = residual_stream(lm, prompts)[-1:]
    tokens, column = torch.tensor(firsts).unique(return_inverse=True)
    scores = lens_scores(states, lm.readout, [[int(i)] for i in tokens], ranked=[[int(c)] for c in column])
    probability = scores.log_alignment[0].gather(1, column[:, None])[:, 0].exp()
    return {"rank": study.mean(scores.rank[0, :, 0].double()), "probability": study.mean(probability)}


# --- Over seeds ---


def arm_summary(study: GrpoStudy, runs: Sequence[dict[str, Any]], before: dict[str, Any]) -> dict[str, Any]:
    """The numbers of an arm over its seeds, and what changed."""
    paths = (
        "answers.exact", "answers.change", "sampled_reward", "statements.selected", "reward.early", "reward.late",
        "share_of_weights_changed", "reported.first_token.rank", "reported.first_token.probability",
    )  # fmt: skip
    old, new = before["alignment"], [run["alignment"] for run in runs]
    effects = [effect(study, run, before) for run in runs]
    return {
        "seeds": len(runs),
        **summary_over_seeds(runs, paths),
        **{name: over_seeds(effects, name) for name in effects[0]},
        "largest_alignment": [max(lens["alignment"]) for lens in new],
        # Over layers, and beside it what the maximum over the other words makes of the same.
        "largest_rise": [np.subtract(lens["alignment"], old["alignment"]).max() for lens in new],
        "largest_rise_of_null": [
            np.subtract(lens["null"]["alignment_max"], old["null"]["alignment_max"]).max() for lens in new
        ],
        "cohens_d": [cohens_d(run["reported"]["by_trial"], before["reported"]["by_trial"]) for run in runs],
    }


def effect(study: GrpoStudy, run: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """What one run made, next to the model before training; answers and rewards are paired by problem."""
    lens, token, base = run["alignment"], run["reported"]["first_token"], before["reported"]["first_token"]
    # The embedding is trained too, but is no layer of the lens.
    at_row, at_peak = (
        {"mean": lens["alignment"][i], "interval": lens["interval"][i], "n": lens["n"]}
        for i in (study.row, peak_row(lens["alignment"]))
    )
    words = set(run["reported"]["direction"]["found"]) - set(before["reported"]["direction"]["found"])
    return {
        "alignment_at_classifier": at_row,
        "alignment_peak": at_peak,
        "answers_exact_change": study.paired(run, before, "exact"),
        "sampled_reward_change": study.paired(run, before, "reward"),
        # The layer is chosen anew, so statements are not paired.
        "statements_selected_change": difference(run["statements"]["selected"], before["statements"]["selected"]),
        "truth_words_gained": len(words),
        "reported_rank_ratio": token["rank"]["mean"] / base["rank"]["mean"],
        "reported_probability_ratio": token["probability"]["mean"] / base["probability"]["mean"],
    }


if __name__ == "__main__":
    main(run, __doc__)
