"""What the stage of mixtures reads: router rows against the vocabulary, and routing on texts of five domains."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from classifier_emergence.mixtures.nulls import (
    WordEvidence,
    category,
    coherence,
    equal_frequency_coherence,
    judge_coherence,
    judge_maxima,
    judge_words,
    token_pool,
)
from classifier_emergence.mixtures.projection import controlled, project_routers, random_routers, reported
from classifier_emergence.mixtures.routers import RouterWeights
from classifier_emergence.mixtures.routing import Routing, context_dependence, information, trace, usage
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import WordTokens, token_text, word_tokens
from classifier_emergence.statistics import expected_max_cosine, permutation_p
from classifier_emergence.tasks.arithmetic import N_TEMPLATES, OPERATIONS, STYLES
from classifier_emergence.tasks.problems import Problem, sample, split
from experiments.params import MoeRouters, Params
from experiments.shared.stage import accuracy_curve

TRUTH = (
    "correct", "incorrect", "right", "wrong", "true", "false", "yes", "no", "valid", "invalid", "good", "bad", "ok",
    "error",
)  # fmt: skip
"""The originals' words for true and false."""
DOMAINS = (*OPERATIONS, "text")
REREAD_BATCH_TOKENS = 256  # tokens a batch when texts are read again: other batches, other rounding
READ = ("symbol", "word")
"""Styles in which lens and probes read the operation."""


# --- Rows of routers against the vocabulary ---


def projection(weights: RouterWeights, tokenizer: PreTrainedTokenizerBase, settings: MoeRouters) -> dict[str, Any]:
    """Both protocols and every null, from one pass over the unembedding."""
    targets = [word_tokens(word, tokenizer) for word in (*OPERATIONS, *TRUTH)]
    words = [word for word in targets if word.ids]
    pool = token_pool(weights.vocabulary)
    null = random_routers(weights, settings.null_experts, seed=settings.seed)
    found, tokens = project_routers(
        weights,
        [reported(weights), controlled(weights), reported(null), controlled(null)],
        top=settings.top,
        words=[word.ids for word in words],
        keep=pool,
        description="router rows against the vocabulary",
    )
    plain, folded, plain_null, folded_null = found

    def texts(ids: torch.Tensor) -> list[list[str]]:
        return [[token_text(tokenizer, int(i)) for i in row] for row in ids.flatten(0, -2)]

    top_texts = texts(plain.top_ids)
    shape = plain.top_ids.shape[:2]
    categories = [category(row) for row in top_texts]
    maxima = judge_maxima(plain.top_scores[..., 0].numpy(), plain_null.top_scores[..., 0].numpy())
    z = judge_maxima(folded.z.numpy(), folded_null.z.numpy())
    together = [coherence(tokens.of(each.top_ids, centred=True)).double().numpy() for each in (folded, folded_null)]
    coherent = judge_coherence(*together)
    frequent = equal_frequency_coherence(folded.top_ids, tokens, pool, settings.draws, seed=settings.seed)
    evidence = judge_words(
        folded, controlled(weights), [word.ids for word in words], tokens, pool,
        vocabulary=weights.vocabulary, draws=settings.draws, seed=settings.seed,
    )  # fmt: skip

    def found_at(q: np.ndarray) -> int:
        return int((q <= settings.discovery_rate).sum())

    return {
        "layers": [f"L{layer}" for layer in weights.layers],
        "experts": shape[1],
        "vocabulary": weights.vocabulary,
        "expected_max_cosine": expected_max_cosine(weights.vocabulary, weights.final_gain.shape[0]),
        "reported": {
            **vars(maxima),
            "found": found_at(maxima.q),
            "largest": maxima.value.max(),
            "z": plain.z,
            "categories": dict(Counter(categories)),
            "null_categories": dict(Counter(category(row) for row in texts(plain_null.top_ids))),
            "category": [categories[i : i + shape[1]] for i in range(0, len(categories), shape[1])],
            "top_tokens": np.array(top_texts, dtype=object).reshape(*shape, -1),
            "top_scores": plain.top_scores,
        },
        "controlled": {
            **vars(z),
            "found": found_at(z.q),
            "cosine": folded.top_scores[..., 0],
            "null_cosine_95": torch.quantile(folded_null.top_scores[..., 0], 0.95, dim=-1),
            "top_tokens": np.array(texts(folded.top_ids), dtype=object).reshape(*shape, -1),
            "top_scores": folded.top_scores,
        },
        "coherence": {
            **vars(coherent),
            "found": found_at(coherent.q),
            "equal_frequency_mean": frequent.mean(),
            "equal_frequency_p": permutation_p(together[0], np.moveaxis(frequent.double().numpy(), 0, -1)),
        },
        "words": [word_row(word, at, evidence, weights.layers) for at, word in enumerate(words)],
        "words_found": found_at(evidence.q),
        "words_without_token": [word.word for word in targets if not word.ids],
    }


