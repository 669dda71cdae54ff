"""Stage word_lenses@model: the Jacobian lens of a few words alone, which is cheap enough for every model.

Which of the four words is the most probable one does not depend on the scale of a state. So it needs no map of the
whole space, d backward passes a text, but only the images of the words' own directions: a cotangent each, exactly.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from classifier_emergence.models.loading import load
from classifier_emergence.reading.jacobian_lens import jacobian
from classifier_emergence.reading.lens_maps import LensMaps
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import feed
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.tasks.arithmetic import OPERATIONS, STYLES, prompt_bank
from classifier_emergence.tasks.problems import NEUTRAL
from experiments.params import Params
from experiments.shared.lens import OPERATION_WORDS, null_words
from experiments.shared.lens_fits import FITS, kept_maps, selected
from experiments.shared.runs import Runs
from experiments.shared.stage import main, read_residuals
from experiments.shared.summaries import accuracy_curve, mean_of, over, share_of


def build(params: Params, key: str) -> LanguageModel:
    """The model."""
    return load(key, params.registry)


def run(params: Params, key: str) -> None:
    """Fit the words' directions at every layer, let them choose and write one result."""
    settings = params.lenses
    with Runs("word_lenses", key, params, build, "lenses", "bank") as runs:
        lm = runs.study
        targets = [word_tokens(operation, lm.tokenizer) for operation in OPERATIONS]
        null = null_words(lm, targets, settings.word_nulls, OPERATION_WORDS)
        words = [word.ids for word in targets] + [word.ids for others in null for word in others]
        directions = lm.readout.directions(torch.tensor([i for ids in words for i in ids]))
        texts = [
            fed.ids[: settings.jacobian_tokens] for fed in feed(lm.tokenizer, NEUTRAL[: FITS * settings.word_texts])
        ]

        def of_text(i: int) -> LensMaps:
            text = f"directions of {len(words)} words in {key}: text {i + 1} of {len(texts)}"
            return LensMaps.linear(jacobian(lm, texts[i], skip=settings.skip, directions=directions, description=text))

        fits = [
            LensMaps.mean([kept_maps(runs, f"text-{i}", partial(of_text, i)) for i in range(fit, len(texts), FITS)])
            for fit in range(FITS)
        ]
        lenses = {"logit": [LensMaps.linear(directions.expand(len(lm.layers), -1, -1))], "jacobian": fits}
        sizes = [len(ids) for ids in words]
        result = {
            "model": key,
            "layers": lm.layers,
            "directions": len(directions),
            "texts": settings.word_texts,
            "null_words": {op: [word.word for word in of] for op, of in zip(OPERATIONS, null, strict=True)},
            "styles": {style: read(params, lm, style, lenses, sizes) for style in STYLES},
        }
        runs.finish(result)


def read(
    params: Params, lm: LanguageModel, style: str, lenses: dict[str, list[LensMaps]], sizes: Sequence[int]
) -> dict[str, Any]:
    """Choice among the words by either lens on the bank, by layer and at the layer that is best on other frames.

    A word counts by its best form. Matched words, one for each operation, choose beside them.
    """
    settings, confidence = params.logit_lens, params.confidence
    prompts = prompt_bank(style, params.bank)
    own = torch.tensor([OPERATIONS.index(prompt.operation) for prompt in prompts])
    clusters = [str(prompt.template) for prompt in prompts]
    states = read_residuals(lm.key)[f"bank/{style}"]
    found: dict[str, Any] = {}
    plain: list[np.ndarray] = []
    for name, fits in lenses.items():
        tables, hits = [], []
        for maps in fits:
            scores = torch.stack([part.amax(-1) for part in maps(states).split(list(sizes), -1)], -1)
            right = right_choice(scores[..., : len(OPERATIONS), None], own)[..., 0]
            null = right_choice(scores[..., len(OPERATIONS) :].unflatten(-1, (len(OPERATIONS), -1)), own).mean(1)
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


def right_choice(scores: Tensor, own: Tensor) -> np.ndarray:
    """(layers, prompts, draws): whether the own class has the largest of scores (layers, prompts, classes, draws)."""
    right: np.ndarray = (scores.argmax(2) == own[:, None]).numpy()
    return right


if __name__ == "__main__":
    main(run, __doc__)
