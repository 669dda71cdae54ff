"""Stage moe_routers@model: do a mixture's router rows point at words, what do its experts go by, and does it matter?

A mixture of experts is read as it is: rows of routers against the vocabulary (reported: plain cosines; controlled:
gains folded in, nulls, false discovery rates), then routing in use. A dense Llama is upcycled first: experts trained
apart on the four operations and on text, joined under a fresh router. Its dense twin sees the same text for the same
steps, so that what differs between the two is what the mixture does.
"""

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from classifier_emergence.mixtures.routers import has_routers, load_routers
from classifier_emergence.mixtures.upcycling import (
    Joint,
    join,
    merge,
    save_routers,
    self_generated,
    text_losses,
    train_expert,
    train_jointly,
    trained_tensors,
)
from classifier_emergence.models.loading import load
from classifier_emergence.models.registry import HubSource
from classifier_emergence.models.sources import checkpoint_of
from classifier_emergence.reading.layers import layer_at, layer_labels, layer_row
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.probes import fit_probes
from classifier_emergence.reading.readout import decoder_blocks, find_readout
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.results import plain, write_result
from classifier_emergence.statistics import bootstrap_mean
from classifier_emergence.tasks.arithmetic import OPERATIONS
from classifier_emergence.tasks.problems import NEUTRAL
from classifier_emergence.tasks.splits import rotations
from classifier_emergence.training.evaluation import answers
from classifier_emergence.training.supervised import MLP, Adapter, Schedule
from experiments.params import Params
from experiments.shared.mixtures import DOMAINS, READ, Data, in_use, projection
from experiments.shared.runs import ADAPTERS, Runs, mean_of, over_seeds, share_of
from experiments.shared.stage import accuracy_curve, main, result_path

TOLERANCE = 1e-4  # of probes, relative to the objective


def run(params: Params, key: str) -> None:
    """Read the routers of a mixture of experts, or make one and then read them; write one result."""
    source = params.registry[key]
    checkpoint = checkpoint_of(key, source)
    if not has_routers(checkpoint):
        upcycle(load(key, params.registry), params)
        return
    name, revision = (source.repo, source.revision) if isinstance(source, HubSource) else (checkpoint.root, "main")
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    weights = load_routers(checkpoint)
    result: dict[str, Any] = {"model": key, "kind": "mixture", "on_hub": isinstance(source, HubSource)}
    result["projection"] = projection(weights, tokenizer, params.moe_routers)
    result["bytes_read"], result["total_bytes"] = weights.bytes_read, weights.total_bytes
    # Asked before gigabytes of experts are fetched that could not be loaded.
    if "quantization_config" in checkpoint.json("config.json"):
        result["routing"], result["routing_not_run"] = None, "the experts are quantised"
    else:
        lm = load(key, params.registry)
        data = Data(lm.tokenizer, params.moe_routers, list(NEUTRAL))
        result["routing"] = in_use(lm.model, data, params)
    result = plain(result)
    result["summary"] = summary([result])
    (ADAPTERS / "moe_routers" / key).mkdir(parents=True, exist_ok=True)  # the pipeline wants it of every model
    write_result(result_path("moe_routers", key), result)


# --- Upcycling ---


def upcycle(lm: LanguageModel, params: Params) -> None:
    """Train experts apart, join them, train routers; the dense twin likewise; write one result."""
    settings, key = params.moe_routers, lm.key
    runs = Runs("moe_routers", key, params)
    openings = [" ".join(sentence.split()[:3]) for sentence in NEUTRAL]
    written = runs.once(
        "text",
        lambda _: {
            "texts": self_generated(
                lm.model, lm.tokenizer, openings, settings.texts, new_tokens=settings.new_tokens, seed=settings.seed,
                description=f"texts written by {key}",
            )
        },
    )  # fmt: skip
    data = Data(lm.tokenizer, settings, written["texts"])
    base = runs.once("base", lambda _: measure(lm.model, data, params))
    experts = {of: runs.once(f"expert_{of}", partial(branch, lm, data, (of,), runs, params)) for of in DOMAINS}
    branched = runs.once("expert_all", partial(branch, lm, data, DOMAINS, runs, params))
    mixtures = [runs.once(f"mixture_{n}", partial(mixture, lm, data, n, runs, params)) for n in settings.seeds]
    twins = [runs.once(f"twin_{n}", partial(twin, lm, data, n, runs, params)) for n in settings.seeds]
    shown = ("answers", *(f"losses.{d}" for d in DOMAINS), *(f"lens.{s}.at_depth" for s in READ),
             *(f"probe.{s}.at_depth" for s in READ))  # fmt: skip
    result: dict[str, Any] = {
        "model": key,
        "kind": "upcycled",
        "layers": layer_labels(len(decoder_blocks(lm.model))),
        "depth_layer": f"L{layer_at(settings.depth, len(decoder_blocks(lm.model)))}",
        "experts": list(DOMAINS),
        "base": _public(base),
        "branches": {**experts, "all": branched},
        "mixtures": [
            {**run, "before": _public(run["before"]), "after": _public(run["after"], tokens=run is mixtures[0])}
            for run in mixtures
        ],
        "twins": [{**run, "after": _public(run["after"])} for run in twins],
        "over_seeds": {
            "joined": {path: over_seeds([run["before"] for run in mixtures], path) for path in shown},
            "mixture": {path: over_seeds([run["after"] for run in mixtures], path) for path in shown},
            "twin": {path: over_seeds([run["after"] for run in twins], path) for path in shown},
        },
        "mixture_minus_twin": {style: difference(mixtures, twins, style, data, params) for style in READ},
        "mixture_minus_base": {style: difference(mixtures, [{"after": base}], style, data, params) for style in READ},
    }
    result["summary"] = summary([run["after"] for run in result["mixtures"]])
    runs.finish(result)


