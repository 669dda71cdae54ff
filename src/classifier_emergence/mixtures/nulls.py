"""What experts' router rows say in the vocabulary, against chance: maxima, coherence, words, categories.

Any direction has a token that it fits best and a list of top tokens that the eye finds a topic in. Three nulls tell
what that is worth:

* *Random directions* (``projection.random_rows``), through the same gains and the same vocabulary: the null
  of a largest score and of the coherence of top tokens. Tokens of one topic have similar rows, so the top tokens of a
  random direction are similar, too.
* *Permuted tokens*: giving every row of the unembedding to another token changes no score's size, only whose it is.
  It is no null of a maximum, but the exact one, in closed form, of the rank that a given word has.
* *Equal frequency*: the same among tokens about as frequent as the word, or as the tokens at the top. Its proxy is the
  token's number: byte-pair encoding numbers tokens in the order of its merges, the most frequent first. Norms of
  unembedding rows are another proxy, but training shapes them, and they are part of what is being tested.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control, gumbel_r
from torch import Tensor
from torch.nn.functional import normalize

from classifier_emergence.errors import InputError
from classifier_emergence.mixtures.projection import Directions, RouterProjection, TokenRows
from classifier_emergence.statistics import Floats, permutation_p

Booleans = NDArray[np.bool_]
POOL = 4096
"""Tokens that equal-frequency draws are made from."""
NEAREST = 64
"""How many of the pool, nearest in number, count as equally frequent."""


@dataclass(frozen=True)
class Verdict:
    """Statistics of experts with what chance says of them; arrays (layers, experts) unless said otherwise."""

    value: Floats
    p: Floats
    """One-sided."""
    q: Floats
    """Benjamini-Hochberg: the false discovery rate at which an expert is just found, over all experts and layers."""
    null_mean: float
    null_95: float
    null_largest: float
    null_n: int


def maxima_p(observed: ArrayLike, null: ArrayLike) -> Floats:
    """(layers, ...) probability of largest scores (layers, ...) as high as observed, by those of random directions.

    It is the tail of the Gumbel distribution fitted to the null of each layer: the limit of a maximum of many scores,
    which goes further than the ``1 / (1 + N)`` that N random directions can show, as hundreds of experts need.

    Args:
        observed: (layers, ...).
        null: (layers, N) the same statistic of each layer's random directions.

    Raises:
        InputError: Fewer than 20 random directions, too few for a fit.

    Source: Gumbel (1958), Statistics of extremes.
    """
    chance = np.asarray(null, dtype=np.float64)
    if chance.shape[1] < 20:
        raise InputError(f"null: {chance.shape[1]} random directions a layer; pass at least 20")
    pairs = zip(np.asarray(observed, dtype=np.float64), chance, strict=True)
    return np.stack([gumbel_r.sf(values, *gumbel_r.fit(others)) for values, others in pairs])


def judge_maxima(observed: ArrayLike, null: ArrayLike) -> Verdict:
    """Largest scores (or their z-scores) of experts (layers, experts) against those of random directions (layers, N).

    Source: ``maxima_p``; Benjamini and Hochberg (1995), JRSS B 57.
    """
    return _verdict(observed, null, maxima_p(observed, null))


def judge_coherence(observed: ArrayLike, null: ArrayLike) -> Verdict:
    """Coherence of experts' top tokens against that of random directions' top tokens; p-values by counting.

    Args:
        observed: (layers, experts).
        null: (layers, N), counted together: in one layer they are too few for a small p.
    """
    return _verdict(observed, null, permutation_p(observed, np.ravel(null)))


def _verdict(observed: ArrayLike, null: ArrayLike, p: Floats) -> Verdict:
    value, chance = np.asarray(observed, dtype=np.float64), np.asarray(null, dtype=np.float64)
    return Verdict(
        value=value,
        p=p,
        q=false_discovery(p),
        null_mean=float(chance.mean()),
        null_95=float(np.quantile(chance, 0.95)),
        null_largest=float(chance.max()),
        null_n=chance.size,
    )


def false_discovery(p: ArrayLike) -> Floats:
    """Benjamini-Hochberg adjusted p-values over all entries, in the shape of ``p``."""
    array = np.asarray(p, dtype=np.float64)
    return np.asarray(false_discovery_control(array.ravel(), method="bh")).reshape(array.shape)


def found_if_planted(p: Floats, planted: Floats, experts: Sequence[int], words: Sequence[int], rate: float) -> Booleans:
    """(cosines, n): would a planted row be found among the others, each in the place of one expert's?

    Args:
        p: (experts, words) p-values of the rows as they are; one column where no word is asked for.
        planted: (cosines, n, words) those of the planted rows.
        experts: (n,) whose row each replaces.
        words: (n,) the column that must be found.
        rate: False discovery rate over all entries.
    """
    found = np.zeros(planted.shape[:2], dtype=bool)
    for c, i in np.ndindex(found.shape):
        replaced = p.copy()
        replaced[experts[i]] = planted[c, i]
        found[c, i] = false_discovery(replaced)[experts[i], words[i]] <= rate
    return found


def coherence(rows: Tensor) -> Tensor:
    """Mean cosine of all pairs among (..., k, d) unit rows; (...). 1 if all point one way, about 0 if unrelated.

    Given the directions of tokens it measures what topic coherence measures on word vectors.

    Raises:
        InputError: There are fewer than two rows.

    Source: Ding, Nallapati and Xiang (2018), Coherence-aware neural topic modeling, arXiv:1809.02687.
    """
    k = rows.shape[-2]
    if k < 2:
        raise InputError(f"rows: {k} of them; coherence is one of pairs, keep at least 2 top tokens")
    mean: Tensor = (rows.sum(-2).square().sum(-1) - rows.square().sum((-2, -1))) / (k * (k - 1))
    return mean


def token_pool(vocabulary: int, n: int = POOL) -> list[int]:
    """About ``n`` token numbers, ascending: half evenly spread, half evenly in their logarithm.

    The second half is dense where tokens are frequent, and neighbours differ in frequency.
    """
    even = np.linspace(0, vocabulary - 1, n // 2)
    by_order = np.exp(np.linspace(0, np.log(vocabulary), n // 2)) - 1
    return sorted({int(i) for i in np.concatenate([even, by_order])})


def equal_frequency(ids: Tensor, pool: Tensor, draws: int, *, seed: int) -> Tensor:
    """(draws, ...) positions in ``pool`` of random tokens, each about as frequent as the token (...) that it replaces.

    Uniform among the ``NEAREST`` of the pool around the token's number, half of them on each side and itself left out;
    of a small pool among half of it.

    Args:
        ids: (...) token numbers.
        pool: (P,) ascending token numbers.
        draws: How often.
        seed: Of the choice.

    Raises:
        InputError: The pool has fewer than four tokens.
    """
    window = min(NEAREST, len(pool) // 2)
    if window < 2:
        raise InputError(f"pool: {len(pool)} tokens are too few to draw from")
    at = torch.searchsorted(pool, ids)
    first = (at - window // 2).clamp(min=0, max=len(pool) - window - 1)
    generator = torch.Generator().manual_seed(seed)
    drawn = first + torch.randint(window, (draws, *ids.shape), generator=generator)
    # The last place of the window, else never drawn, stands in for the token itself.
    return torch.where(pool[drawn] == ids, first + window, drawn)


@dataclass(frozen=True)
class WordEvidence:
    """Words looked up for every expert; arrays (layers, experts, words)."""

    cosine: Floats
    rank: Floats
    p: Floats
    """Probability of such a rank or a better one if tokens were permuted."""
    q: Floats
    """Benjamini-Hochberg over all layers, experts and words."""
    p_equal_frequency: Floats
    """The same by counting among draws of as many equally frequent tokens."""


def judge_words(
    projection: RouterProjection,
    directions: Directions,
    words: Sequence[Sequence[int]],
    tokens: TokenRows,
    pool: Sequence[int],
    *,
    vocabulary: int,
    draws: int,
    seed: int,
) -> WordEvidence:
    """How well experts' rows fit given words, against chance.

    With m token ids a word's best rank is at most r by chance with ``1 - C(V - r, m) / C(V, m)``.

    Args:
        projection: Projection of ``directions`` with ``words``.
        directions: Controlled ones, (layers, experts, d).
        words: Token ids of each word.
        tokens: Of the same projection, with ``pool`` among its ``keep``.
        pool: From ``token_pool``.
        vocabulary: V.
        draws: Sets of equally frequent tokens for each word.
        seed: Of the draws.
    """
    rank = projection.rank.double().numpy()
    p = word_p(projection, words, vocabulary)
    numbers = torch.tensor(pool)
    scores = normalize(directions.rows.float(), dim=-1) @ tokens.of(numbers).T  # (layers, experts, pool)
    matched = []
    for w, ids in enumerate(words):
        at = equal_frequency(torch.tensor(ids), numbers, draws, seed=seed + w)
        matched.append(permutation_p(projection.score[..., w].numpy(), scores[..., at].amax(-1).numpy()))
    return WordEvidence(projection.score.double().numpy(), rank, p, false_discovery(p), np.stack(matched, axis=-1))


def word_p(projection: RouterProjection, words: Sequence[Sequence[int]], vocabulary: int) -> Floats:
    """(..., words): ``rank_p`` of every word of a projection."""
    ranks = projection.rank.numpy()
    return np.stack([rank_p(ranks[..., w], len(ids), vocabulary) for w, ids in enumerate(words)], axis=-1)


def rank_p(rank: ArrayLike, tokens: int, vocabulary: int) -> Floats:
    """Probability that the best of ``tokens`` tokens, drawn at random, has this rank or a better one."""
    ranks = np.asarray(rank, dtype=np.float64)
    left = np.clip(
        vocabulary - np.arange(tokens)[:, None] - ranks.ravel(), 0, None
    )  # tokens below, one drawn after another
    with np.errstate(divide="ignore"):
        log_none = np.log(left / (vocabulary - np.arange(tokens)[:, None])).sum(0)
    return np.asarray(-np.expm1(log_none)).reshape(ranks.shape)


# --- Categories. The source names some and gives no rules; these are ours, applied in this order to a token's text
# without the white space around it. ---

MATH_SIGNS = frozenset("+-*/=<>^%×÷·−±√≤≥≠≈∑∏∫∞")
CODE_WORDS = frozenset((
    "async", "await", "bool", "const", "def", "elif", "elsif", "endif", "enum", "extends", "foreach", "func",
    "goto", "impl", "implements", "instanceof", "int", "isinstance", "lambda", "mut", "namespace", "nil",
    "noexcept", "null", "nullptr", "printf", "println", "pub", "sizeof", "std", "str", "struct", "switch",
    "throws", "typedef", "typename", "typeof", "uint", "undefined", "unsigned", "usize", "var", "void",
))  # fmt: skip
"""Keywords of C, C++, C#, Go, Java, JavaScript, Python, Ruby and Rust that are no everyday English words."""
_CODE_MARKS = frozenset("_(){}[];=<>/\\#@")


