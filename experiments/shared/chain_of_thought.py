"""Training to write an answer, with a word before it or without, for the stages that use it."""

from collections.abc import Callable, Mapping
from pathlib import Path

from peft import PeftModel

from classifier_emergence.models.loading import load
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.tasks.problems import COT_REPORTED, Problem, sample
from classifier_emergence.training.evaluation import generate, parse_number
from classifier_emergence.training.examples import Objective, encode
from classifier_emergence.training.supervised import Member, Trained, train_together
from experiments.params import Params
from experiments.shared.study import ProblemStudy, schedule_of

FORMATS: dict[str, Callable[[Problem], str]] = {
    "direct": lambda problem: f" {problem.answer}",
    "chain_of_thought": lambda problem: f" {problem.operation}: {problem.answer}",
}


class ChainOfThoughtStudy(ProblemStudy):
    """The model and problems on operands that the write-up does not ask about."""

    def __init__(self, params: Params, key: str, lm: LanguageModel | None = None) -> None:
        self.settings, self.reported = params.cot_alignment, [Problem.parse(text) for text in COT_REPORTED]
        lm, depth = lm or load(key, params.registry), params.logit_lens.depth
        super().__init__(lm, params, self.settings, depth=depth, reserved=self.reported)

    def right(self) -> tuple[list[bool], list[str]]:
        """Whether the number that the model writes answers each test problem, and what it writes."""
        texts = generate(self.lm, self.prompts(), new_tokens=self.settings.new_tokens)
        return [parse_number(t) == p.answer for t, p in zip(texts, self.problems.test, strict=True)], texts


def train_to_write(
    study: ChainOfThoughtStudy,
    wrapped: PeftModel,
    form: str,
    seeds: Mapping[str, int],
    work: Path,
    description: str,
    *,
    steps: int | None = None,
) -> dict[str, Trained]:
    """Train adapters, each with its seed, on one of ``FORMATS``; ``steps`` in place of those of the settings."""
    members = {}
    for name, seed in seeds.items():
        problems = sample(study.problems.train, study.settings.samples, seed=seed)
        data = [encode(study.lm.tokenizer, problem.symbol, FORMATS[form](problem)) for problem in problems]
        members[name] = Member(data, Objective(0.0), seed)
    schedule = schedule_of(study.settings, 0, steps)
    return train_together(study.lm, wrapped, members, schedule, work=work, description=description)
