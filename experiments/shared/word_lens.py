"""The Jacobian lens of a few words alone, which is cheap enough for every model.

Which of the operation words is the most probable one does not depend on the scale of a state. So it needs no map of the
whole space, d backward passes a text, but only the images of the words' own directions: a cotangent each, exactly.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from classifier_emergence.reading.jacobian_lens import jacobian
from classifier_emergence.reading.lens_maps import LensMaps
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import feed
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.tasks.arithmetic import OPERATIONS
from classifier_emergence.tasks.problems import NEUTRAL
from experiments.params import Lenses
from experiments.shared.lens import OPERATION_WORDS, null_words
from experiments.shared.lens_fits import FITS


class WordLens:
    """The operation words and others that match them, as directions of a model's last layer; a word's best form counts.

    Attributes:
        null: Of each operation the other words.
        directions: (k, d) of all tokens of all words.
        texts: What Jacobians are taken on: the beginnings of neutral sentences, as tokens.
    """

    def __init__(self, lm: LanguageModel, settings: Lenses) -> None:
        self.lm, self.settings = lm, settings
        targets = [word_tokens(operation, lm.tokenizer) for operation in OPERATIONS]
        self.null = null_words(lm, targets, settings.word_nulls, OPERATION_WORDS)
        words = [word.ids for word in targets] + [word.ids for others in self.null for word in others]
        self.directions = lm.readout.directions(torch.tensor([i for ids in words for i in ids]))
        self.texts = [
            fed.ids[: settings.jacobian_tokens] for fed in feed(lm.tokenizer, NEUTRAL[: FITS * settings.word_texts])
        ]
        self._sizes = [len(ids) for ids in words]

    @property
    def logit(self) -> LensMaps:
        """The logit lens: the same directions at every layer."""
        return LensMaps.linear(self.directions.expand(len(self.lm.layers), -1, -1))

    def jacobian(self, ids: Sequence[int], description: str) -> LensMaps:
        """What at every layer leads to these directions at the last one, on one text, in the model as it is now."""
        found = jacobian(self.lm, ids, skip=self.settings.skip, directions=self.directions, description=description)
        return LensMaps.linear(found)

    def choose(self, maps: LensMaps, states: Tensor, own: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Whether a lens chooses the own word, and how often matched words, one for each operation, are right.

        Args:
            maps: Of the words.
            states: (layers, prompts, d).
            own: (prompts,) operation of each.

        Returns:
            (layers, prompts), and (layers, draws) shares of the prompts.
        """
        scores = torch.stack([part.amax(-1) for part in maps(states).split(self._sizes, -1)], -1)
        right = _right(scores[..., : len(OPERATIONS), None], own)[..., 0]
        return right, _right(scores[..., len(OPERATIONS) :].unflatten(-1, (len(OPERATIONS), -1)), own).mean(1)


def _right(scores: Tensor, own: Tensor) -> np.ndarray:
    """(layers, prompts, draws): whether the own class has the largest of scores (layers, prompts, classes, draws)."""
    right: np.ndarray = (scores.argmax(2) == own[:, None]).numpy()
    return right
