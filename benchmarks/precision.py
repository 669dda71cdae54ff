"""What bfloat16 weights change: lens and probes of one model in bfloat16 and in float32, on the same prompts.

``python -m benchmarks.precision smollm2-135m-instruct [--pairs N]`` reads the symbol and the word prompts of N operand
pairs of params.yaml's bank with both, keeps what differs in results/benchmarks/precision.json and writes the guide's
table. Exit code 1 if it is more than the tolerances that the guide states.
"""

import argparse
import gc
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.recorded import keep, show, table
from classifier_emergence.models.loading import open_model
from classifier_emergence.reading.lens import LensScores, lens_scores
from classifier_emergence.reading.probes import fit_probes
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.tasks.arithmetic import OPERATIONS, Prompt, prompt_bank
from experiments.params import load_params

FOLDS = 4
QUANTILES = {"median": 0.5, "95": 0.95, "largest": 1.0}
TOLERANCES = {"log_alignment": 0.5, "rank": 1.25, "accuracy": 0.05}
"""Nats that 95 of 100 log-alignments differ by at most; the factor of as many ranks; the accuracies at any layer."""


def read(name: str, dtype: str, banks: Mapping[str, Sequence[Prompt]]) -> dict[str, tuple[LensScores, Tensor]]:
    """By style, scores of the operation words and accuracies (layers,) of probes on operand pairs held out."""
    gc.collect()  # the model before
    lm, found = open_model(name, dtype=dtype), {}
    words = [word_tokens(operation, lm.tokenizer).ids for operation in OPERATIONS]
    for style, prompts in banks.items():
        states = residual_stream(lm, [prompt.text for prompt in prompts]).float()
        labels = torch.tensor([OPERATIONS.index(prompt.operation) for prompt in prompts])
        fold = torch.arange(len(prompts)) // len(OPERATIONS) % FOLDS  # the bank goes pair by pair
        right = torch.zeros(states.shape[:2])
        for k in range(FOLDS):
            train, test = fold != k, fold == k
            probes = fit_probes(states[:, train], labels[train], standardise=True)
            right[:, test] = (probes.predict(states[:, test]) == labels[test]).float()
        found[style] = lens_scores(states, lm.readout, words), right.mean(-1)
    return found


def spread(differences: Tensor) -> dict[str, float]:
    """Median, 95 % quantile and largest of absolute differences."""
    values = differences.abs().double().flatten().sort().values
    return {name: values[round(share * (len(values) - 1))].item() for name, share in QUANTILES.items()}


def measure(name: str, pairs: int) -> dict[str, Any]:
    """What differs, by style: log-alignments in nats, ranks as factors, accuracies as they are."""
    bank, found = load_params().bank, {}
    banks = {style: prompt_bank(style, bank)[: len(OPERATIONS) * pairs] for style in ("symbol", "word")}
    both = [read(name, dtype, banks) for dtype in ("float32", "bfloat16")]
    for style, prompts in banks.items():
        (full, full_right), (half, half_right) = (each[style] for each in both)
        ranks = spread(half.rank.double().log() - full.rank.double().log())
        found[style] = {
            "prompts": len(prompts),
            "log_alignment": spread(half.log_alignment - full.log_alignment),
            "rank": {key: torch.tensor(value).exp().item() for key, value in ranks.items()},
            "top_token_differs": (half.top_id != full.top_id).double().mean().item(),
            "accuracy": (half_right - full_right).abs().max().item(),
            "peak_accuracy": {"float32": full_right.max().item(), "bfloat16": half_right.max().item()},
        }
    return found


def beyond(found: dict[str, Any]) -> list[str]:
    """What is more than its tolerance, of one model."""
    values = {
        (style, key): part[key] if key == "accuracy" else part[key]["95"]
        for style, part in found.items() for key in TOLERANCES
    }  # fmt: skip
    return [f"{s} prompts, {key}: {v:.3g}" for (s, key), v in values.items() if not v <= TOLERANCES[key]]


def as_table(every: dict[str, Any]) -> str:
    """All models, as the guide shows them."""
    head = ["model", "prompts", "log-alignment, nats: median, 95 %, largest", "rank, factor: median, 95 %, largest",
            "top token differs", "probe accuracy: largest difference"]  # fmt: skip
    rows = []
    for model, found in every.items():
        for style, part in found.items():
            logs, ranks = (", ".join(f"{part[key][of]:.2g}" for of in QUANTILES) for key in ("log_alignment", "rank"))
            rest = f"{part['top_token_differs']:.1%}", f"{part['accuracy']:.3f}"
            rows.append([f"`{model}`", f"{part['prompts']} {style}", logs, ranks, *rest])
    return table(head, rows)


def main() -> None:
    """Measure, keep and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="whatever -m of the command line takes")
    parser.add_argument("--pairs", type=int, default=60, help="of operands, four prompts each; default: %(default)s")
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.pairs)
    every = keep("precision", arguments.model, found)
    show("precision", as_table(every))
    print(as_table({arguments.model: found}))
    if wrong := beyond(found):
        sys.exit(f"more than the tolerance: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