def branch(
    lm: LanguageModel, data: Data, domains: Sequence[str], runs: Runs, params: Params, _: Path
) -> dict[str, Any]:
    """One expert, or with all domains the twin: low-rank updates of the MLPs, by the language-modelling loss.

    With n domains there are n times as many steps: the twin sees as much text as all experts together.
    """
    settings, name = params.moe_routers, domains[0] if len(domains) == 1 else "all"
    blocks = range(settings.sparse_step - 1, len(decoder_blocks(lm.model)), settings.sparse_step)
    place = Adapter(MLP, settings.rank, settings.scale, tuple(blocks))
    schedule = Schedule(
        settings.expert_steps * len(domains), settings.batch_size, settings.expert_learning_rate, settings.seed,
        settings.every,
    )  # fmt: skip
    curve = train_expert(
        lm.model, [data.train[domain] for domain in domains], place, schedule, runs.adapters / name,
        description=f"expert of {lm.key} for {name}",
    )  # fmt: skip
    branched = merge(lm.model, runs.adapters / name)
    return {"curve": curve, "test_losses": {d: text_losses(branched, data.test[d]).mean() for d in DOMAINS}}


def mixture(lm: LanguageModel, data: Data, seed: int, runs: Runs, params: Params, _: Path) -> dict[str, Any]:
    """Join the experts under a fresh router, train it, and measure before and after."""
    model = join(lm.model, [runs.adapters / domain for domain in DOMAINS], top_k=params.moe_routers.top_k, seed=seed)
    before = of_mixture(model, lm.tokenizer, data, params)
    curve = jointly(model, data, seed, params, f"mixture of {lm.key}: seed {seed}")
    save_file(trained_tensors(model), runs.adapters / f"mixture-{seed}.safetensors")
    return {"seed": seed, "curve": curve, "before": before, "after": of_mixture(model, lm.tokenizer, data, params)}


def twin(lm: LanguageModel, data: Data, seed: int, runs: Runs, params: Params, _: Path) -> dict[str, Any]:
    """The dense model with all text in one update of its MLPs, and the same further steps on its norm gains."""
    model = merge(lm.model, runs.adapters / "all")
    curve = jointly(model, data, seed, params, f"dense twin of {lm.key}: seed {seed}")
    save_file(trained_tensors(model), runs.adapters / f"twin-{seed}.safetensors")
    return {"seed": seed, "curve": curve, "after": measure(model, data, params)}


def jointly(model: PreTrainedModel, data: Data, seed: int, params: Params, text: str) -> list[dict[str, Any]]:
    """The joint phase on texts of all domains, as many of each in every batch."""
    settings = params.moe_routers
    schedule = Schedule(settings.joint_steps, settings.batch_size, settings.learning_rate, seed, settings.every)
    joint = Joint(settings.router_learning_rate, settings.balance)
    return train_jointly(model, [data.train[domain] for domain in DOMAINS], schedule, joint, description=text)


