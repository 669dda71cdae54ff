"""Rows of routers, and what experts write, against the vocabulary: which words, and how well they could be found."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from classifier_emergence.mixtures.nulls import (
    Verdict,
    WordEvidence,
    category,
    coherence,
    false_discovery,
    found_if_planted,
    judge_coherence,
    judge_maxima,
    judge_words,
    maxima_p,
    token_pool,
    word_p,
)
from classifier_emergence.mixtures.projection import (
    Directions,
    RouterProjection,
    TokenRows,
    controlled,
    planted,
    project_routers,
    random_routers,
    random_rows,
    reported,
    token_directions,
)
from classifier_emergence.mixtures.routers import RouterWeights
from classifier_emergence.reading.vocabulary import WordTokens, token_text, word_tokens
from classifier_emergence.tasks.arithmetic import OPERATIONS
from experiments.params import MoeRouters, Params
from experiments.shared.lens import TRUTH_WORDS
from experiments.shared.summaries import accuracy_curve, share_of


def projection(
    weights: RouterWeights,
    tokenizer: PreTrainedTokenizerBase,
    params: Params,
    written: Tensor | None = None,
    experts: Sequence[str] = (),
) -> dict[str, Any]:
    """Both protocols, every null and the power of the tests, from one pass over the unembedding.

    Args:
        weights: Rows of routers, and the unembedding.
        tokenizer: Of the vocabulary.
        params: For this stage.
        written: (layers, experts, d) what experts write on average, if it is known.
        experts: The domain that each expert was trained on, if known.
    """
    settings = params.moe_routers
    targets = [word_tokens(word, tokenizer) for word in (*OPERATIONS, *TRUTH_WORDS)]
    words = [word for word in targets if word.ids]
    layers = [f"L{layer}" for layer in weights.layers]
    vocabulary = Vocabulary(tokenizer, words, token_pool(weights.vocabulary), weights.vocabulary, layers, params)
    rows, null = controlled(weights), random_routers(weights, settings.null_experts, seed=settings.seed)
    at, word = planted_in(rows, words, settings)
    planting = planted(rows.rows.flatten(0, 1)[at], token_directions(weights, _said(words, word)), settings.planted)
    sets = [reported(weights), reported(null), planting, rows, controlled(null)]
    if written is not None:
        sets.append(Directions(written - written.mean(1, keepdim=True), gains=True))
        sets.append(Directions(random_rows(written, settings.null_experts, seed=settings.seed), gains=True))
    projections, kept = project_routers(
        weights, sets, top=settings.top, words=vocabulary.ids, keep=vocabulary.pool,
        description="router rows against the vocabulary",
    )  # fmt: skip
    plain, plain_null, seen, *folded = projections
    texts, shape = vocabulary.texts(plain), plain.rank.shape[:2]
    categories = [category(list(row)) for row in texts.reshape(-1, texts.shape[-1])]
    maxima = judge_maxima(plain.top_scores[..., 0].numpy(), plain_null.top_scores[..., 0].numpy())
    said = vocabulary.judge(rows, folded[:2], kept)
    result = {
        "layers": layers,
        "experts": shape[1],
        "vocabulary": weights.vocabulary,
        "reported": {
            **vars(maxima),
            "found": vocabulary.found(maxima.q),
            "largest": maxima.value.max(),
            "z": plain.z,
            "categories": dict(Counter(categories)),
            "null_categories": dict(
                Counter(category(list(row)) for row in vocabulary.texts(plain_null).reshape(-1, texts.shape[-1]))
            ),
            "category": np.reshape(categories, shape),
            "top_tokens": texts,
            "top_scores": plain.top_scores,
        },
        "power": power(seen, folded[:2], vocabulary, at, word),
        **said,
        "words_without_token": [each.word for each in targets if not each.ids],
    }
    if written is not None:
        result["written"] = vocabulary.judge(sets[-2], folded[2:], kept, own=experts)
    return result


@dataclass(frozen=True)
class Vocabulary:
    """What directions are compared with: its words are looked up for each, its pool is drawn from."""

    tokenizer: PreTrainedTokenizerBase
    words: Sequence[WordTokens]
    pool: Sequence[int]
    size: int
    layers: Sequence[str]
    """Labels of those that the directions are from."""
    params: Params

    @property
    def settings(self) -> MoeRouters:
        """Of the stage."""
        return self.params.moe_routers

    @property
    def ids(self) -> list[list[int]]:
        """Of every word."""
        return [word.ids for word in self.words]

    def found(self, q: np.ndarray) -> int:
        """How many stand out at the false discovery rate."""
        return int((q <= self.settings.discovery_rate).sum())

    def stated(self, verdict: Verdict) -> dict[str, Any]:
        """A verdict with how many, and what share, of the experts stand out; layers are the clusters."""
        hits = verdict.q <= self.settings.discovery_rate
        layer = np.repeat(np.arange(len(hits)), hits.shape[1])
        share = share_of(hits.ravel(), self.params.confidence, clusters=layer)
        return {**vars(verdict), "found": int(hits.sum()), "share": share}

    def texts(self, projection: RouterProjection) -> np.ndarray:
        """(..., k) top tokens as text."""
        ids = projection.top_ids
        return np.array([token_text(self.tokenizer, int(i)) for i in ids.flatten()], dtype=object).reshape(ids.shape)

    def judge(
        self,
        directions: Directions,
        folded: Sequence[RouterProjection],
        kept: TokenRows,
        own: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Controlled directions (layers, experts) against random ones: their top token, their top tokens, and words.

        ``folded`` are the projections of both. ``own`` names the word that each expert might have for its own; of those
        that are operations it is looked up.
        """
        seen, null = folded
        z = judge_maxima(seen.z.numpy(), null.z.numpy())
        alike = judge_coherence(*(coherence(kept.of(each.top_ids)).double().numpy() for each in (seen, null)))
        evidence = judge_words(
            seen, directions, self.ids, kept, self.pool,
            vocabulary=self.size, draws=self.settings.draws, seed=self.settings.seed,
        )  # fmt: skip
        largest = judge_maxima(*(each.top_scores[..., 0].numpy() for each in (seen, null)))
        result: dict[str, Any] = {
            "controlled": {**self.stated(z), "top_tokens": self.texts(seen), "top_scores": seen.top_scores},
            "largest": self.stated(largest),
            "coherence": {**vars(alike), "found": self.found(alike.q)},
            "words": [word_row(word, at, evidence, self.layers) for at, word in enumerate(self.words)],
        }
        names = [word.word for word in self.words]
        if pairs := [(e, names.index(word)) for e, word in enumerate(own) if word in names]:
            e, w = zip(*pairs, strict=True)
            result["own_words"] = {"rank": evidence.rank[:, e, w], "q": false_discovery(evidence.p[:, e, w])}
        return result


