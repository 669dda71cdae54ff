"""Stage word_lenses@model: which of the operation words a Jacobian lens of these words alone chooses, on any model."""

from functools import partial
from typing import Any

import numpy as np
import torch

from classifier_emergence.reading.lens_maps import LensMaps
from classifier_emergence.tasks.arithmetic import OPERATIONS, STYLES, prompt_bank
from experiments.params import Params
from experiments.shared.lens_fits import FITS, kept_maps, selected
from experiments.shared.model import build
from experiments.shared.runs import Runs
from experiments.shared.stage import main, read_residuals
from experiments.shared.summaries import accuracy_curve, mean_of, over, share_of
from experiments.shared.word_lens import WordLens


def run(params: Params, key: str) -> None:
    """Fit the words' directions at every layer, let them choose and write one result."""
    with Runs("word_lenses", key, params, build, "lenses", "bank") as runs:
        words = WordLens(runs.study, params.lenses)
        texts = words.texts

        def of_text(i: int) -> LensMaps:
            text = f"directions of {len(words.directions)} tokens in {key}: text {i + 1} of {len(texts)}"
            return words.jacobian(texts[i], text)

        fits = [
            LensMaps.mean([kept_maps(runs, f"text-{i}", partial(of_text, i)) for i in range(fit, len(texts), FITS)])
            for fit in range(FITS)
        ]
        lenses = {"logit": [words.logit], "jacobian": fits}
        result = {
            "model": key,
            "layers": words.lm.layers,
            "directions": len(words.directions),
            "texts": params.lenses.word_texts,
            "null_words": {op: [word.word for word in of] for op, of in zip(OPERATIONS, words.null, strict=True)},
            "styles": {style: read(params, words, style, lenses) for style in STYLES},
        }
        runs.finish(result)


def read(params: Params, words: WordLens, style: str, lenses: dict[str, list[LensMaps]]) -> dict[str, Any]:
    """Choice among the words by either lens on the bank, by layer and at the layer that is best on other frames."""
    settings, confidence, lm = params.logit_lens, params.confidence, words.lm
    prompts = prompt_bank(style, params.bank)
    own = torch.tensor([OPERATIONS.index(prompt.operation) for prompt in prompts])
    clusters = [str(prompt.template) for prompt in prompts]
    states = read_residuals(lm.key)[f"bank/{style}"]
    found: dict[str, Any] = {}
    plain: list[np.ndarray] = []
    for name, fits in lenses.items():
        tables, hits = [], []
        for maps in fits:
            right, null = words.choose(maps, states, own)
            chosen, layers = selected(right, clusters)
            hits.append(chosen)
            tables.append({
                **accuracy_curve(right, confidence, clusters=clusters),
                "null_mean": null.mean(-1),
                "null_largest": null.max(-1),
                "selected": {
                    **share_of(chosen, confidence, clusters=clusters), "layers": [lm.layers[row] for row in layers],
                },
            })  # fmt: skip
        plain = plain or hits
        gains = [
            mean_of(chosen.astype(float) - plain[0], confidence, settings.resamples, clusters=clusters)
            for chosen in hits
        ]
        found[name] = {
            "fits": tables,
            "selected": over([table["selected"] for table in tables]),
            "minus_logit": over(gains),
        }
    return found


if __name__ == "__main__":
    main(run, __doc__)