def of_mixture(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data, params: Params
) -> dict[str, Any]:
    """All measures of a mixture: as of a dense model, routing in use, and rows of routers against the vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        rows = projection(load_routers(save_routers(model, Path(folder))), tokenizer, params.moe_routers)
    return {**measure(model, data, params), "routing": in_use(model, data, params, DOMAINS), "projection": rows}


def measure(model: PreTrainedModel, data: Data, params: Params) -> dict[str, Any]:
    """Losses on held-out texts, answers, the lens and probes at the last prompt token; of dense models and mixtures."""
    settings = params.moe_routers
    found = answers(
        model, data.tokenizer, data.prompts("symbol"), [f" {problem.answer}" for problem in data.problems.test]
    )
    lens, probe = {}, {}
    for style in READ:
        states = residual_stream(model, data.tokenizer, data.prompts(style))
        lens[style] = lens_of(model, states, data, params)
        probe[style] = probe_of(states, data, params)
    return {
        "losses": {
            domain: mean_of(text_losses(model, data.test[domain]), params, settings.resamples) for domain in DOMAINS
        },
        "answers": share_of(found.exact, params),
        "lens": lens,
        "probe": probe,
    }


def lens_of(model: PreTrainedModel, states: torch.Tensor, data: Data, params: Params) -> dict[str, Any]:
    """Alignment of the own operation word at every layer, and at the one chosen beforehand."""
    words = [word_tokens(operation, data.tokenizer).ids for operation in OPERATIONS]
    scores = lens_scores(states, find_readout(model), words, ranked=[[own] for own in data.own])
    at = torch.arange(len(data.own))
    own = scores.log_alignment[:, at, torch.tensor(data.own)].exp()
    row = layer_row(layer_at(params.moe_routers.depth, len(states) - 1))
    peak = 1 + int(own[1:].mean(-1).argmax())
    choice = scores.log_alignment.argmax(-1) == torch.tensor(data.own)
    return {
        "alignment": own.mean(-1),
        "at_depth": mean_of(own[row], params, params.moe_routers.resamples),
        "peak": mean_of(own[peak], params, params.moe_routers.resamples),
        "peak_layer": layer_labels(len(states) - 1)[peak],
        "rank": scores.rank[..., 0].double().quantile(0.5, dim=-1),
        "choice": accuracy_curve(choice, params.confidence),
        "by_prompt": own[row],
    }


def probe_of(states: torch.Tensor, data: Data, params: Params) -> dict[str, Any]:
    """Accuracy of probes on held-out operand pairs at every layer, and at the one chosen beforehand."""
    settings = params.moe_routers
    y = torch.tensor(data.own)
    groups = [tuple(sorted(problem.operands)) for problem in data.problems.test]
    right = torch.zeros(states.shape[:2], dtype=torch.bool)
    for part in rotations(groups, settings.folds, seed=settings.seed):
        learn = np.concatenate([part.train, part.validation])  # no layer is chosen, so none is needed to choose on
        probes = fit_probes(states[:, learn], y[learn], standardise=True, tol=TOLERANCE)
        right[:, part.test] = probes.predict(states[:, part.test]) == y[part.test]
    row = layer_row(layer_at(settings.depth, len(states) - 1))
    return {**accuracy_curve(right, params.confidence), "at_depth": share_of(right[row], params)}


def difference(
    these: Sequence[Mapping[str, Any]], those: Sequence[Mapping[str, Any]], style: str, data: Data, params: Params
) -> dict[str, Any]:
    """Alignment of one set of models minus that of another at the layer chosen beforehand, prompt by prompt.

    Means over seeds; the interval is a bootstrap over operand pairs.
    """
    a, b = (np.mean([run["after"]["lens"][style]["by_prompt"] for run in runs], axis=0) for runs in (these, those))
    pairs = [str(sorted(problem.operands)) for problem in data.problems.test]
    low, high = bootstrap_mean(
        a - b, confidence=params.confidence, resamples=params.moe_routers.resamples, seed=0, clusters=pairs
    )
    return {"mean": np.mean(a - b), "interval": [low, high], "n": len(a)}


def summary(mixtures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the claims read: of the mixtures of all seeds, or of one that was not made here.

    Shares of experts that stand out at the false discovery rate, the smallest q of a word and an expert, how much of
    routing another context changes, and how much the token alone decides (means over layers; None if routing was not
    run).
    """

    def over(values: Sequence[Any]) -> dict[str, Any]:
        return over_seeds([{"of": value} for value in values], "of")

    rows = [mixture["projection"] for mixture in mixtures]
    found = {
        name: over([row[name]["found"] / np.size(row[name]["q"]) for row in rows])
        for name in ("reported", "controlled", "coherence")
    }
    contexts = [mixture["routing"]["context"] for mixture in mixtures if mixture["routing"]]
    change, decided = [], []
    for context in contexts:
        mean, (low, high), others = context["overall"], context["overall_interval"], np.mean(context["other_tokens"])
        change.append({"mean": mean, "interval": [low, high], "n": context["tokens"]})
        if others:
            ends = [float(1 - high / others), float(1 - low / others)]
            decided.append({"mean": float(1 - mean / others), "interval": ends, "n": context["tokens"]})
    unknown = dict.fromkeys(("value", "least", "largest", "interval", "n"))
    return {
        "experts": np.size(rows[0]["reported"]["q"]),
        "largest_cosine": over([row["reported"]["largest"] for row in rows]),
        **{f"{name}_found": share for name, share in found.items()},
        "words_smallest_q": over([min((word["q"] for word in row["words"]), default=1.0) for row in rows]),
        "context_change": over(change) if change else unknown,
        "decided_by_token": over(decided) if decided else unknown,
    }


def _public(measured: Mapping[str, Any], *, tokens: bool = False) -> dict[str, Any]:
    """A measure without its values by prompt and, unless asked for, without the long lists of top tokens."""
    lens = {style: {k: v for k, v in of.items() if k != "by_prompt"} for style, of in measured["lens"].items()}
    shown = {**measured, "lens": lens}
    if "projection" in measured and not tokens:
        shown["projection"] = {
            name: {k: v for k, v in part.items() if not k.startswith("top_")} if isinstance(part, dict) else part
            for name, part in measured["projection"].items()
        }
    return shown


if __name__ == "__main__":
    main(run, __doc__)
