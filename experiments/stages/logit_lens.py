"""Stage logit_lens@model: does the vocabulary say the operation, at any layer?

Reported protocol: the eight prompts, bare first token, layer int(depth * n), top token. Controlled: the prompt bank,
alignment over single-token variants at every layer, against other words of the same unembedding norm. Flaw ablations:
the reported protocol with each of the slips that the originals' Granite was run with, and with all of them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from classifier_emergence.models.loading import load
from classifier_emergence.reading.layers import layer_row, row_at
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import WordTokens, token_text, word_tokens
from classifier_emergence.results import write_result
from classifier_emergence.tasks.arithmetic import LENS, OPERATIONS, STYLES, labelled
from experiments.params import Params
from experiments.shared.lens import OPERATION_WORDS, bank_lens, null_words, own_class
from experiments.shared.stage import main, read_residuals, result_path
from experiments.shared.summaries import mean_of, share_of


def run(params: Params, key: str) -> None:
    """Score every layer and write one result."""
    lm = load(key, params.registry)
    states = read_residuals(key)
    targets = [word_tokens(operation, lm.tokenizer) for operation in OPERATIONS]
    null = null_words(lm, targets, params.logit_lens.null_words, OPERATION_WORDS)
    result = {
        "model": key,
        "layers": lm.layers,
        "reported": {**reported(lm, states["reported/lens"], targets, params), "flaws": flaws(lm, states, params)},
        "null_words": {op: [word.word for word in words] for op, words in zip(OPERATIONS, null, strict=True)},
        "controlled": {style: bank_lens(lm, states[f"bank/{style}"], style, targets, null, params) for style in STYLES},
    }
    write_result(result_path("logit_lens", key), result)


def reported(lm: LanguageModel, states: Tensor, targets: Sequence[WordTokens], params: Params) -> dict[str, Any]:
    """The originals' table: top token and strict probabilities at one layer, and the same at every other layer."""
    prompts, labels = labelled(LENS)
    own, row, blocks = torch.tensor(labels), row_at(params.logit_lens.depth, lm.n_layers), slice(layer_row(0), None)
    strict = lens_scores(states, lm.readout, [[target.strict_id] for target in targets])
    variants = lens_scores(states, lm.readout, [target.ids for target in targets])
    right = strict.top_id == torch.tensor([target.strict_id for target in targets])[own]
    everywhere = own_class(strict.log_alignment, own).exp()
    return {
        "layer": lm.layers[row],
        "prompts": [
            {
                "prompt": prompt,
                "operation": OPERATIONS[label],
                "top_token": token_text(lm.tokenizer, int(strict.top_id[row, i])),
                "top_probability": strict.top_prob[row, i],
                "probability": dict(zip(OPERATIONS, strict.log_alignment[row, i].exp(), strict=True)),
                "rank": dict(zip(OPERATIONS, strict.rank[row, i], strict=True)),
            }
            for i, (prompt, label) in enumerate(zip(prompts, labels, strict=True))
        ],
        "score": share_of(right[row], params.confidence),
        "most_correct": right[blocks].sum(-1).max(),
        "max_probability_at_layer": everywhere[row].max(),
        "max_probability": everywhere[blocks].max(),
        "strict_probability": everywhere,
        "alignment": own_class(variants.log_alignment, own).exp(),
        "top_tokens": [[token_text(lm.tokenizer, int(i)) for i in ids] for ids in strict.top_id],
    }


def flaws(lm: LanguageModel, states: dict[str, Tensor], params: Params) -> dict[str, Any]:
    """What the eight prompts show at the originals' layer where the model or the readout is not what it should be.

    Granite divides its logits by 8 and multiplies its embedding by 12; the originals did neither, and had attention
    outputs scaled by a number that belongs to the softmax. A divisor that is left out changes no top token and makes
    any of them all but certain.
    """
    row = row_at(params.logit_lens.depth, lm.n_layers)
    undivided = replace(lm.readout, divisor=lm.readout.divisor / params.logit_lens.logits_divisor)
    strict = [[word_tokens(operation, lm.tokenizer).strict_id] for operation in OPERATIONS]
    cases = {
        "sound": ("reported", lm.readout), "no_divisor": ("reported", undivided),
        "no_embedding_multiplier": ("no_embedding_multiplier", lm.readout),
        "scaled_attention": ("scaled_attention", lm.readout), "as_granite": ("as_granite", undivided),
    }  # fmt: skip
    found = {}
    for name, (kept, readout) in cases.items():
        scores = lens_scores(states[f"{kept}/lens"][row : row + 1], readout, strict)
        top, (commonest, _) = scores.top_id[0], Counter(scores.top_id[0].tolist()).most_common(1)[0]
        found[name] = {
            "top_tokens": [token_text(lm.tokenizer, int(i)) for i in top],
            "top_probabilities": scores.top_prob[0],
            "top_probability": mean_of(scores.top_prob[0], params.confidence, params.logit_lens.resamples),
            "modal_share": share_of(top == commonest, params.confidence),
            "largest_word_probability": scores.log_alignment.exp().max(),
        }
    return found


if __name__ == "__main__":
    main(run, __doc__)
