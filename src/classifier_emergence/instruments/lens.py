"""The logit lens on anyone's prompts and words: what does the vocabulary say at every layer?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.base import (
    Reading,
    check_list,
    feed_prompts,
    known_word,
    one_position,
    pick_rows,
)
from classifier_emergence.reading.layers import layer_of
from classifier_emergence.reading.lens import LensScores, lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import Fed, Position, read_states
from classifier_emergence.reading.readout import Readout
from classifier_emergence.reading.vocabulary import WordTokens, matched_words, row_norms, token_text
from classifier_emergence.statistics import permutation_p

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLLOWED = 8
PIECES = ("refuse", "first", "chain")
"""What a target of several tokens may mean."""


@dataclass(frozen=True, eq=False)
class LensReading(Reading):
    """What the vocabulary says of prompts at every layer."""

    site: str
    """Where in a block, see ``sites.SITES``."""
    prompts: tuple[str, ...]
    fed: tuple[Fed, ...]
    """What the model was fed for each, and where it was read."""
    top_token: tuple[tuple[str, ...], ...]
    """(layers, prompts): the most probable token."""
    top_probability: NDArray[np.float64]
    """(layers, prompts)"""
    targets: tuple[str, ...]
    forms: tuple[tuple[str, ...], ...]
    """Single-token forms of each target, whose probabilities add up to its alignment."""
    alignment: NDArray[np.float64]
    """(targets, layers, prompts)"""
    rank: NDArray[np.int64]
    """(targets, layers, prompts): best rank among the forms; 1 is the top of the vocabulary."""
    peak_layer: tuple[tuple[str, ...], ...]
    """(targets, prompts): the layer of largest alignment, from L0 on."""
    peak_alignment: NDArray[np.float64]
    """(targets, prompts)"""
    null_words: tuple[int, ...]
    """How many other words of similar unembedding norm were taken as null, by target; 0 if there are too few."""
    p: tuple[tuple[float | None, ...], ...]
    """(targets, prompts): share of null words whose own peak is as high, ``(1 + hits) / (1 + words)``."""
    followed: tuple[str, ...] = ()
    """Without targets: the tokens that are the most probable ones anywhere, at most ``FOLLOWED``."""
    followed_probability: NDArray[np.float64] | None = None
    """(followed, layers, prompts)"""

    def rows(self) -> list[dict[str, Any]]:
        """One row a target, prompt and layer; without targets one a prompt and layer, with the top token."""
        if not self.targets:
            return [
                {"prompt": prompt, "layer": layer, "top_token": self.top_token[i][j],
                 "top_probability": self.top_probability[i, j]}
                for j, prompt in enumerate(self.prompts) for i, layer in enumerate(self.layers)
            ]  # fmt: skip
        return [
            {"target": target, "prompt": prompt, "layer": layer, "alignment": self.alignment[t, i, j],
             "rank": self.rank[t, i, j], "top_token": self.top_token[i][j],
             "top_probability": self.top_probability[i, j]}
            for t, target in enumerate(self.targets)
            for j, prompt in enumerate(self.prompts) for i, layer in enumerate(self.layers)
        ]  # fmt: skip

    def plot(self) -> "Figure":
        """Alignment over depth, a panel a target; without targets of the tokens that lead anywhere."""
        from classifier_emergence.instruments.drawing import FLOOR, drawable, layer_axis, panels, probability_axis

        shown = [(f"“{drawable(t)}”", self.alignment[i]) for i, t in enumerate(self.targets)]
        if not shown and self.followed_probability is not None:
            shown = [(f"“{drawable(t)}”", self.followed_probability[i]) for i, t in enumerate(self.followed[:4])]
        figure, axes = panels(len(shown), 1, (6.4, 0.8 + 2.2 * len(shown)), sharex=True)
        for axis, (title, values) in zip(axes, shown, strict=True):
            for j, prompt in enumerate(self.prompts):
                shade = str(round(0.6 * j / max(1, len(self.prompts) - 1), 3))
                line = ("-", "--", ":", "-.")[j % 4]  # carries what colours would
                axis.plot(np.clip(values[:, j], FLOOR, None), color=shade, ls=line, label=drawable(prompt))
            probability_axis(axis, "probability")
            axis.set_title(title, loc="left", fontsize="medium")
            layer_axis(axis, self.layers)
        if len(self.prompts) <= 12:
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize="small")
        axes[-1].set_xlabel("layer")
        return figure


def lens(
    lm: LanguageModel,
    prompts: Sequence[str],
    targets: Sequence[str] = (),
    *,
    layers: Sequence[str | int] | None = None,
    null_words: int = 200,
    position: Position = "last",
    chat: bool = False,
    system: str | None = None,
    pieces: str = "refuse",
    site: str = "resid",
) -> LensReading:
    """What does the readout (final norm, then unembedding) say at every layer?

    Alignment of a target is the total probability of its single-token forms (bare, leading space, capitalised) over
    the full vocabulary. A largest value over layers has a null: the largest values of other words with the same forms
    and nearly the same unembedding norm.

    Args:
        lm: Any causal language model.
        prompts: Read at one token each.
        targets: Words; without any the tokens that lead anywhere are followed.
        layers: Which to read (``"L16"``, ``16``, ``"emb"``); default all.
        null_words: Other words for the null of each target.
        position: Which token, see ``positions.feed``; for ``all`` of them there is ``lens_map``.
        chat: Pass each prompt through the model's own chat template.
        system: What the system says in the chat.
        pieces: What a target of several tokens means: ``refuse`` it, follow its ``first`` piece (labelled strict), or
            the ``chain``, the product of the probabilities of its pieces after one another. Its null is empty.
        site: ``resid``, the state after each block; or inside of it, see ``sites.SITES``.

    Raises:
        InputError: A prompt cannot be read, a layer or position does not exist, or a target has no single-token form.

    Source: nostalgebraist (2020), interpreting GPT: the logit lens.
    """
    check_list(targets, "targets")
    fed = feed_prompts(lm, prompts, one_position(position), chat=chat, system=system)
    picked = pick_rows(lm, layers, site)
    found = [target_tokens(target, lm, pieces) for target in dict.fromkeys(targets)]
    words = [word for word, _ in found]
    readout = lm.readout
    norms = row_norms(readout) if words else torch.empty(0)
    others = [word.word for word in words]
    # A piece is no word: no other words are its like.
    nulls = [_null_of(w, norms, lm, null_words, exclude=others) if w.word in targets else [] for w in words]
    states = read_states(lm, fed, rows=picked, site=site, description=f"{lm.key}: residual streams")
    groups = [word.ids for word in words] + [other.ids for null in nulls for other in null]
    # The lens must score something: without targets any token does.
    scores = lens_scores(
        states,
        readout,
        groups or [[0]],
        ranked=[list(range(len(words)))] * len(prompts) if words else None,
        description=f"{lm.key}: lens",
    )
    alignment = scores.log_alignment.double().exp().numpy()
    for t, (_, chains) in enumerate(found):
        if chains:
            alignment[..., t] = chained(lm, fed, chains, picked, readout, site)
    of_targets = np.moveaxis(alignment[..., : len(words)], -1, 0)
    row_labels = lm.layers
    # A peak is that of a block, unless the embedding is all that was asked for.
    first = 1 if layer_of(picked[0]) < 0 and len(picked) > 1 else 0
    labels = tuple(row_labels[row] for row in picked)
    starts = np.cumsum([len(words), *map(len, nulls)])
    null_peaks = [alignment[first:, :, a:b].max(0) for a, b in pairwise(starts)]
    peak = of_targets[:, first:].max(1)
    tokens = {int(i): token_text(lm.tokenizer, int(i)) for i in scores.top_id.unique()}
    leading = [] if words else _leading(scores, first)
    if leading:
        followed = lens_scores(states, readout, [[i] for i in leading], ranked=[[0]] * len(prompts)).log_alignment
    return LensReading(
        model=lm.key,
        layers=labels,
        site=site,
        prompts=tuple(prompts),
        fed=tuple(fed),
        top_token=tuple(tuple(tokens[i] for i in row) for row in scores.top_id.tolist()),
        top_probability=scores.top_prob.double().numpy(),
        targets=tuple(word.word for word in words),
        forms=tuple(tuple(word.forms) for word in words),
        alignment=of_targets,
        rank=np.moveaxis(scores.rank[..., : len(words)].numpy(), -1, 0),
        peak_layer=tuple(tuple(labels[first + int(i)] for i in row) for row in of_targets[:, first:].argmax(1)),
        peak_alignment=peak,
        null_words=tuple(map(len, nulls)),
        p=tuple(
            tuple(permutation_p(values, null).tolist()) if null.shape[-1] else (None,) * len(prompts)
            for values, null in zip(peak, null_peaks, strict=True)
        ),
        followed=tuple(tokens[i] for i in leading),
        followed_probability=np.moveaxis(followed.double().exp().numpy(), -1, 0) if leading else None,
    )


def _leading(scores: LensScores, first: int) -> list[int]:
    """Tokens that are the most probable ones anywhere from a row on, those with the highest probability first."""
    best: dict[int, float] = {}
    ids, shares = scores.top_id[first:].flatten().tolist(), scores.top_prob[first:].flatten().tolist()
    for token, share in zip(ids, shares, strict=True):
        best[token] = max(share, best.get(token, 0.0))
    return sorted(best, key=lambda token: (-best[token], token))[:FOLLOWED]


def target_tokens(word: str, lm: LanguageModel, pieces: str = "refuse") -> tuple[WordTokens, list[list[int]]]:
    """The single-token forms of a word; of one that has none what ``pieces`` chooses.

    Returns:
        The word, and the token ids of each of its forms if their chains are to be followed, else none of them.

    Raises:
        InputError: It has no single-token form and ``pieces`` is ``refuse``; the message shows its pieces.
    """
    tokens = known_word(word, lm)
    if tokens.forms:
        return tokens, []
    if pieces not in PIECES:
        raise InputError(f"pieces {pieces!r}: unknown; choose one of {', '.join(PIECES)}")
    names = next(iter(tokens.multi_piece.values()), [])
    if pieces == "refuse" or not names:
        shown = " + ".join(map(repr, names[:8])) or "unknown to it"
        raise InputError(
            f"target word {word!r}: no single token of {lm.key} in any form ({shown}); "
            "choose another, or follow its first piece or the chain of its pieces (pieces)"
        )
    if pieces == "first":
        return replace(tokens, word=f"{word} (strict)", forms={names[0]: tokens.strict_id}), []
    chains: Any = [lm.tokenizer.convert_tokens_to_ids(form) for form in tokens.multi_piece.values()]
    firsts = {" + ".join(form): chain[0] for form, chain in zip(tokens.multi_piece.values(), chains, strict=True)}
    return replace(tokens, word=f"{word} (chain)", forms=firsts), chains


def chained(
    lm: LanguageModel,
    fed: Sequence[Fed],
    chains: Sequence[Sequence[int]],
    rows: Sequence[int],
    readout: Readout,
    site: str,
) -> NDArray[np.float64]:
    """(rows, prompts): probability of a word of several tokens, summed over its forms.

    Of a form it is ``prod_k p(piece_k | prompt, pieces before k)``, each factor read by the lens at the same layer; the
    pieces before are given, not written.

    Args:
        lm: The model.
        fed: Prompts that are read at one token each.
        chains: Token ids of each form.
        rows: Of the residual stream.
        readout: Of the model.
        site: Where in a block.
    """
    texts = [
        replace(one, ids=(*one.ids[: at + 1], *chain[:-1]), read=tuple(range(at, at + len(chain))))
        for one in fed for chain in chains for at in one.read
    ]  # fmt: skip
    states = read_states(lm, texts, rows=rows, site=site, description=f"{lm.key}: words of several pieces")
    total = np.zeros((len(rows), len(fed)))
    parts = states.split([len(text.read) for text in texts], 1)
    for i, (part, chain) in enumerate(zip(parts, [*chains] * len(fed), strict=True)):
        log_p = torch.stack([readout.logits(row).double().log_softmax(-1).cpu() for row in part])
        of_pieces = log_p.gather(2, torch.tensor(chain).expand(len(rows), -1)[..., None])
        total[:, i // len(chains)] += of_pieces.sum((1, 2)).exp().numpy()
    return total


def _null_of(word: WordTokens, norms: Tensor, lm: LanguageModel, n: int, *, exclude: Sequence[str]) -> list[WordTokens]:
    try:
        return matched_words(word, norms, lm.tokenizer, n, exclude=exclude) if n else []
    except InputError:  # a sign, another script or a small vocabulary: there is nothing to compare with
        return []
