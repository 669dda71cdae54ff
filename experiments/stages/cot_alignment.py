"""Stage cot_alignment@model: does training to write the operation before the answer put it into earlier layers?

Before training, after training on answers (``7 * 8 = 56``) and after training on a word and the answer (``7 * 8 =
multiply: 56``). Reported protocol: nine prompts that end in a lone space, a few layers, the score of the write-up.
Controlled: operands never trained on, read at the equals sign, every layer to the last.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from classifier_emergence.reading.layers import layer_row, peak_row, row_at
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.training.adapters import Start, adapted_together, save_adapter
from classifier_emergence.training.evaluation import generate, parse_number
from classifier_emergence.training.flaws import forgotten
from classifier_emergence.training.modules import QKVO
from experiments.params import Params
from experiments.shared.chain_of_thought import FORMATS, ChainOfThoughtStudy, train_to_write
from experiments.shared.runs import Run, Runs
from experiments.shared.stage import main
from experiments.shared.study import adapter_of
from experiments.shared.summaries import over, summary_over_seeds

SCORED = {
    "multiply": ("multiply", "multiplication", "times", "*"),
    "add": ("add", "addition", "plus", "sum", "+"),
    "subtract": ("subtract", "subtraction", "minus", "-"),
}
"""Words and signs of the write-up's score, without leading spaces."""
FORGETFUL = ("k_proj", "o_proj")
"""What the originals' adapter loader dropped of this adapter: it falls back to Q and V."""


def run(params: Params, key: str) -> None:
    """Train both formats, measure before and after and write one result."""
    with Runs("cot_alignment", key, params, ChainOfThoughtStudy) as runs:
        before = runs.once("before", lambda study, _: measure_both(study, None))
        seeds = params.cot_alignment.seeds
        members = {name: {f"{name}-{seed}": seed for seed in seeds} for name in FORMATS}
        calls = [
            Run(name, train_format, (name, members[name], before, runs.adapters), tuple(members[name]))
            for name in FORMATS
        ]
        results = runs.all(calls)
        by_format = {name: [results[member] for member in members[name]] for name in FORMATS}
        after = {name: {**format_summary(done), "by_seed": done} for name, done in by_format.items()}
        result = {
            "model": key,
            "layers": runs.study.lm.layers,
            "steps": params.cot_alignment.steps,
            "before": before,
            **after,
            "chain_against_direct": against(runs.study, after["chain_of_thought"], after["direct"]),
        }
        runs.finish(result)


