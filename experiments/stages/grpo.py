"""Stage grpo@model: does reinforcement learning on answers alone make the operation, or the truth, readable?

Reported protocol: the originals' prompts, reward and settings; a probe for true and false statements on 20 items, its
direction in the vocabulary, clusters, rank and probability of the answer. Controlled: a task that the model solves
sometimes, several seeds; alignment of the operation words at every layer against other words; statements and answers on
operands never trained on. Flaws of the originals are switched off in an arm of its own.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifier_emergence.models.loading import load
from classifier_emergence.reading.directions import project
from classifier_emergence.reading.layers import layer_at, layer_row
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.probes import fit_probes, shuffled_labels, stratified_folds
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import WordTokens, token_text, word_tokens
from classifier_emergence.results import write_result
from classifier_emergence.statistics import expected_max_cosine
from classifier_emergence.tasks.arithmetic import LENS, SIGNS, labelled, prompt_bank
from classifier_emergence.tasks.problems import Problem, sample, split
from classifier_emergence.tasks.splits import rotations
from classifier_emergence.training.evaluation import Answers, answers
from classifier_emergence.training.flaws import round_to_dtype_
from classifier_emergence.training.rl.rewards import exact, parse_answer, parse_reported
from classifier_emergence.training.rl.rollouts import draw_completions, line_ends
from classifier_emergence.training.rl.run import GrpoRun, all_weights_trainable, train_grpo
from classifier_emergence.training.rl.trainer import PolicyObjective, PolicyTask, Sampling
from classifier_emergence.training.supervised import Schedule
from experiments.params import Params
from experiments.shared.runs import Runs, mean_of, over_seeds, share_of, summary_over_seeds
from experiments.shared.stage import accuracy_curve, main
from experiments.stages.logit_lens import controlled as alignment_of_bank
from experiments.stages.logit_lens import null_words

TRUTH_WORDS = (
    "correct", "incorrect", "right", "wrong", "true", "false", "yes", "no", "valid", "invalid", "good", "bad", "ok",
    "error",
)  # fmt: skip
"""The words that the originals looked for in the probe's direction."""

REPORTED_OPERANDS = {"multiply": (2, 12), "add": (10, 99), "subtract": (10, 99)}
LENS_NUMBERS = ("alignment", "interval", "choice", "null")
NEAR_MISSES = (-10, -2, -1, 1, 2, 10)
TOLERANCE = 1e-4  # of the probes; see experiments.probing
DRAWN_TOGETHER = 32  # prompts whose completions are drawn in one batch, in evaluation


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    reported: bool = False
    """The originals' prompts, rule for the reward, learning rate and weight of the divergence."""
    flaws: bool = False
    """Half-precision weights updated in place, and the signed divergence of prompt and response."""


ARMS = {"controlled": Arm(), "reported": Arm(reported=True, flaws=True), "reported_without_flaws": Arm(reported=True)}


@dataclass
class Study:
    """What all arms share."""

    lm: LanguageModel
    params: Params
    targets: dict[str, WordTokens] = field(init=False)

    def __post_init__(self) -> None:
        self.settings = self.params.grpo
        self.n_layers = self.lm.n_layers
        self.layer = layer_at(self.settings.depth, self.n_layers)
        self.probe_layer = layer_at(self.settings.probe_depth, self.n_layers)
        self.operations = list(self.settings.operands)
        self.targets = {operation: word_tokens(operation, self.lm.tokenizer) for operation in SIGNS}
        # What the lens is read on is not trained on either.
        reserved = [Problem("add", *prompt.pair) for prompt in prompt_bank("symbol", self.params.bank)]
        reserved += [Problem.parse(text) for text in labelled(LENS)[0]]
        tested = dict.fromkeys(self.operations, self.settings.test_problems)
        self.problems = split(self.settings.operands, tested, seed=0, reserved=reserved)

    def prompt(self, problem: Problem) -> str:
        """A problem after solved ones."""
        return "".join(f"{line}\n" for line in self.settings.shots) + problem.symbol

    def answer(self) -> Answers:
        """Answers to the test problems."""
        test = self.problems.test
        wanted = [f" {problem.answer}" for problem in test]
        return answers(self.lm, [self.prompt(problem) for problem in test], wanted)

    @cached_property
    def base_answers(self) -> Answers:
        """Answers of the model as it was loaded; ask before training."""
        return self.answer()

    @cached_property
    def null(self) -> dict[str, list[WordTokens]]:
        """Words like the operation words, for the null; chosen by the unembedding before training."""
        return null_words(self.lm, self.lm.readout, self.targets, self.params)


