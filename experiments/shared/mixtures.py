"""What the stage of mixtures reads: router rows against the vocabulary, and routing on texts of five domains."""

from collections import Counter
from collections.abc import Sequence
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
from classifier_emergence.mixtures.routing import context_dependence, information, trace, usage
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import WordTokens, token_text, word_tokens
from classifier_emergence.statistics import expected_max_cosine, permutation_p
from classifier_emergence.tasks.arithmetic import N_TEMPLATES, OPERATIONS, STYLES
from classifier_emergence.tasks.problems import Problem, sample
from experiments.params import MoeRouters, Params
from experiments.shared.lens import TRUTH_WORDS
from experiments.shared.study import ProblemStudy
from experiments.shared.summaries import accuracy_curve

DOMAINS = (*OPERATIONS, "text")
REREAD_BATCH_TOKENS = 256  # tokens a batch when texts are read again: other batches, other rounding
READ = ("symbol", "word")
"""Styles in which lens and probes read the operation."""


# --- Rows of routers against the vocabulary ---


def projection(weights: RouterWeights, tokenizer: PreTrainedTokenizerBase, settings: MoeRouters) -> dict[str, Any]:
    """Both protocols and every null, from one pass over the unembedding."""
    targets = [word_tokens(word, tokenizer) for word in (*OPERATIONS, *TRUTH_WORDS)]
    words = [word for word in targets if word.ids]
    pool = token_pool(weights.vocabulary)
    null = random_routers(weights, settings.null_experts, seed=settings.seed)
    projections, tokens = project_routers(
        weights,
        [reported(weights), controlled(weights), reported(null), controlled(null)],
        top=settings.top,
        words=[word.ids for word in words],
        keep=pool,
        description="router rows against the vocabulary",
    )
    plain, folded, plain_null, folded_null = projections

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


# --- Problems with answers in every style, and text ---


class MixtureStudy(ProblemStudy):
    """A model, and texts of every domain, split by operand pairs or, of what is no problem, by text.

    Attributes:
        train: Domain -> token ids of texts to train on.
        test: Domain -> token ids of held-out texts.
    """

    def __init__(self, lm: LanguageModel, params: Params, texts: Sequence[str]) -> None:
        self.settings = settings = params.moe_routers
        super().__init__(lm, params, settings, depth=settings.depth, seed=settings.seed)
        drawn = sample(self.problems.train, len(OPERATIONS) * settings.samples, seed=settings.seed)
        kept = max(len(texts) - settings.test_texts, 0)
        self.train = {**self._solved(drawn), "text": [self._ids(text) for text in texts[:kept]]}
        self.test = {**self._solved(self.problems.test), "text": [self._ids(text) for text in texts[kept:]]}

    def prompts(self, style: str = "symbol") -> list[str]:
        """The test problems in a style, the four operations in turn in each template."""
        return [p.prompt(style, i // len(OPERATIONS)) for i, p in enumerate(self.problems.test)]

    def _solved(self, problems: Sequence[Problem]) -> dict[str, list[list[int]]]:
        """By operation, in every style and template in turn, with answers."""
        n = len(STYLES)
        by_operation = {op: [problem for problem in problems if problem.operation == op] for op in OPERATIONS}
        return {
            op: [
                self._ids(f"{p.prompt(STYLES[i % n], i // n % N_TEMPLATES)} {p.answer}")
                for i, p in enumerate(by_operation[op])
            ]
            for op in OPERATIONS
        }

    def _ids(self, text: str) -> list[int]:
        end = self.lm.tokenizer.eos_token_id
        ids: list[int] = self.lm.tokenizer(text)["input_ids"]
        return ids if end is None else [*ids, int(end)]


# --- Routing in use ---


def in_use(study: MixtureStudy, lm: LanguageModel, experts: Sequence[str] = ()) -> dict[str, Any]:
    """Load, what experts share with operation, domain and token, and context dependence.

    Args:
        study: Its held-out texts are read.
        lm: A mixture of experts.
        experts: The domain that each expert was trained on, if known.
    """
    settings = study.settings
    texts = [ids for domain in DOMAINS for ids in study.test[domain]]
    domain = np.repeat(np.arange(len(DOMAINS)), [len(study.test[name]) for name in DOMAINS])
    routing = trace(lm, texts)
    shares, of_token = routing.shares(), domain[routing.text.numpy()]
    told = {"shuffles": settings.shuffles, "seed": settings.seed}
    context = context_dependence(
        routing,
        trace(lm, texts, batch_tokens=REREAD_BATCH_TOKENS),
        pairs_per_token=settings.pairs_per_token,
        confidence=study.params.confidence,
        resamples=settings.resamples,
        seed=settings.seed,
    )
    return {
        "layers": [f"L{layer}" for layer in routing.layers],
        "n_tokens": shares.shape[1],
        "usage": usage(routing),
        "by_domain": [shares[:, of_token == d].mean(1) for d in range(len(DOMAINS))],  # (domains, layers, experts)
        "domain": information(shares, of_token, groups=routing.text.numpy(), **told),
        "token": information(shares, routing.token.numpy(), **told),
        "context": context,
        "prompts": {style: _at_prompts(study, lm, style, experts) for style in READ},
    }


def _at_prompts(study: MixtureStudy, lm: LanguageModel, style: str, experts: Sequence[str]) -> dict[str, Any]:
    """What routing at a prompt's last token shares with its operation.

    With known experts also how often it goes first to that of the operation, and the share that this one gets.
    """
    settings = study.settings
    routing = trace(lm, [lm.tokenizer(prompt)["input_ids"] for prompt in study.prompts(style)])
    at_end = routing.shares()[:, routing.last]
    operation = information(at_end, study.own, shuffles=settings.shuffles, seed=settings.seed)
    if not experts:
        return {"operation": operation}
    own = torch.tensor([experts.index(OPERATIONS[operation]) for operation in study.own])
    return {
        "operation": operation,
        "first_choice": accuracy_curve(routing.experts[:, routing.last, 0] == own, study.params.confidence),
        "own_share": at_end.gather(-1, own.expand(len(at_end), -1)[..., None])[..., 0].mean(-1),
        "chance": 1 / len(experts),
    }
