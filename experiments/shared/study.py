"""What every study shares: a model with the layer that its lens reads, problems, and numbers with uncertainty."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from classifier_emergence.errors import InputError
from classifier_emergence.reading.layers import layer_at, layer_row
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import WordTokens, token_text, word_tokens
from classifier_emergence.tasks.arithmetic import N_TEMPLATES
from classifier_emergence.tasks.problems import Problem, split
from classifier_emergence.training.adapters import Adapter
from classifier_emergence.training.evaluation import Alignment, Answers, alignment, answers
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.modules import VO
from classifier_emergence.training.supervised import Trained
from experiments.params import Params, Supervised, Update
from experiments.shared.summaries import mean_of, share_of


def adapter_of(settings: Update, layers: int, modules: tuple[str, ...] = VO, *, rank: int | None = None) -> Adapter:
    """A low-rank update of modules in the first ``layers`` blocks; ``rank`` in place of that of the settings."""
    return Adapter(modules, rank or settings.rank, settings.scale, tuple(range(layers)))


def schedule_of(settings: Supervised, seed: int, steps: int | None = None) -> Schedule:
    """How an adapter is trained; ``steps`` in place of those of the settings."""
    return Schedule(steps or settings.steps, settings.batch_size, settings.learning_rate, seed, settings.every)


def curves_of(trained: Trained) -> dict[str, Any]:
    """What a result keeps of a run."""
    return {"losses": trained.losses, "watched": trained.watched, "parameters": trained.parameters}


class Study:
    """A model under study.

    Attributes:
        layer: The classifier layer, a 0-based block.
        row: Its row of a residual stream.
    """

    def __init__(self, lm: LanguageModel, params: Params, *, depth: float, resamples: int) -> None:
        self.lm, self.params, self.resamples = lm, params, resamples
        self.n_layers = lm.n_layers
        self.layer = layer_at(depth, self.n_layers)
        self.row = layer_row(self.layer)

    def mean(self, values: ArrayLike, clusters: ArrayLike | None = None) -> dict[str, Any]:
        """Mean over the last axis with its bootstrap interval; see ``summaries.mean_of``."""
        return mean_of(values, self.params.confidence, self.resamples, clusters=clusters)

    def share(self, hits: ArrayLike, clusters: ArrayLike | None = None) -> dict[str, Any]:
        """Accuracy with its Wilson interval; see ``summaries.share_of``."""
        return share_of(hits, self.params.confidence, clusters=clusters)

    def tokens(self, words: Sequence[str]) -> list[WordTokens]:
        """How the vocabulary spells words."""
        return [word_tokens(word, self.lm.tokenizer) for word in words]

    def spaced_ids(self, words: Sequence[WordTokens]) -> list[int]:
        """Tokens of words with a leading space, which the lens is told to say: some vocabularies cut bare words.

        Raises:
            InputError: A word is no single token then.
        """
        for word in words:
            if f" {word.word}" not in word.forms:
                raise InputError(
                    f"target word {word.word!r}: with a leading space it is no single token of {self.lm.key}"
                )
        return [word.forms[f" {word.word}"] for word in words]

    def table(self, prompts: Sequence[str], lens: Alignment) -> list[dict[str, Any]]:
        """The originals' table: what the lens says of each prompt at one layer."""
        tops = [token_text(self.lm.tokenizer, int(i)) for i in lens.top_id[0]]
        return [
            {"prompt": prompt, "top_token": top, "top_probability": p, "own_probability": q}
            for prompt, top, p, q in zip(prompts, tops, lens.top_probability[0], lens.own_word[0], strict=True)
        ]


class ProblemStudy(Study):
    """A model and arithmetic problems, some of which are tested; their operands are trained with no operation.

    Attributes:
        operations: Of the problems: the classes.
        words: Of the operations.
        own: Class of each test problem.
    """

    def __init__(
        self,
        lm: LanguageModel,
        params: Params,
        settings: Any,
        *,
        depth: float,
        reserved: Collection[Problem] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(lm, params, depth=depth, resamples=settings.resamples)
        self.operations = list(settings.operands)
        tested = settings.test_problems
        if not isinstance(tested, Mapping):
            tested = dict.fromkeys(self.operations, tested)
        self.problems = split(settings.operands, tested, seed=seed, reserved=reserved)
        self.words = self.tokens(self.operations)
        self.own = [self.operations.index(problem.operation) for problem in self.problems.test]

    def prompts(self, style: str = "symbol") -> list[str]:
        """The test problems in a style; words and stories use every template in turn."""
        if style == "symbol":
            return [problem.symbol for problem in self.problems.test]
        # Problems of the operations stand in turn: one template serves one of each.
        return [p.prompt(style, i // len(self.operations)) for i, p in enumerate(self.problems.test)]

    def units(self, style: str = "symbol") -> list[str]:
        """What each of those prompts shares with others: its operand pair or, of words and stories, its template.

        Intervals resample these as a whole: what holds for a template holds for its prompts together.
        """
        if style == "symbol":
            return [str(sorted(problem.operands)) for problem in self.problems.test]
        return [str(i // len(self.operations) % N_TEMPLATES) for i in range(len(self.problems.test))]

    def paired(self, after: Mapping[str, Any], before: Mapping[str, Any], item: str, of: str = "") -> dict[str, Any]:
        """Difference of what two measures keep of the first test problems, under ``items``; paired by problem.

        ``of`` names the item of ``before`` if it is another.
        """
        a, b = (np.asarray(x["items"][name], dtype=float) for x, name in ((after, item), (before, of or item)))
        return self.mean(a - b, self.units()[: len(a)])

    def answer(self) -> Answers:
        """Answers to the test problems."""
        return answers(self.lm, self.prompts(), [f" {problem.answer}" for problem in self.problems.test])

    def read(
        self, prompts: Sequence[str], rows: Sequence[int] | None = None, words: Sequence[WordTokens] | None = None
    ) -> Alignment:
        """The lens on the first test problems, put as prompts."""
        return alignment(self.lm, prompts, self.own[: len(prompts)], words or self.words, rows=rows)

    def by_operation(self, right: Tensor) -> dict[str, Any]:
        """Accuracy on the test problems of each operation."""
        own = torch.tensor(self.own)
        return {operation: self.share(right[own == o]) for o, operation in enumerate(self.operations)}
