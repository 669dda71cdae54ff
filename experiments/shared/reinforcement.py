"""Reinforcement learning on answers: problems, prompts, rewards and what is measured, for the stages that use it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifier_emergence.models.loading import load
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.tasks.arithmetic import LENS, SIGNS, labelled, prompt_bank
from classifier_emergence.tasks.problems import Problem, sample
from classifier_emergence.training.evaluation import Alignment, Answers, alignment, answers
from classifier_emergence.training.rl.rewards import exact, parse_answer
from classifier_emergence.training.rl.rollouts import Draws, draw_completions, line_ends
from classifier_emergence.training.rl.trainer import PolicyTask, Sampling
from experiments.params import Params
from experiments.shared.study import ProblemStudy

REPORTED_OPERANDS = {"multiply": (2, 12), "add": (10, 99), "subtract": (10, 99)}
DRAWN_TOGETHER = 32  # prompts whose completions are drawn in one batch, in evaluation


class PolicyStudy(ProblemStudy):
    """A model and problems that it solves sometimes; what the lens is read on is not trained on either.

    Attributes:
        targets: How the vocabulary spells every operation, also those that have no problems here.
        base_answers: Of the model as it was loaded.
    """

    def __init__(self, params: Params, key: str, lm: LanguageModel | None = None) -> None:
        self.settings = params.grpo
        reserved = [Problem("add", *prompt.pair) for prompt in prompt_bank("symbol", params.bank)]
        reserved += [Problem.parse(text) for text in labelled(LENS)[0]]
        lm = lm or load(key, params.registry)
        super().__init__(lm, params, self.settings, depth=self.settings.depth, reserved=reserved)
        self.targets = {operation: word_tokens(operation, lm.tokenizer) for operation in SIGNS}
        self.sampling = Sampling(self.settings.group, self.settings.temperature, self.settings.new_tokens)
        self.base_answers = self.answer()

    def prompt(self, problem: Problem) -> str:
        """A problem after solved ones."""
        return "".join(f"{line}\n" for line in self.settings.shots) + problem.symbol

    def answer(self) -> Answers:
        """Answers to the test problems."""
        test = self.problems.test
        return answers(self.lm, [self.prompt(problem) for problem in test], [f" {problem.answer}" for problem in test])

    def spaced_targets(self) -> dict[str, int]:
        """What the lens is told to say for each operation of the problems."""
        return dict(zip(self.operations, self.spaced_ids(self.words), strict=True))

    def tasks(self, n: int, seed: int) -> list[PolicyTask]:
        """Problems to train on, put as prompts, with what the lens is told to say."""
        targets = self.spaced_targets()
        problems = sample(self.problems.train, n, seed=seed)
        return [PolicyTask(self.prompt(p), p.answer, targets[p.operation]) for p in problems]

    def read_problems(self, problems: Sequence[Problem], prompts: Sequence[str]) -> Alignment:
        """The lens at the classifier layer, on problems put as prompts."""
        own = [self.operations.index(problem.operation) for problem in problems]
        return alignment(self.lm, prompts, own, self.words, rows=[self.row])

    def behaviour(self) -> dict[str, Any]:
        """What the model answers: greedily, and drawn as in training."""
        now, units = self.answer(), self.units()
        reward = self.sampled_reward(self.problems.test)
        return {
            "answers": {
                "exact": self.share(now.exact, units),
                "log_prob": self.mean(now.log_prob, units),
                "change": self.mean(now.log_prob - self.base_answers.log_prob, units),
                "by_operation": self.by_operation(now.exact),
            },
            "items": {"exact": now.exact, "reward": reward.pop("by_problem")},
            "sampled_reward": reward,
        }

    def sampled_reward(self, problems: Sequence[Problem]) -> dict[str, Any]:
        """Reward of completions drawn for problems; the interval is over problems."""
        parts = [problems[start : start + DRAWN_TOGETHER] for start in range(0, len(problems), DRAWN_TOGETHER)]
        generator = torch.Generator(self.lm.model.device).manual_seed(0)
        rewards = torch.cat([self.draw(part, generator)[2] for part in parts])
        zero, by_problem = float((rewards.std(1) == 0).double().mean()), rewards.mean(1)
        units = self.units()[: len(problems)]
        return {**self.mean(by_problem, units), "zero_variance": zero, "by_problem": by_problem}

    def draw(
        self, problems: Sequence[Problem], generator: torch.Generator = torch.default_generator
    ) -> tuple[list[list[int]], list[list[int]], Tensor]:
        """Token ids of the prompts and of a group of completions for each, and the rewards (problems, group)."""
        tokenizer, how = self.lm.tokenizer, self.sampling
        prompts = tokenizer([self.prompt(problem) for problem in problems])["input_ids"]
        stop = [int(tokenizer.eos_token_id), *line_ends(tokenizer)]
        rows = [i for i in range(len(problems)) for _ in range(how.group)]
        drawn = [Draws(prompts, rows, generator)]
        ids = draw_completions(self.lm, drawn, new_tokens=how.new_tokens, temperature=how.temperature, stop=stop)[0]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        rewards = exact(parse_answer)(texts, texts, [problems[row].answer for row in rows])
        return prompts, ids, torch.tensor(rewards, dtype=torch.float64).view(len(problems), how.group)


def reported_prompt(problem: Problem) -> str:
    """Ends in a lone space, as the originals' prompts do."""
    return f"Calculate: {problem.symbol} "


def reported_problems(n: int, seed: int) -> list[Problem]:
    """Problems as the originals draw them; differences may be negative."""
    random = np.random.default_rng(seed)
    operations = list(REPORTED_OPERANDS)
    problems = []
    for _ in range(n):
        operation = operations[int(random.integers(len(operations)))]
        low, high = REPORTED_OPERANDS[operation]
        problems.append(Problem(operation, *random.integers(low, high + 1, size=2).tolist()))
    return problems


def early_and_late(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean reward of the first and the last fifth of the steps."""
    rewards = [reward for step in steps if (reward := step["reward"]) is not None]
    n = max(1, len(rewards) // 5)
    return {"early": float(np.mean(rewards[:n])), "late": float(np.mean(rewards[-n:]))}
