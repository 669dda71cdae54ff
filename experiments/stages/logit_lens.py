"""Stage logit_lens@model: does the vocabulary say the operation, at any layer?

Reported protocol: the eight prompts, bare first token, layer int(depth * n), top token. Controlled: the prompt bank,
alignment over single-token variants at every layer, against other words of the same unembedding norm.
"""

from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_at, layer_labels, layer_row
from classifier_emergence.reading.lens import LensScores, lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.readout import Readout
from classifier_emergence.reading.vocabulary import WordTokens, matched_words, row_norms, token_text, word_tokens
from classifier_emergence.results import write_result
from classifier_emergence.statistics import Proportion, bootstrap_mean, permutation_p
from classifier_emergence.tasks.arithmetic import LENS, OPERATIONS, STYLES, SYMBOLS, SYNONYMS, labelled, prompt_bank
from experiments.params import Params
from experiments.shared.stage import accuracy_curve, main, residuals_path, result_path

KINDS = ("word", "synonyms", "symbols")


def run(params: Params, key: str) -> None:
    """Score every layer and write one result."""
    lm = load(key, params.registry)
    readout = lm.readout
    states = load_file(residuals_path(key))
    targets = {operation: word_tokens(operation, lm.tokenizer) for operation in OPERATIONS}
    null = null_words(lm, readout, targets, params)
    result = {
        "model": key,
        "layers": layer_labels(len(states["reported/lens"]) - 1),
        "reported": reported(lm, readout, states["reported/lens"], targets, params),
        "null_words": {operation: [w.word for w in words] for operation, words in null.items()},
        "controlled": {
            style: controlled(lm, readout, states[f"bank/{style}"], style, targets, null, params) for style in STYLES
        },
    }
    write_result(result_path("logit_lens", key), result)


def null_words(
    lm: LanguageModel, readout: Readout, targets: dict[str, WordTokens], params: Params
) -> dict[str, list[WordTokens]]:
    """Other words matched to each operation word in spelling forms and unembedding norm."""
    norms = row_norms(readout.weight, readout.gain)
    exclude = {*OPERATIONS, *(word for words in SYNONYMS.values() for word in words)}
    n = params.logit_lens.null_words
    return {op: matched_words(target, norms, lm.tokenizer, n, exclude=exclude) for op, target in targets.items()}


def reported(
    lm: LanguageModel, readout: Readout, states: Tensor, targets: dict[str, WordTokens], params: Params
) -> dict[str, Any]:
    """The originals' table: top token and strict probabilities at one layer, and the same at every other layer."""
    prompts, labels = labelled(LENS)
    layer = layer_at(params.logit_lens.depth, len(states) - 1)
    strict = lens_scores(states, readout, [[target.strict_id] for target in targets.values()])
    variants = lens_scores(states, readout, [target.ids for target in targets.values()])
    row = layer_row(layer)
    own = torch.tensor(labels)
    own_id = torch.tensor([target.strict_id for target in targets.values()])[own]
    table = [
        {
            "prompt": prompt,
            "operation": OPERATIONS[label],
            "top_token": token_text(lm.tokenizer, int(strict.top_id[row, i])),
            "top_probability": strict.top_prob[row, i],
            "probability": dict(zip(OPERATIONS, strict.log_alignment[row, i].exp(), strict=True)),
            "rank": dict(zip(OPERATIONS, strict.rank[row, i], strict=True)),
        }
        for i, (prompt, label) in enumerate(zip(prompts, labels, strict=True))
    ]
    everywhere = _own(strict.log_alignment, own).exp()
    return {
        "layer": layer_labels(len(states) - 1)[row],
        "prompts": table,
        "score": Proportion.of(strict.top_id[row], own_id, confidence=params.confidence),
        "most_correct": (strict.top_id[1:] == own_id).sum(-1).max(),
        "max_probability_at_layer": everywhere[row].max(),
        "max_probability": everywhere[1:].max(),
        "strict_probability": everywhere,
        "alignment": _own(variants.log_alignment, own).exp(),
        "top_tokens": [[token_text(lm.tokenizer, int(i)) for i in ids] for ids in strict.top_id],
    }


