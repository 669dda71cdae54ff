"""Stage fetch@model: get the weights, check them, and describe the model and how its vocabulary spells operations.

The weights stay in the user's cache; the result is a small manifest.
"""

from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from classifier_emergence.models.loading import load
from classifier_emergence.models.sources import fetch, provenance
from classifier_emergence.reading.lens import check_lens
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.results import write_result
from classifier_emergence.tasks.arithmetic import OPERATIONS, SYMBOLS, SYNONYMS
from experiments.params import Params
from experiments.shared.stage import main, result_path


def run(params: Params, key: str) -> None:
    """Fetch, verify every hash, load once and write the manifest."""
    source = params.registry[key]
    fetch(key, source, verify=True)
    lm = load(key, params.registry)
    readout = lm.readout
    vocabulary, d_model = readout.weight.shape
    result = {
        "model": key,
        "source": provenance(source),
        "architecture": type(lm.model).__name__,
        "n_layers": lm.n_layers,
        "d_model": d_model,
        "vocabulary": vocabulary,
        "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
        "tied_embeddings": lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight,
        "adds_bos": lm.tokenizer("=")["input_ids"][:1] == [lm.tokenizer.bos_token_id],
        # The lens at the last layer against the model's own output; rounding, if the readout is right.
        "lens_log_gap": check_lens(lm),
        "words": {operation: words(operation, lm.tokenizer) for operation in OPERATIONS},
    }
    write_result(result_path("fetch", key), result)


def words(operation: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """How the vocabulary spells an operation, its synonyms and its symbols."""
    kinds = {"word": (operation,), "synonyms": SYNONYMS[operation], "symbols": SYMBOLS[operation]}
    return {
        kind: [
            {**asdict(tokens := word_tokens(word, tokenizer)), "strict_is_whole": tokens.strict_is_whole}
            for word in group
        ]
        for kind, group in kinds.items()
    }


if __name__ == "__main__":
    main(run, __doc__)
