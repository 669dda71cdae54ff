"""A probe's direction on anyone's classes: does it point at a word?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.base import (
    Reading,
    check_list,
    feed_prompts,
    known_word,
    one_position,
    pick_rows,
)
from classifier_emergence.instruments.probe import SHUFFLES, encode_labels, fit, folds_of
from classifier_emergence.progress import progress
from classifier_emergence.reading.directions import project
from classifier_emergence.reading.layers import layer_at
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import Fed, Position, read_states
from classifier_emergence.reading.probes import shuffled_labels
from classifier_emergence.reading.vocabulary import token_text
from classifier_emergence.statistics import permutation_p

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTH = 0.55  # of the layer that the sources read


@dataclass(frozen=True)
class ClassDirection:
    """Where one class's probe direction points at one layer."""

    layer: str
    label: str
    top_tokens: tuple[str, ...]
    """Tokens of the vocabulary with the largest cosines."""
    top_cosines: tuple[float, ...]
    p_top: float
    """Permutation p-value of the largest cosine, against probes of permuted labels."""
    word_cosine: float | None
    """Largest cosine among the single-token forms of the class's word; None if it has none."""
    word_rank: int | None
    p_word: float | None


@dataclass(frozen=True, eq=False)
class DirectionReading(Reading):
    """Probe directions projected on the vocabulary."""

    classes: tuple[str, ...]
    n: int
    C: float
    shuffles: int
    seed: int
    vocabulary: int
    directions: tuple[ClassDirection, ...]
    fed: tuple[Fed, ...]
    """What the model was fed for each prompt, and where it was read."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer and class."""
        keys = ("layer", "label", "word_cosine", "word_rank", "p_word", "p_top")
        return [
            {**{key: getattr(item, key) for key in keys}, "top_token": item.top_tokens[0],
             "top_cosine": item.top_cosines[0]}
            for item in self.directions
        ]  # fmt: skip

    def plot(self) -> "Figure":
        """The largest cosines of each class, a panel a layer."""
        from classifier_emergence.instruments.drawing import drawable, panels

        k = len(self.classes)
        rows = len(self.directions) // k
        figure, axes = panels(rows, k, (2.4 * k + 0.6, 2.2 * rows + 0.4))
        for axis, item in zip(axes, self.directions, strict=True):
            y = range(len(item.top_tokens))[::-1]
            axis.barh(y, item.top_cosines, color="0.6")
            axis.set_yticks(y, [drawable(token) for token in item.top_tokens], family="monospace")
            axis.set_title(f"{item.layer}: {drawable(item.label)}", loc="left", fontsize="medium")
            axis.set_xlabel("cosine")
        return figure


def direction(
    lm: LanguageModel,
    prompts: Sequence[str],
    labels: Sequence[Any],
    *,
    words: Sequence[str] | None = None,
    layers: Sequence[str | int] | None = None,
    top: int = 10,
    C: float = 1.0,
    shuffles: int = SHUFFLES,
    seed: int = 0,
    position: Position = "last",
    chat: bool = False,
    system: str | None = None,
) -> DirectionReading:
    """Does a probe's direction point at a word?

    A class's direction is its row of the probe's weights less their mean over classes (a softmax does not see what
    all classes share). Its score for a token is ``cos(v, gain * W_U[t])``, see ``directions.project``; the null of
    every score is the same of probes that were fitted to permuted labels.

    Args:
        lm: Any causal language model.
        prompts: Examples, all used in the fit: this is about the direction, not about accuracy.
        labels: The class of each.
        words: The word of each class, in order of first appearance; default the labels.
        layers: Which; default the layer at 55 % depth, which the paper reads.
        top: How many tokens to show.
        C: Inverse strength of the L2 penalty.
        shuffles: Label permutations.
        seed: Of the permutations.
        position: Which token of every prompt is read, see ``positions.feed``.
        chat: Pass each prompt through the model's own chat template.
        system: What the system says in the chat.

    Raises:
        InputError: A prompt cannot be read, a layer does not exist, a class has one example, or all prompts have the
            same state at a layer.
    """
    fed = feed_prompts(lm, prompts, one_position(position), chat=chat, system=system)
    classes, y = encode_labels(prompts, labels)
    check_list(words or [], "words")
    if words is not None and len(words) != len(classes):
        raise InputError(f"words: {len(words)} for {len(classes)} classes; give each class one")
    folds_of(y, classes, None, limit=2)  # refuses a class with one example
    picked = pick_rows(lm, [layer_at(DEPTH, lm.n_layers)] if layers is None else layers)
    row_labels = lm.layers
    ids = [known_word(word, lm).ids for word in words or classes]
    known = [c for c, forms in enumerate(ids) if forms]
    readout = lm.readout
    states = read_states(lm, fed, rows=picked, description=f"{lm.key}: residual streams")
    sets = torch.cat([y[None], shuffled_labels(y, shuffles, seed=seed)])
    directions: list[ClassDirection] = []
    with progress(f"{lm.key}: directions", total=len(picked)) as advance:
        for i, row in enumerate(picked):
            label = row_labels[row]
            x = states[i : i + 1]
            if float((x - x[:, :1]).abs().max()) <= 1e-6 * float(x.abs().max()):
                raise InputError(f"layer {label}: all prompts have the same state there (they end in the same token)")
            coef = fit(x, sets, C=C).coef[0]  # (sets, classes, d)
            vectors = (coef - coef.mean(1, keepdim=True)).flatten(0, 1)
            seen = project(vectors, readout, [ids[c] for c in known] or [[0]], cosine=True, top=top)
            largest = seen.top_scores[:, 0].view(len(sets), -1)
            score = seen.score.view(len(sets), len(classes), -1)
            for c, name in enumerate(classes):
                word: tuple[float | None, int | None, float | None] = (None, None, None)
                if c in known:
                    k = known.index(c)
                    p_word = float(permutation_p(score[0, c, k].item(), score[1:, :, k].flatten().numpy()))
                    word = float(score[0, c, k]), int(seen.rank[c, k]), p_word
                tokens = tuple(token_text(lm.tokenizer, int(i)) for i in seen.top_ids[c])
                p_top = float(permutation_p(largest[0, c].item(), largest[1:].flatten().numpy()))
                cosines = tuple(seen.top_scores[c].tolist())
                directions.append(ClassDirection(label, name, tokens, cosines, p_top, *word))
            advance(1)
    return DirectionReading(
        model=lm.key,
        layers=tuple(row_labels[row] for row in picked),
        classes=classes,
        n=len(y),
        C=C,
        shuffles=shuffles,
        seed=seed,
        vocabulary=len(readout.weight),
        directions=tuple(directions),
        fed=tuple(fed),
    )