def train_format(
    study: ChainOfThoughtStudy,
    work: Path,
    wanted: Sequence[str],
    name: str,
    seeds: Mapping[str, int],
    before: Mapping[str, Any],
    adapters: Path,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One format, all seeds together."""
    adapter = adapter_of(study.settings, study.n_layers, QKVO)
    with adapted_together(study.lm, {member: Start(adapter, seed) for member, seed in seeds.items()}) as wrapped:
        text = f"fine-tuning of {study.lm.key}: {name.replace('_', ' ')}, {len(seeds)} seeds"
        trained = train_to_write(study, wrapped, name, seeds, work, text)
        for member in wanted:
            save_adapter(wrapped, member, adapters / member)
            measured = {**measure_both(study, before), "flaws": measure_flaws(study, wrapped)}
            yield member, {"parameters": trained[member].parameters, "losses": trained[member].losses, **measured}


def measure_both(study: ChainOfThoughtStudy, before: Mapping[str, Any] | None) -> dict[str, Any]:
    """Both protocols, on the model as it is now, and what changed since before training."""
    right, texts = study.right()
    lens, units = study.read(study.prompts()), study.units()
    means, labels = lens.own_word.mean(-1), study.lm.layers
    inner = peak_row(means[:-1])  # the last layer is the model's own output
    early = (means >= 0.5).nonzero()[:, 0].tolist()
    writes = [text.strip().lower().startswith(p.operation) for text, p in zip(texts, study.problems.test, strict=True)]
    result: dict[str, Any] = {
        "reported": reported_score(study),
        "answers": {
            "exact": study.share(right, units),
            "by_operation": study.by_operation(torch.tensor(right)),
            "correct": right,
        },
        "writes_word": study.share(writes, units),
        "alignment": {
            "by_layer": study.mean(lens.own_word, units),
            "top_by_layer": lens.is_top.double().mean(-1),
            "inner_peak": study.mean(lens.own_word[inner], units),
            "inner_peak_layer": labels[inner],
            "last": study.mean(lens.own_word[-1], units),
            "last_top": study.share(lens.is_top[-1], units),
            "at_classifier": study.mean(lens.own_word[study.row], units),
            "first_layer_above_half": labels[early[0]] if early else None,
        },
    }
    if before is not None:
        reported, was_right = result["reported"], np.array(before["answers"]["correct"], dtype=float)
        reported["change"] = reported["answers"]["accuracy"] - before["reported"]["answers"]["accuracy"]
        result["answers"]["change"] = study.mean(np.subtract(right, was_right), units)
    return result


def reported_score(study: ChainOfThoughtStudy) -> dict[str, Any]:
    """The write-up's accuracy and score on nine prompts that end in a lone space.

    Its score is, for each prompt and layer, the largest probability of any token id that its words or signs have in
    this vocabulary, special tokens and pieces of words included; then the mean over prompts, then the largest of a few
    layers. ``special`` is the part that the special tokens alone make.
    """
    lm, problems = study.lm, study.reported
    prompts = [f"{problem.symbol} " for problem in problems]
    texts = generate(lm, prompts, new_tokens=20)
    states = residual_stream(lm, prompts)
    ids = {op: sorted({i for word in words for i in lm.tokenizer.encode(word)}) for op, words in SCORED.items()}
    every = sorted({i for group in ids.values() for i in group})
    log_alignment = lens_scores(states, lm.readout, [[i] for i in every], ranked=[[0]] * len(prompts)).log_alignment
    columns = {operation: [every.index(i) for i in group] for operation, group in ids.items()}
    best = [log_alignment[:, k, columns[problem.operation]].amax(-1).exp() for k, problem in enumerate(problems)]
    rows = [row_at(depth, study.n_layers) for depth in study.settings.depths]
    scores = torch.stack(best, dim=-1).mean(-1)[rows]
    special = [every.index(i) for i in every if i in lm.tokenizer.all_special_ids]
    return {
        "answers": study.share([parse_number(t) == p.answer for t, p in zip(texts, problems, strict=True)]),
        "texts": texts,
        "layers_read": [lm.layers[row] for row in rows],
        "score_by_layer": scores,
        "score": scores.max(),
        "special": log_alignment[rows][:, :, special].exp().amax(-1).mean(-1).max() if special else 0.0,
    }


def measure_flaws(study: ChainOfThoughtStudy, wrapped: PeftModel) -> dict[str, Any]:
    """What two flaws of the originals do: a reloaded adapter that lost modules, and reading at a lone space."""
    with forgotten(wrapped, FORGETFUL):
        reloaded = {"reported": reported_score(study), "exact": study.share(study.right()[0], study.units())}
    spaced = study.read([f"{prompt} " for prompt in study.prompts()], [layer_row(study.n_layers - 1)])
    return {"reloaded_q_and_v": reloaded, "lone_space": {"last_top": study.share(spaced.is_top[0], study.units())}}


def against(study: ChainOfThoughtStudy, chain: Mapping[str, Any], direct: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy after one format minus that after the other: on the nine prompts, and paired by problem and seed."""
    right = [[np.array(run["answers"]["correct"], dtype=float) for run in runs["by_seed"]] for runs in (chain, direct)]
    return {
        "reported": chain["reported"]["answers"]["value"] - direct["reported"]["answers"]["value"],
        "exact": over([study.mean(one - other, study.units()) for one, other in zip(*right, strict=True)]),
    }


def format_summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers over seeds."""
    paths = (
        "reported.answers", "reported.change", "reported.score", "reported.special", "answers.exact",
        "answers.change", "writes_word", "alignment.inner_peak", "alignment.last", "alignment.last_top",
        "alignment.at_classifier", "flaws.reloaded_q_and_v.exact", "flaws.reloaded_q_and_v.reported.answers",
        "flaws.lone_space.last_top",
    )  # fmt: skip
    return summary_over_seeds(runs, paths)


if __name__ == "__main__":
    main(run, __doc__)
