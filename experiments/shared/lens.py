"""Words in the lens against other words of the same unembedding norm: statistics that several stages read."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifier_emergence.reading.layers import layer_row
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import WordTokens, matched_words, row_norms, word_tokens
from classifier_emergence.statistics import permutation_p
from classifier_emergence.tasks.arithmetic import OPERATIONS, SYMBOLS, SYNONYMS, prompt_bank
from experiments.params import Params
from experiments.shared.summaries import accuracy_curve, mean_of, paired

KINDS = ("word", "synonyms", "symbols")
TRUTH_WORDS = (
    "correct", "incorrect", "right", "wrong", "true", "false", "yes", "no", "valid", "invalid", "good", "bad", "ok",
    "error",
)  # fmt: skip
"""The originals' words for true and false."""
OPERATION_WORDS = {*OPERATIONS, *(word for words in SYNONYMS.values() for word in words)}
RESOLVED = 3
"""Decimals of a contrast of log-alignments, well above float32's noise: where all states are equal (an embedding of
"=") no word stands out, on any processor."""


def null_words(
    lm: LanguageModel, targets: Sequence[WordTokens], n: int, exclude: Collection[str], fewest: int | None = None
) -> list[list[WordTokens]]:
    """For each target other words that match it in spelling forms and unembedding norm; see ``matched_words``."""
    norms = row_norms(lm.readout)
    return [matched_words(target, norms, lm.tokenizer, n, exclude=exclude, fewest=fewest) for target in targets]


def p_over_layers(score: np.ndarray, null: np.ndarray) -> float:
    """Permutation p of the largest of ``score`` (layers,) among those of ``null`` (layers, words), each over layers.

    At every layer scores count in deviations of all words there, the own one among them, so that layers are
    comparable. A maximum is judged as a maximum, so that p needs no correction for the number of layers.

    Source: Westfall and Young (1993), Resampling-based multiple testing, section 2.3 (max T).
    """
    words = np.column_stack([score, null])
    spread = words.std(-1)
    kept = spread > 1e-6 * spread.max()
    if not kept.any():  # no word differs from another at any layer, so none stands out
        return 1.0
    largest = ((words[kept] - words[kept].mean(-1, keepdims=True)) / spread[kept, None]).max(0)
    return float(permutation_p(largest[0], largest[1:]))


def own_class(values: Tensor, own: Tensor) -> Tensor:
    """(layers, prompts, ...): the entry of each prompt's own class, of ``values`` (layers, prompts, classes, ...)."""
    return values[:, torch.arange(len(own)), own]


def own_alignment(log_alignment: Tensor, own: Tensor) -> np.ndarray:
    """(layers, words): mean alignment of words on the prompts of their own class, averaged over classes.

    ``log_alignment`` is (layers, prompts, classes, words).
    """
    classes = range(log_alignment.shape[2])
    means = [log_alignment[:, own == c, c].exp().double().mean(1) for c in classes]
    return torch.stack(means).mean(0).numpy()


def contrast(log_alignment: Tensor, own: Tensor) -> np.ndarray:
    """(layers, words): how much more probable words are on their own class's prompts than on the others.

    Mean log-alignment on the class minus that on the other classes, in nats, averaged over classes; what a word gains
    everywhere cancels. ``log_alignment`` is (layers, prompts, classes, words).
    """
    differences = [
        log_alignment[:, own == c, c].mean(1) - log_alignment[:, own != c, c].mean(1)
        for c in range(log_alignment.shape[2])
    ]
    return torch.stack(differences).mean(0).double().numpy().round(RESOLVED)


def own_against_others(
    log_alignment: Tensor, own: Tensor, confidence: float, clusters: Sequence[object]
) -> dict[str, Any]:
    """The contrast of equally frequent classes, prompt by prompt, of log-alignment (layers, prompts, classes)."""
    of_own = own_class(log_alignment, own)
    others = (log_alignment.sum(-1) - of_own) / (log_alignment.shape[-1] - 1)
    return paired((of_own - others).double().numpy().round(RESOLVED), 0, confidence, clusters)