def run(params: Params, key: str) -> None:
    """Train every arm, measure before and after and write one result."""
    study = Study(load(key, params.registry), params)
    runs = Runs("grpo", key, params, "bank", "probing")
    _ = study.base_answers, study.null
    before = runs.once("base", lambda _: measure(study))
    jobs = {
        name: {f"{name}-{s}": trained(study, name, arm, s) for s in params.grpo.seeds[: 1 if arm.reported else None]}
        for name, arm in ARMS.items()
    }
    arms = {
        name: {"runs": found, "summary": summary(found, before, layer_row(study.layer))}
        for name, found in runs.by_arm(jobs).items()
    }
    result = {
        "model": key,
        "layers": study.lm.layers,
        "layer": f"L{study.layer}",
        "probe_layer": f"L{study.probe_layer}",
        "n_trained_on": {operation: len(found) for operation, found in study.problems.train.items()},
        "before": before,
        "arms": arms,
    }
    write_result(runs.result, result)
    shutil.rmtree(runs.folder)


def trained(study: Study, name: str, arm: Arm, seed: int) -> Callable[[Path], dict[str, Any]]:
    """Train all weights of the model as the arm says and measure what it did."""

    def compute(work: Path) -> dict[str, Any]:
        settings = study.settings
        reported = settings.reported
        objective = PolicyObjective(reported.kl_weight if arm.reported else settings.kl_weight, signed_kl=arm.flaws)
        rate = reported.learning_rate if arm.reported else settings.learning_rate
        schedule = Schedule(settings.steps, settings.prompts, rate, seed, settings.every)
        reward = exact(parse_reported if arm.reported else parse_answer)
        tasks = (reported_tasks if arm.reported else controlled_tasks)(study, seed)
        text = f"GRPO of {study.lm.key}: {name.replace('_', ' ')}, seed {seed}"
        dtype = torch.bfloat16 if arm.flaws else torch.float32
        with all_weights_trainable(study.lm) as model:
            round_to_dtype_(model.parameters(), dtype)
            start = [parameter.detach().clone() for parameter in model.parameters()]
            found: GrpoRun = train_grpo(
                study.lm, model, tasks, reward, objective, sampling(study), schedule, work=work,
                dtype=dtype, description=text,
            )  # fmt: skip
            moved = sum(int((p != q).sum()) for p, q in zip(model.parameters(), start, strict=True))
            del start
            after = measure(study)
        return {
            "steps": found.steps,
            "parameters": found.parameters,
            "share_of_weights_changed": moved / found.parameters,
            "reward": late_and_early(found.steps),
            **after,
        }

    return compute


def sampling(study: Study) -> Sampling:
    """How completions are drawn, in training and in evaluation."""
    settings = study.settings
    return Sampling(settings.group, settings.temperature, settings.new_tokens)


def controlled_tasks(study: Study, seed: int) -> list[PolicyTask]:
    """Problems whose operands are not tested; operations uniform."""
    n = study.settings.steps * study.settings.prompts
    return [
        PolicyTask(study.prompt(problem), problem.answer, study.targets[problem.operation].strict_id)
        for problem in sample(study.problems.train, n, seed=seed)
    ]


def reported_tasks(study: Study, seed: int) -> list[PolicyTask]:
    """The originals' prompts; differences may be negative."""
    n = study.settings.steps * study.settings.prompts
    return [
        PolicyTask(reported_prompt(problem), problem.answer, study.targets[problem.operation].strict_id)
        for problem in reported_problems(n, seed)
    ]


