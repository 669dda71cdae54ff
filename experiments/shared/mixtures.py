"""What the stage of mixtures reads: rows of routers and outputs of experts in words, and routing on five domains."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from classifier_emergence.mixtures.nulls import (
    Verdict,
    WordEvidence,
    category,
    coherence,
    equal_frequency,
    false_discovery,
    found_if_planted,
    judge_coherence,
    judge_maxima,
    judge_words,
    maxima_p,
    token_pool,
    word_p,
)
from classifier_emergence.mixtures.paths import path_features, told_bits
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
from classifier_emergence.mixtures.routing import Routing, context_dependence, information, trace, usage
from classifier_emergence.mixtures.writing import written
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import WordTokens, token_text, word_tokens
from classifier_emergence.statistics import permutation_p
from classifier_emergence.tasks.arithmetic import N_TEMPLATES, OPERATIONS, STYLES
from classifier_emergence.tasks.problems import Problem, sample
from experiments.params import MoeRouters, Params
from experiments.shared.lens import TRUTH_WORDS, against_null, contrast, own_class
from experiments.shared.study import ProblemStudy
from experiments.shared.summaries import accuracy_curve, share_of

DOMAINS = (*OPERATIONS, "text")
REREAD_BATCH_TOKENS = 256  # tokens a batch when texts are read again: other batches, other rounding
READ = ("symbol", "word")
"""Styles in which lens and probes read the operation."""


# --- Rows of routers, and what experts write, against the vocabulary ---


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


# --- Problems with answers in every style, and text ---


class MixtureStudy(ProblemStudy):
    """A model, and texts of every domain, split by operand pairs or, of what is no problem, by text.

    Attributes:
        routed: The blocks that get experts.
        train: Domain -> token ids of texts to train on.
        test: Domain -> token ids of held-out texts.
    """

    def __init__(self, lm: LanguageModel, params: Params, texts: Sequence[str]) -> None:
        self.settings = settings = params.moe_routers
        self.routed = range(settings.sparse_step - 1, lm.n_layers, settings.sparse_step)
        super().__init__(lm, params, settings, depth=settings.depth, seed=settings.seed)
        drawn = sample(self.problems.train, len(OPERATIONS) * settings.samples, seed=settings.seed)
        kept = max(len(texts) - settings.test_texts, 0)
        self.train = {**self._solved(drawn), "text": [self._ids(text) for text in texts[:kept]]}
        self.test = {**self._solved(self.problems.test), "text": [self._ids(text) for text in texts[kept:]]}

    def prompts(self, style: str = "symbol") -> list[str]:
        """The test problems in a style, the four operations in turn in each template."""
        return [p.prompt(style, i // len(OPERATIONS)) for i, p in enumerate(self.problems.test)]

    def ids(self, style: str) -> list[list[int]]:
        """Token ids of these prompts."""
        return [self.lm.tokenizer(prompt)["input_ids"] for prompt in self.prompts(style)]

    @property
    def frames(self) -> list[str]:
        """The template of each prompt, in every style: the cluster of what is read at its end."""
        return self.units("word")

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
    routing = trace(lm, study.ids(style))
    at_end = routing.shares()[:, routing.last]
    operation = information(at_end, study.own, shuffles=settings.shuffles, seed=settings.seed)
    found = {"operation": operation, "path": path_bits(study, routing)}
    if not experts:
        return found
    own = torch.tensor([experts.index(OPERATIONS[operation]) for operation in study.own])
    first = routing.experts[:, routing.last, 0] == own
    return {
        **found,
        "first_choice": accuracy_curve(first, study.params.confidence, clusters=study.frames),
        "own_share": at_end.gather(-1, own.expand(len(at_end), -1)[..., None])[..., 0].mean(-1),
        "chance": 1 / len(experts),
    }


def path_bits(study: MixtureStudy, routing: Routing) -> dict[str, Any]:
    """Bits of the operation that the path of a prompt's last token tells, operand pairs held out.

    ``beyond_layer`` is what it tells more than the best layer alone, ``beyond_token`` what it adds to the token.
    """
    settings, labels = study.settings, torch.tensor(study.own)
    features = path_features(routing)
    told = told_bits(
        features, labels, study.units(), folds=settings.folds, shuffles=settings.shuffles, seed=settings.seed
    )
    told |= {"beyond_layer": told["path"] - told["layer"], "beyond_token": told["both"] - told["token"]}
    return {
        "distinct": len(routing.experts[:, routing.last, 0].unique(dim=1).T),
        **{
            name: {
                **study.mean(bits[0], study.frames),
                "p": float(permutation_p(bits[0].mean(), bits[1:].mean(-1))),
                "shuffled_95": bits[1:].mean(-1).quantile(0.95),
            }
            for name, bits in told.items()
        },
    }


# --- What MLPs write ---


def writing(study: MixtureStudy, lm: LanguageModel, blocks: Sequence[int]) -> tuple[dict[str, Any], Tensor | None]:
    """What a model's MLPs write at the end of prompts, by style; and (blocks, experts, d) what each expert writes.

    The second is a mean over the prompts of both styles; None of a dense model.
    """
    by_style = {style: written(lm, study.ids(style), blocks) for style in READ}
    experts = [each.experts for each in by_style.values() if each.experts is not None]
    measured = {style: written_words(study, lm, each.total, blocks) for style, each in by_style.items()}
    return measured, torch.stack(experts).mean(0) if experts else None


def written_words(study: MixtureStudy, lm: LanguageModel, total: Tensor, blocks: Sequence[int]) -> dict[str, Any]:
    """Operation words in what is written (blocks, prompts, d), through the readout, against equally frequent tokens.

    The last block with experts at or before the depth chosen beforehand is read once more by itself.
    """
    settings, confidence, own = study.settings, study.params.confidence, torch.tensor(study.own)
    pool = torch.tensor(token_pool(len(lm.readout.weight)))
    others = [
        pool[equal_frequency(torch.tensor(word.ids), pool, settings.draws, seed=settings.seed + w)].tolist()
        for w, word in enumerate(study.words)
    ]
    ids = [word.ids for word in study.words] + [drawn for draws in others for drawn in draws]
    scores = lens_scores(total, lm.readout, ids, ranked=[[o] for o in study.own])
    words, null = scores.log_alignment.split([len(study.words), len(ids) - len(study.words)], dim=-1)
    aligned, log_contrast = own_class(words, own).exp(), contrast(words[..., None], own)[:, 0]
    table, _ = against_null(
        aligned.double().mean(-1).numpy(), log_contrast, null.unflatten(-1, (len(study.words), -1)), own
    )
    at = max((i for i, block in enumerate(blocks) if block <= study.layer), default=0)
    return {
        "layers": [f"L{block}" for block in blocks],
        "alignment": study.mean(aligned, study.frames),
        "rank": scores.rank[..., 0].double().quantile(0.5, dim=-1),
        "choice": accuracy_curve(words.argmax(-1) == own, confidence, clusters=study.frames),
        "log_contrast": log_contrast,
        "null": table,
        "at_depth": {
            "layer": f"L{blocks[at]}",
            "alignment": study.mean(aligned[at], study.frames),
            "contrast_p": float(table["contrast_p"][at]),
        },
        "by_prompt": aligned[at],
    }