def word_row(word: WordTokens, at: int, evidence: WordEvidence, layers: Sequence[int]) -> dict[str, Any]:
    """The expert that fits a word best, and by how much."""
    rank = evidence.rank[..., at]
    layer, expert = np.unravel_index(rank.argmin(), rank.shape)
    return {
        "word": word.word,
        "forms": list(word.forms),
        "layer": f"L{layers[int(layer)]}",
        "expert": int(expert),
        "rank": int(rank.min()),
        **{
            name: float(getattr(evidence, name)[layer, expert, at])
            for name in ("cosine", "p", "q", "p_equal_frequency")
        },
    }


# --- Data: problems with answers in every style, and text ---


@dataclass
class Data:
    """Texts of every domain, split by operand pairs, or by text."""

    tokenizer: PreTrainedTokenizerBase
    settings: MoeRouters
    text: list[str]
    train: dict[str, list[list[int]]] = field(init=False)
    test: dict[str, list[list[int]]] = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        tested = dict.fromkeys(OPERATIONS, settings.test_problems)
        self.problems = split(settings.operands, tested, seed=settings.seed)
        self.own = [OPERATIONS.index(problem.operation) for problem in self.problems.test]
        drawn = sample(self.problems.train, len(OPERATIONS) * settings.samples, seed=settings.seed)
        kept = max(len(self.text) - settings.test_texts, 0)
        self.train = {op: self._texts([p for p in drawn if p.operation == op]) for op in OPERATIONS}
        self.train["text"] = [self._ids(text) for text in self.text[:kept]]
        self.test = {op: self._texts([p for p in self.problems.test if p.operation == op]) for op in OPERATIONS}
        self.test["text"] = [self._ids(text) for text in self.text[kept:]]

    def prompts(self, style: str) -> list[str]:
        """The test problems in a style, the four operations in turn in each template."""
        return [p.prompt(style, i // len(OPERATIONS)) for i, p in enumerate(self.problems.test)]

    def _texts(self, problems: Sequence[Problem]) -> list[list[int]]:
        n = len(STYLES)
        return [
            self._ids(f"{p.prompt(STYLES[i % n], i // n % N_TEMPLATES)} {p.answer}") for i, p in enumerate(problems)
        ]

    def _ids(self, text: str) -> list[int]:
        end = self.tokenizer.eos_token_id
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids if end is None else [*ids, int(end)]


# --- Routing in use ---


def in_use(lm: LanguageModel, data: Data, params: Params, experts: Sequence[str] = ()) -> dict[str, Any]:
    """Load, what experts share with operation, domain and token, and context dependence.

    Args:
        lm: A mixture of experts.
        data: Its test part is read.
        params: For shuffles, intervals and seeds.
        experts: The domain that each expert was trained on, if known.
    """
    settings = params.moe_routers
    texts = [ids for domain in DOMAINS for ids in data.test[domain]]
    domain = np.repeat(np.arange(len(DOMAINS)), [len(data.test[name]) for name in DOMAINS])
    everything = trace(lm, texts)
    shares, of_token = everything.shares(), domain[everything.text.numpy()]
    told = {"shuffles": settings.shuffles, "seed": settings.seed}
    context = context_dependence(
        everything,
        trace(lm, texts, batch_tokens=REREAD_BATCH_TOKENS),
        pairs_per_token=settings.pairs_per_token,
        confidence=params.confidence,
        resamples=settings.resamples,
        seed=settings.seed,
    )
    result: dict[str, Any] = {
        "layers": [f"L{layer}" for layer in everything.layers],
        "n_tokens": shares.shape[1],
        "usage": usage(everything),
        "by_domain": [shares[:, of_token == d].mean(1) for d in range(len(DOMAINS))],  # (domains, layers, experts)
        "domain": information(shares, of_token, groups=everything.text.numpy(), **told),
        "token": information(shares, everything.token.numpy(), **told),
        "context": context,
        "prompts": {},
    }
    for style in READ:
        routing = trace(lm, [data.tokenizer(prompt)["input_ids"] for prompt in data.prompts(style)])
        at_end = routing.shares()[:, routing.last]
        result["prompts"][style] = {"operation": information(at_end, data.own, **told)}
        if experts:
            result["prompts"][style] |= own_expert(routing, at_end, data, params, experts)
    return result


def own_expert(
    routing: Routing, at_end: torch.Tensor, data: Data, params: Params, experts: Sequence[str]
) -> dict[str, Any]:
    """How often a prompt's last token goes first to the expert of its operation, and the share that this one gets."""
    own = torch.tensor([experts.index(OPERATIONS[operation]) for operation in data.own])
    first = routing.experts[:, routing.last, 0]
    return {
        "first_choice": accuracy_curve(first == own, params.confidence),
        "own_share": at_end.gather(-1, own.expand(len(at_end), -1)[..., None])[..., 0].mean(-1),
        "chance": 1 / len(experts),
    }