def reported_prompt(problem: Problem) -> str:
    """Ends in a lone space, as the originals' prompts do."""
    return f"Calculate: {problem.symbol} "


def reported_problems(n: int, seed: int) -> list[Problem]:
    """Problems as the originals draw them."""
    random = np.random.default_rng(seed)
    operations = list(REPORTED_OPERANDS)
    found = []
    for _ in range(n):
        operation = operations[int(random.integers(len(operations)))]
        low, high = REPORTED_OPERANDS[operation]
        a, b = random.integers(low, high + 1, size=2).tolist()
        found.append(Problem(operation, a, b))
    return found


def late_and_early(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean reward of the first and the last fifth of the steps."""
    rewards = [reward for step in steps if (reward := step["reward"]) is not None]
    n = max(1, len(rewards) // 5)
    return {"early": float(np.mean(rewards[:n])), "late": float(np.mean(rewards[-n:]))}


def measure(study: Study) -> dict[str, Any]:
    """What the model is now, by both protocols."""
    return {
        "alignment": alignment_now(study),
        **behaviour(study),
        "statements": statements(study),
        "reported": reported(study),
    }


def alignment_now(study: Study) -> dict[str, Any]:
    """The lens at every layer, against its null."""
    lm, params = study.lm, study.params
    bank = [prompt.text for prompt in prompt_bank("symbol", params.bank)]
    states = residual_stream(lm, bank)
    lens = alignment_of_bank(lm, lm.readout, states, "symbol", study.targets, study.null, params)
    return {"n": lens["n"], **{key: lens["word"][key] for key in LENS_NUMBERS}}


def behaviour(study: Study) -> dict[str, Any]:
    """What the model answers: greedily, and drawn as in training."""
    params, settings = study.params, study.settings
    found, base = study.answer(), study.base_answers
    return {
        "answers": {
            "exact": share_of(found.exact, params),
            "log_prob": mean_of(found.log_prob, params, settings.resamples),
            "change": mean_of(found.log_prob - base.log_prob, params, settings.resamples),
            "by_operation": {
                op: share_of(found.exact[torch.tensor([p.operation == op for p in study.problems.test])], params)
                for op in study.operations
            },
        },
        "sampled_reward": sampled_reward(study, study.problems.test),
    }


def sampled_reward(study: Study, test: Sequence[Problem]) -> dict[str, Any]:
    """Reward of completions drawn for problems; the interval is over problems."""
    lm, how = study.lm, sampling(study)
    encoded = lm.tokenizer([study.prompt(problem) for problem in test])["input_ids"]
    stop = [int(lm.tokenizer.eos_token_id), *line_ends(lm.tokenizer)]
    hits: list[float] = []
    torch.manual_seed(0)
    for start in range(0, len(test), DRAWN_TOGETHER):
        part = encoded[start : start + DRAWN_TOGETHER]
        rows = [i for i in range(len(part)) for _ in range(how.group)]
        ids = draw_completions(lm, part, rows, new_tokens=how.new_tokens, temperature=how.temperature, stop=stop)
        texts = lm.tokenizer.batch_decode(ids, skip_special_tokens=True)
        wanted = [test[start + row].answer for row in rows]
        hits += exact(parse_answer)(texts, texts, wanted)
    by_problem = np.reshape(hits, (len(test), how.group))
    return {
        **mean_of(by_problem.mean(-1), study.params, study.settings.resamples),
        "zero_variance": float((by_problem.std(-1) == 0).mean()),
    }


# --- Statements: does a probe find whether they are true? ---


def statements(study: Study) -> dict[str, Any]:
    """Accuracy of standardised probes at every layer; every problem is stated rightly and by a near miss.

    All statements of an operand pair are held out together. ``selected`` is the layer that the validation part chose.
    """
    params, problems = study.params, study.problems.test
    random = np.random.default_rng(0)
    texts, labels, groups = [], [], []
    for problem in problems:
        answer = int(problem.answer)
        misses = [answer + gap for gap in NEAR_MISSES if answer + gap >= 0]
        for label, stated in ((1, answer), (0, int(random.choice(misses)))):
            texts.append(f"{problem.symbol} {stated}")
            labels.append(label)
            groups.append(tuple(sorted(problem.operands)))
    y = torch.tensor(labels)
    states = residual_stream(study.lm, texts)
    probing = params.probing
    correct = torch.zeros(len(states), 1 + probing.shuffles, len(y), dtype=torch.bool)
    selected, chosen = torch.zeros(len(y), dtype=torch.bool), []
    for k, part in enumerate(rotations(groups, probing.folds, seed=probing.seed)):
        shuffles = shuffled_labels(y[part.train], probing.shuffles, seed=probing.seed + k)
        sets = torch.cat([y[None, part.train], shuffles])
        probes = fit_probes(states[:, part.train], sets, C=probing.C, standardise=True, tol=TOLERANCE)
        validation = probes.predict(states[:, part.validation])[:, 0] == y[part.validation]
        layer = int(validation.double().mean(-1).argmax())
        correct[:, :, part.test] = probes.predict(states[:, part.test]) == y[part.test]
        selected[part.test] = correct[layer, 0, part.test]
        chosen.append(study.lm.layers[layer])
    return {
        **accuracy_curve(correct[:, 0], params.confidence),
        "shuffled_peak_accuracy_95": torch.quantile(correct[:, 1:].double().mean(-1).amax(0), 0.95),
        "selected": share_of(selected, params),
        "selected_layers": chosen,
    }


def reported(study: Study) -> dict[str, Any]:
    """The originals' measures, where they are known; wrong answers are ours (up to 10 off)."""
    settings = study.settings.reported
    texts, y = [], torch.arange(settings.statements) % 2
    for trial in range(settings.trials):
        random = np.random.default_rng(trial)
        for label, problem in zip(y.tolist(), reported_problems(settings.statements, trial), strict=True):
            gap = int(random.choice([gap for gap in range(-10, 11) if gap]))
            texts.append(f"{problem.symbol} {int(problem.answer) + (0 if label else gap)}")
    states = residual_stream(study.lm, texts).unflatten(1, (settings.trials, -1))
    accuracy = torch.stack([cross_validated(states[:, trial], y) for trial in range(settings.trials)])
    row = layer_row(study.probe_layer)
    problems = [p for trial in range(settings.trials) for p in reported_problems(settings.statements, trial)]
    return {
        "n": settings.statements,
        "trials": settings.trials,
        "curve": accuracy[0],
        "accuracy": accuracy.mean(0),
        "std": accuracy.std(0),
        "by_trial": accuracy[:, row],
        "direction": truth_direction(study, states[row, 0], y),
        "separation": torch.stack([separation(states[row, trial], y) for trial in range(settings.trials)]).mean(),
        "first_token": first_token(study, problems),
    }


def cross_validated(x: Tensor, y: Tensor) -> Tensor:
    """(layers,) accuracy of unscaled probes over five unshuffled stratified folds."""
    hits = torch.zeros(x.shape[:2], dtype=torch.bool)
    for train, test in stratified_folds(y, 5):
        hits[:, test] = fit_probes(x[:, train], y[train]).predict(x[:, test]) == y[test]
    return hits.double().mean(-1)


def truth_direction(study: Study, x: Tensor, y: Tensor) -> dict[str, Any]:
    """Where the probe's direction points in the vocabulary, as the originals looked, and by cosine with its null."""
    tokenizer, readout = study.lm.tokenizer, study.lm.readout
    probes = fit_probes(x[None], y)
    direction = probes.coef[0, 1] - probes.coef[0, 0]
    words = [word_tokens(word, tokenizer) for word in TRUTH_WORDS]
    both = torch.stack([direction, -direction])
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


def first_token(study: Study, problems: Sequence[Problem]) -> dict[str, Any]:
    """Rank and probability of the first token of the right answer after the originals' prompts."""
    lm, params, settings = study.lm, study.params, study.settings
    prompts = [reported_prompt(problem) for problem in problems]
    found = []
    for prompt, problem in zip(prompts, problems, strict=True):
        ids = lm.tokenizer(prompt)["input_ids"]
        full = lm.tokenizer(f"{prompt}{problem.answer}")["input_ids"]
        # Where the answer changes how the prompt is split (its lone space), the changed token is the answer's first.
        found.append(full[next((i for i, (a, b) in enumerate(zip(ids, full, strict=False)) if a != b), len(ids))])
    states = residual_stream(lm, prompts)[-1:]
    tokens, column = torch.tensor(found).unique(return_inverse=True)
    scores = lens_scores(
        states, lm.readout, [[int(i)] for i in tokens], ranked=[[int(c)] for c in column]
    )  # fmt: skip
    probability = scores.log_alignment[0].gather(1, column[:, None])[:, 0].exp()
    return {
        "rank": mean_of(scores.rank[0, :, 0].double(), params, settings.resamples),
        "probability": mean_of(probability, params, settings.resamples),
    }


def summary(runs: Sequence[dict[str, Any]], before: dict[str, Any], row: int) -> dict[str, Any]:
    """The numbers of an arm over its seeds, and what changed; ``row`` is the lens's layer."""
    paths = (
        "answers.exact", "answers.change", "sampled_reward", "statements.selected", "reward.early", "reward.late",
        "share_of_weights_changed", "reported.first_token.rank", "reported.first_token.probability",
    )  # fmt: skip
    base = np.array(before["reported"]["by_trial"])
    old, new = before["alignment"], [run["alignment"] for run in runs]
    effects = [effect(run, before, row) for run in runs]
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
        "cohens_d": [cohens_d(np.array(run["reported"]["by_trial"]), base) for run in runs],
    }