def controlled(
    lm: LanguageModel,
    readout: Readout,
    states: Tensor,
    style: str,
    targets: dict[str, WordTokens],
    null: dict[str, list[WordTokens]],
    params: Params,
) -> dict[str, Any]:
    """Alignment of the prompt's own operation over layers, with intervals and the null of matched words."""
    own = torch.tensor([OPERATIONS.index(prompt.operation) for prompt in prompt_bank(style, params.bank)])
    groups = [target.ids for target in targets.values()]
    for words in (SYNONYMS, SYMBOLS):
        groups += [[i for word in words[op] for i in word_tokens(word, lm.tokenizer).ids] for op in OPERATIONS]
    n_ops = len(OPERATIONS)
    ranked = [[int(o), int(o) + n_ops, int(o) + 2 * n_ops] for o in own]
    null_ids = [word.ids for op in OPERATIONS for word in null[op]]
    text = f"logit lens of {lm.key}: {len(own)} {style} prompts x {len(states)} layers"
    scores = lens_scores(states, readout, groups + null_ids, ranked=ranked, description=text)
    null_log = scores.log_alignment[..., len(groups) :].unflatten(-1, (n_ops, -1))
    by_kind = {
        kind: _kind_summary(scores, k, own, params, null_log if kind == "word" else None)
        for k, kind in enumerate(KINDS)
    }
    return {"n": len(own), **by_kind}


def _kind_summary(scores: LensScores, k: int, own: Tensor, params: Params, null_log: Tensor | None) -> dict[str, Any]:
    n_ops = len(OPERATIONS)
    log_alignment = scores.log_alignment[..., k * n_ops : (k + 1) * n_ops]
    alignment = _own(log_alignment, own).exp().double().numpy()
    settings = params.logit_lens
    ends = bootstrap_mean(alignment, confidence=params.confidence, resamples=settings.resamples, seed=settings.seed)
    summary = {
        "alignment": alignment.mean(-1),
        "interval": np.stack(ends, axis=-1),
        "by_operation": {op: alignment[:, (own == o).numpy()].mean(-1) for o, op in enumerate(OPERATIONS)},
        "rank": np.median(scores.rank[..., k].numpy(), axis=-1),
        # Which of the four words is the most probable one? A question of order, whatever the scale; chance is 1/4.
        "choice": accuracy_curve(log_alignment.argmax(-1) == own, params.confidence),
        "log_contrast": contrast(log_alignment[..., None], own)[:, 0],
    }
    if null_log is not None:
        null = torch.stack([null_log[:, own == o, o].exp().double().mean(1) for o in range(n_ops)]).mean(0).numpy()
        null_contrast = contrast(null_log, own)
        summary["null"] = {
            "words": null.shape[-1],
            "alignment_median": np.median(null, axis=-1),
            "alignment_95": np.quantile(null, 0.95, axis=-1),
            "alignment_max": null.max(-1),
            "p": permutation_p(summary["alignment"], null),
            "log_contrast_95": np.quantile(null_contrast, 0.95, axis=-1),
            "contrast_p": permutation_p(summary["log_contrast"], null_contrast),
        }
    return summary


def _own(log_alignment: Tensor, own: Tensor) -> Tensor:
    """(layers, prompts): the entry of each prompt's own operation."""
    return log_alignment[:, torch.arange(len(own)), own]


def contrast(log_alignment: Tensor, own: Tensor) -> np.ndarray:
    """(layers, words): how much more probable words are on their own class's prompts than on the others.

    Mean log-alignment on the class minus that on the other classes, in nats, averaged over classes; what a word gains
    everywhere cancels. ``log_alignment`` is (layers, prompts, classes, words).
    """
    differences = [
        log_alignment[:, own == c, c].mean(1) - log_alignment[:, own != c, c].mean(1)
        for c in range(log_alignment.shape[2])
    ]
    # Rounded well above float32's noise: where all states are equal (an embedding of "="), no word stands out.
    return torch.stack(differences).mean(0).double().numpy().round(3)


if __name__ == "__main__":
    main(run, __doc__)
