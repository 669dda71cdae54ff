"""Routing of a mixture of experts on anyone's texts: where does each token go, and what do experts go by?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.base import Reading, class_names, feed_prompts
from classifier_emergence.mixtures.routing import (
    REREAD_BATCH_TOKENS,
    ContextDependence,
    Information,
    Routing,
    Usage,
    context_dependence,
    information,
    routers,
    trace,
    usage,
)
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import Fed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = 50
"""Pairs of contexts of one token that are compared, at most."""
CONFIDENCE, RESAMPLES = 0.95, 1000


@dataclass(frozen=True, eq=False)
class TracedText:
    """One text's tokens and where they went."""

    text: str
    tokens: tuple[str, ...]
    experts: NDArray[np.int64]
    """(layers, tokens, k) numbers of the chosen experts, the one with the largest logit first."""
    weights: NDArray[np.float64]
    """(layers, tokens, k) factors of their outputs."""


@dataclass(frozen=True, eq=False)
class TraceReading(Reading):
    """The experts of every token at every layer with a router."""

    n_experts: int
    texts: tuple[TracedText, ...]
    notices: tuple[str, ...]
    """What is special about the texts, and what was done."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a text, token, layer and chosen expert."""
        return [
            {"text": item.text, "position": t, "token": token, "layer": layer, "choice": c,
             "expert": item.experts[i, t, c], "weight": item.weights[i, t, c]}
            for item in self.texts for t, token in enumerate(item.tokens)
            for i, layer in enumerate(self.layers) for c in range(item.experts.shape[-1])
        ]  # fmt: skip

    def plot(self) -> "Figure":
        """A grid a text: tokens down, layers across, the first expert's number on a shade of its weight."""
        from classifier_emergence.instruments.drawing import drawable, layer_axis, panels

        shown = [(item, item.tokens[:64]) for item in self.texts[:8]]  # a page holds no more
        heights = [max(2, len(tokens)) for _, tokens in shown]
        size = (max(4.0, 1.6 + 0.32 * len(self.layers)), 0.6 * len(heights) + 0.22 * sum(heights))
        figure, axes = panels(len(heights), 1, size, height_ratios=heights)
        for axis, (item, tokens) in zip(axes, shown, strict=True):
            first = item.weights[:, : len(tokens), 0].T  # (tokens, layers)
            axis.imshow(first, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            for t, i in np.ndindex(first.shape):
                shade = "1" if first[t, i] > 0.5 else "0"
                axis.text(i, t, str(item.experts[i, t, 0]), color=shade, ha="center", va="center", fontsize=6)
            axis.set_yticks(range(len(tokens)), [drawable(token) for token in tokens], family="monospace")
            axis.set_title(drawable(item.text), loc="left", fontsize="medium")
            layer_axis(axis, self.layers)
        axes[-1].set_xlabel("layer  (number of the first expert; black: it has all the weight)")
        return figure


@dataclass(frozen=True, eq=False)
class UsageReading(Reading):
    """How experts are used, and what they go by."""

    n_experts: int
    n_texts: int
    n_tokens: int
    classes: tuple[str, ...]
    """Labels of the texts; empty without labels."""
    usage: Usage
    class_load: NDArray[np.float64]
    """(classes, layers, experts): share of a class's tokens that an expert gets."""
    label: Information | None
    """Between a token's experts and its text's label; labels are permuted between texts. None without labels."""
    token: Information
    """Between a token's experts and the token."""
    context: ContextDependence | None
    """None if no token occurs in two contexts."""
    shuffles: int
    seed: int
    notices: tuple[str, ...]
    """What is special about the texts, and what was done."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer and expert, with its load, and that on each class's tokens."""
        return [
            {"layer": layer, "expert": e, "load": self.usage.load[i, e],
             **{f"load_{name}": self.class_load[c, i, e] for c, name in enumerate(self.classes)}}
            for i, layer in enumerate(self.layers) for e in range(self.n_experts)
        ]  # fmt: skip

    def plot(self) -> "Figure":
        """Heat maps of the load, experts down and layers across: of all tokens, then of each class's."""
        from classifier_emergence.instruments.drawing import drawable, layer_axis, panels

        loads = [("all tokens", self.usage.load), *zip(self.classes, self.class_load, strict=True)]
        height = 0.6 + min(3.0, 0.5 + 0.16 * self.n_experts)
        figure, axes = panels(len(loads), 1, (6.4, height * len(loads)), sharex=True)
        most = max(float(load.max()) for _, load in loads)
        for axis, (title, load) in zip(axes, loads, strict=True):
            image = axis.imshow(load.T, cmap="cividis", vmin=0, vmax=most, aspect="auto", interpolation="nearest")
            axis.set_ylabel("expert")
            axis.locator_params("y", integer=True)
            axis.set_title(drawable(title), loc="left", fontsize="medium")
            layer_axis(axis, self.layers)
        axes[-1].set_xlabel(f"layer  ({drawable(self.model)})")
        figure.colorbar(image, ax=axes, label="share of tokens")
        return figure


def trace_texts(
    lm: LanguageModel,
    texts: Sequence[str],
    *,
    layers: Sequence[str | int] | None = None,
    chat: bool = False,
    system: str | None = None,
) -> TraceReading:
    """Which experts does each token of each text go to?

    Args:
        lm: A mixture of experts.
        texts: Read as ``positions.feed`` gives them, special tokens included.
        layers: Which to keep (``"L3"``, ``3``); default all that have a router.
        chat: Pass each text through the model's own chat template.
        system: What the system says in the chat.

    Raises:
        InputError: The model has no routers (see ``routing.routers``) or none at such a layer, or a text cannot be
            read.
    """
    numbers = _numbers(lm, layers)
    fed, routing = _traced(lm, texts, chat, system)
    kept = [routing.layers.index(number) for number in numbers]
    experts, weights = routing.experts[kept].numpy(), routing.weights[kept].double().numpy()
    starts = np.cumsum([0, *(len(one.ids) for one in fed)])
    traced = [
        TracedText(text, one.tokens, experts[:, a : a + len(one.ids)], weights[:, a : a + len(one.ids)])
        for text, one, a in zip(texts, fed, starts, strict=False)
    ]
    layers = tuple(f"L{number}" for number in numbers)
    return TraceReading(lm.key, layers, routing.n_experts, tuple(traced), _notices(fed))


def routing_usage(
    lm: LanguageModel,
    texts: Sequence[str],
    labels: Sequence[Any] | None = None,
    *,
    shuffles: int = 200,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
) -> UsageReading:
    """How evenly are experts used, what do they tell of label and token, and does the context change them?

    Args:
        lm: A mixture of experts.
        texts: A few dozen at least, for numbers that mean something.
        labels: One for each text (its topic, its task); default none.
        shuffles: Permutations of labels, and of tokens, behind the p-values.
        seed: Of everything random.
        chat: Pass each text through the model's own chat template.
        system: What the system says in the chat.

    Raises:
        InputError: See ``trace_texts``; labels are too few or all equal, or the texts hold one kind of token only.
    """
    routers(lm)
    if labels is not None and len(labels) != len(texts):
        raise InputError(f"labels: {len(labels)} for {len(texts)} texts; pass one for each")
    fed, routing = _traced(lm, texts, chat, system)
    shares, of_text = routing.shares(), routing.text.numpy()
    labels = None if labels is None else class_names(labels)
    classes = tuple(dict.fromkeys(labels or ()))
    class_of = np.array([classes.index(label) for label in labels or ()])
    label = None
    if labels is not None:
        label = information(shares, class_of[of_text], shuffles=shuffles, seed=seed, groups=of_text)
    again = trace(lm, [one.ids for one in fed], batch_tokens=REREAD_BATCH_TOKENS)
    try:
        context = context_dependence(
            routing, again, pairs_per_token=PAIRS, confidence=CONFIDENCE, resamples=RESAMPLES, seed=seed
        )
    except InputError:  # texts that share no token after different beginnings say nothing of contexts
        context = None
    return UsageReading(
        model=lm.key,
        layers=tuple(f"L{number}" for number in routing.layers),
        n_experts=routing.n_experts,
        n_texts=len(texts),
        n_tokens=len(of_text),
        classes=classes,
        usage=usage(routing),
        class_load=np.array([shares[:, class_of[of_text] == c].mean(1).double().numpy() for c in range(len(classes))]),
        label=label,
        token=information(shares, routing.token.numpy(), shuffles=shuffles, seed=seed),
        context=context,
        shuffles=shuffles,
        seed=seed,
        notices=_notices(fed),
    )


def _traced(lm: LanguageModel, texts: Sequence[str], chat: bool, system: str | None) -> tuple[list[Fed], Routing]:
    fed = feed_prompts(lm, texts, "all", chat=chat, system=system, what="text")
    return fed, trace(lm, [one.ids for one in fed], description=f"{lm.key}: routing")


def _notices(fed: Sequence[Fed]) -> tuple[str, ...]:
    return tuple(notice for one in fed for notice in one.notices)


def _numbers(lm: LanguageModel, layers: Sequence[str | int] | None) -> list[int]:
    known = sorted(routers(lm))
    if layers is None:
        return known
    by_name = {name: number for number in known for name in (str(number), f"L{number}")}
    for layer in layers:
        if str(layer) not in by_name:
            raise InputError(
                f"layer {layer!r}: {lm.key} has routers in {len(known)} layers, L{known[0]} to L{known[-1]}"
            )
    return sorted({by_name[str(layer)] for layer in layers})