def effect(run: Mapping[str, Any], before: Mapping[str, Any], row: int) -> dict[str, Any]:
    """What one run made, next to the model before training."""
    lens, token, base = run["alignment"], run["reported"]["first_token"], before["reported"]["first_token"]
    # Of the blocks' outputs: the embedding is trained too, but no layer of the lens.
    peak = 1 + int(np.argmax(lens["alignment"][1:]))
    at = [{"mean": lens["alignment"][i], "interval": lens["interval"][i], "n": lens["n"]} for i in (row, peak)]
    words = set(run["reported"]["direction"]["found"]) - set(before["reported"]["direction"]["found"])
    return {
        "alignment_at_classifier": at[0],
        "alignment_peak": at[1],
        "answers_exact_change": change(run["answers"]["exact"], before["answers"]["exact"]),
        "sampled_reward_change": change(run["sampled_reward"], before["sampled_reward"]),
        "statements_selected_change": change(run["statements"]["selected"], before["statements"]["selected"]),
        "truth_words_gained": len(words),
        "reported_rank_ratio": token["rank"]["mean"] / base["rank"]["mean"],
        "reported_probability_ratio": token["probability"]["mean"] / base["probability"]["mean"],
    }


def change(after: Any, before: Any) -> dict[str, Any]:
    """Difference of two accuracies or means, with an interval made of theirs by squaring and adding.

    Its ends are ``d - sqrt((a - a_low)^2 + (b_high - b)^2)`` and ``d + sqrt((a_high - a)^2 + (b - b_low)^2)``, which
    takes the two as independent. They are of the same items, which makes the interval too wide rather than too narrow.

    Source: Newcombe (1998), Interval estimation for the difference between independent proportions, method 10.
    """
    (a, (a_low, a_high)), (b, (b_low, b_high)) = (
        (item["accuracy"] if "accuracy" in item else item["mean"], item["interval"]) for item in (after, before)
    )
    low, high = np.hypot(a - a_low, b_high - b), np.hypot(a_high - a, b - b_low)
    return {"mean": a - b, "interval": [a - b - low, a - b + high], "n": after["n"]}


def cohens_d(after: np.ndarray, before: np.ndarray) -> float | None:
    """Difference of means in units of the pooled standard deviation; None if nothing varies but the means differ."""
    difference = float(after.mean() - before.mean())
    pooled = np.sqrt((after.var(ddof=1) + before.var(ddof=1)) / 2)
    return float(difference / pooled) if pooled > 0 else None if difference else 0.0


if __name__ == "__main__":
    main(run, __doc__)
