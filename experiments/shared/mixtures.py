"""What the stage of mixtures reads of them in use: routing on five domains, and what experts write."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifier_emergence.mixtures.nulls import (
    equal_frequency,
    token_pool,
)
from classifier_emergence.mixtures.paths import path_features, told_bits
from classifier_emergence.mixtures.routing import (
    REREAD_BATCH_TOKENS,
    Routing,
    context_dependence,
    information,
    trace,
    usage,
)
from classifier_emergence.mixtures.writing import written
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.statistics import permutation_p
from classifier_emergence.tasks.arithmetic import N_TEMPLATES, OPERATIONS, STYLES
from classifier_emergence.tasks.problems import Problem, sample
from experiments.params import Params
from experiments.shared.lens import against_null, contrast, own_class
from experiments.shared.study import ProblemStudy
from experiments.shared.summaries import accuracy_curve

DOMAINS = (*OPERATIONS, "text")
READ = ("symbol", "word")
"""Styles in which lens and probes read the operation."""


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