def planted_in(rows: Directions, words: Sequence[WordTokens], settings: MoeRouters) -> tuple[list[int], list[int]]:
    """In which expert's row which word is planted: pairs of both, drawn without replacement."""
    experts = rows.rows.flatten(0, 1).shape[0]
    drawn = np.random.default_rng(settings.seed).permutation(experts * len(words))[: settings.planted_rows]
    return (drawn // len(words)).tolist(), (drawn % len(words)).tolist()


def _said(words: Sequence[WordTokens], chosen: Sequence[int]) -> list[int]:
    """The token of each chosen word: with a leading space, if that is one."""
    return [words[w].forms.get(f" {words[w].word}", words[w].ids[0]) for w in chosen]


def power(
    seen: RouterProjection,
    folded: Sequence[RouterProjection],
    vocabulary: Vocabulary,
    at: Sequence[int],
    word: Sequence[int],
) -> dict[str, Any]:
    """How often the controlled tests find a word that is planted in one row, by its cosine with it.

    ``found``: the row stands out for the planted word, by its z-score among all rows; ``largest_found``: by its largest
    cosine. ``word_found``: the word stands out, by its rank among all rows and words. The null is that of the rows as
    they are. Intervals hold rows as clusters.

    Args:
        seen: Projection of the planted rows, (cosines, n).
        folded: Projections of the rows and of the random ones.
        vocabulary: With the words.
        at: (n,) rows.
        word: (n,) words.
    """
    whole, null = folded
    rate, confidence, n = vocabulary.settings.discovery_rate, vocabulary.params.confidence, len(at)
    layer = np.array(at) // whole.rank.shape[1]
    top = seen.rank[:, range(n), word].numpy() == 1

    def stands_out(of: Callable[[RouterProjection], Tensor]) -> dict[str, Any]:
        p, planted_p = (
            maxima_p(of(whole).numpy(), of(null).numpy()), maxima_p(of(seen).T.numpy(), of(null)[layer].numpy()).T
        )  # fmt: skip
        found = found_if_planted(p.reshape(-1, 1), planted_p[..., None], at, [0] * n, rate)
        return accuracy_curve(top & found, confidence, clusters=at)

    p, planted_p = (word_p(each, vocabulary.ids, vocabulary.size) for each in (whole, seen))
    word_found = found_if_planted(p.reshape(-1, len(vocabulary.words)), planted_p, at, word, rate)
    return {
        "cosine": list(vocabulary.settings.planted),
        "found": stands_out(lambda each: each.z),
        "largest_found": stands_out(lambda each: each.top_scores[..., 0]),
        "word_found": accuracy_curve(word_found, confidence, clusters=at),
    }


def word_row(word: WordTokens, at: int, evidence: WordEvidence, layers: Sequence[str]) -> dict[str, Any]:
    """The expert that fits a word best, and by how much."""
    rank = evidence.rank[..., at]
    layer, expert = np.unravel_index(rank.argmin(), rank.shape)
    return {
        "word": word.word,
        "forms": list(word.forms),
        "layer": layers[int(layer)],
        "expert": int(expert),
        "rank": int(rank.min()),
        **{
            name: float(getattr(evidence, name)[layer, expert, at])
            for name in ("cosine", "p", "q", "p_equal_frequency")
        },
    }
