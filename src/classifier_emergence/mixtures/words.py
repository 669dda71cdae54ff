"""Router rows as words: the projection of ``projection`` with tokens spelt out, beside random rows."""

from collections.abc import Sequence
from typing import Any

from classifier_emergence.errors import InputError
from classifier_emergence.mixtures.projection import controlled, project_routers, random_routers, reported
from classifier_emergence.mixtures.routers import load_routers
from classifier_emergence.models.registry import ModelSource
from classifier_emergence.models.sources import checkpoint_of, tokenizer_of
from classifier_emergence.reading.vocabulary import token_text, word_tokens


def project_checkpoint(
    key: str,
    source: ModelSource,
    *,
    words: Sequence[str] = (),
    gains: bool = False,
    top: int = 10,
    seed: int = 0,
) -> dict[str, Any]:
    """Cosines of every router row of a checkpoint with the vocabulary; see ``projection.project_routers``.

    Args:
        key: The model's key, for messages.
        source: Where it is, as ``names.resolve`` gives it: in the Hugging Face layout (or OpenAI's of GPT-OSS) with its
            tokenizer. Of a repository of the hub only routers, norm gains, unembedding and tokenizer are downloaded.
        words: Words whose ranks are wanted.
        gains: Whether the gains of both norms are folded in, and what all experts of a layer share is taken out.
        top: How many tokens to keep for each expert.
        seed: Of the random rows that give the null.

    Returns:
        ``experts``: for each its ``layer``, ``expert``, ``top_tokens``, ``top_scores`` and largest ``z`` (standard
        deviations above the mean over the vocabulary). ``words``: for each the best rank over all experts, and over as
        many random rows. ``largest`` and, under ``null``, the largest cosine of random rows of the same covariance.
        ``bytes_read`` of ``total_bytes`` of weights.

    Raises:
        InputError: See ``routers.load_routers``; or there is no tokenizer, or a word is no single token of it.
    """
    weights = load_routers(checkpoint_of(key, source))
    tokenizer = tokenizer_of(weights.checkpoint, source)
    ids = []
    for word in words:
        if not (forms := word_tokens(word, tokenizer).ids):
            raise InputError(f"word {word!r}: no single token of this vocabulary in any form; choose another")
        ids.append(forms)
    directions = controlled if gains else reported
    chance = random_routers(weights, weights.weight.shape[1], seed=seed)
    (seen, null), _ = project_routers(weights, [directions(weights), directions(chance)], top=top, words=ids)
    z = seen.z
    experts = [
        {
            "layer": layer,
            "expert": expert,
            "top_tokens": [token_text(tokenizer, int(t)) for t in seen.top_ids[i, expert]],
            "top_scores": seen.top_scores[i, expert].tolist(),
            "z": float(z[i, expert]),
        }
        for i, layer in enumerate(weights.layers)
        for expert in range(weights.weight.shape[1])
    ]
    found_words = []
    for k, word in enumerate(words):
        i, expert = divmod(int(seen.rank[..., k].argmin()), weights.weight.shape[1])
        found_words.append(
            {
                "word": word,
                "best_rank": int(seen.rank[i, expert, k]),
                "layer": weights.layers[i],
                "expert": expert,
                "null_best_rank": int(null.rank[..., k].min()),
            }
        )
    return {
        "gains": gains,
        "seed": seed,
        "vocabulary": weights.vocabulary,
        "experts": experts,
        "words": found_words,
        "largest": float(seen.top_scores.max()),
        "null": {"largest": float(null.top_scores.max())},
        "bytes_read": weights.bytes_read,
        "total_bytes": weights.total_bytes,
    }