def against_null(
    alignment: np.ndarray, log_contrast: np.ndarray, null_log: Tensor, own: Tensor
) -> tuple[dict[str, Any], np.ndarray]:
    """Alignment and contrast (layers,) of the own words against those of other words, and these alignments.

    ``null_log`` is (layers, prompts, classes, words).
    """
    null, null_contrast = own_alignment(null_log, own), contrast(null_log, own)
    blocks = slice(layer_row(0), None)
    table = {
        "words": null.shape[-1],
        "alignment_95": np.quantile(null, 0.95, axis=-1),
        "p": permutation_p(alignment, null),
        "log_contrast_95": np.quantile(null_contrast, 0.95, axis=-1),
        "contrast_p": permutation_p(log_contrast, null_contrast),
        "over_layers_contrast_p": p_over_layers(log_contrast[blocks], null_contrast[blocks]),
    }
    return table, null


def bank_lens(
    lm: LanguageModel,
    states: Tensor,
    style: str,
    targets: Sequence[WordTokens],
    null: Sequence[Sequence[WordTokens]],
    params: Params,
) -> dict[str, Any]:
    """The lens on the prompt bank: operation words, synonyms and signs over layers, with the null of other words.

    Intervals resample frames: what is said of a style is to hold for other frames of it.

    Args:
        lm: The model.
        states: (layers, prompts, d) of the bank in a style.
        style: Of the bank.
        targets: The operation words, in the order of the operations.
        null: Other words for each of them; see ``null_words``.
        params: For the bank and intervals.
    """
    bank = prompt_bank(style, params.bank)
    own, frames = torch.tensor([OPERATIONS.index(prompt.operation) for prompt in bank]), [p.template for p in bank]
    n_ops, settings = len(OPERATIONS), params.logit_lens
    groups = [target.ids for target in targets]
    for others in (SYNONYMS, SYMBOLS):
        groups += [[i for word in others[op] for i in word_tokens(word, lm.tokenizer).ids] for op in OPERATIONS]
    ranked = [[k * n_ops + o for k in range(len(KINDS))] for o in own.tolist()]
    ids = groups + [word.ids for words in null for word in words]
    text = f"logit lens of {lm.key}: {len(own)} {style} prompts x {len(states)} layers"
    scores = lens_scores(states, lm.readout, ids, ranked=ranked, description=text)
    result: dict[str, Any] = {"n": len(own), "clusters": len(set(frames))}
    for k, kind in enumerate(KINDS):
        log_alignment = scores.log_alignment[..., k * n_ops : (k + 1) * n_ops]
        alignment = own_class(log_alignment, own).exp().double().numpy()
        mean = mean_of(alignment, params.confidence, settings.resamples, clusters=frames, seed=settings.seed)
        result[kind] = {
            "alignment": mean["mean"],
            "interval": mean["interval"],
            "by_operation": {op: alignment[:, (own == o).numpy()].mean(-1) for o, op in enumerate(OPERATIONS)},
            "rank": np.median(scores.rank[..., k].numpy(), axis=-1),
            # Which of the four words is the most probable one? A question of order, whatever the scale; chance is 1/4.
            "choice": accuracy_curve(log_alignment.argmax(-1) == own, params.confidence, clusters=frames),
            "log_contrast": contrast(log_alignment[..., None], own)[:, 0],
            "log_contrast_interval": own_against_others(log_alignment, own, params.confidence, frames)["interval"],
        }
    word, null_log = result["word"], scores.log_alignment[..., len(groups) :].unflatten(-1, (n_ops, -1))
    table, others_alignment = against_null(word["alignment"], word["log_contrast"], null_log, own)
    median, largest = np.median(others_alignment, axis=-1), others_alignment.max(-1)
    word["null"] = {**table, "alignment_median": median, "alignment_max": largest}
    return result