def token_class(text: str) -> str:
    r"""Class of a token by its text, of which the write-up names five.

    ``WHITESPACE`` nothing else; ``MATH`` decimal digits only, or signs of ``MATH_SIGNS`` only; ``PUNCTUATION`` no
    letter or digit; ``CODE`` a word of ``CODE_WORDS``, letters with one of ``_(){}[];=<>/\#@``, or a capital right
    after a small letter; ``SHORT_TOKENS`` at most two characters; ``GENERAL`` the rest.
    """
    word = text.strip()
    rules = (
        ("WHITESPACE", not word),
        ("MATH", word.isdecimal() or set(word) <= MATH_SIGNS),
        ("PUNCTUATION", not any(c.isalnum() for c in word)),
        ("CODE", word in CODE_WORDS or bool(set(word) & _CODE_MARKS) or _camel(word)),
        ("SHORT_TOKENS", len(word) <= 2),
    )
    return next((name for name, holds in rules if holds), "GENERAL")


def category(texts: Sequence[str]) -> str:
    """Category of an expert by the texts of its top tokens: that of more than half of them, else ``GENERAL``.

    Raises:
        InputError: There are no tokens.
    """
    if not texts:
        raise InputError("texts: no top tokens; keep at least 1")
    named = [token_class(text) for text in texts]
    most = max(sorted(set(named)), key=named.count)
    return most if 2 * named.count(most) > len(named) else "GENERAL"


def _camel(word: str) -> bool:
    return any(a.islower() and b.isupper() for a, b in pairwise(word))
