"""Stage moe_routers@model: do a mixture's router rows point at words, what do its experts go by, and does it matter?

A mixture of experts is read as it is: rows of routers and what experts write against the vocabulary (reported: plain
cosines; controlled: gains folded in, nulls, false discovery rates, and how often planted words are found), then routing
in use and paths of experts. A dense Llama is upcycled first: experts trained apart on the four operations and on text,
joined under a fresh router. Its dense twin sees the same text for the same steps, so that what differs between the two
is what the mixture does.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from classifier_emergence.mixtures.routers import has_routers, load_routers
from classifier_emergence.mixtures.upcycling import (
    Joint,
    join_experts,
    merge_adapter,
    save_routers,
    self_generated,
    text_losses,
    train_expert,
    train_jointly,
    trained_tensors,
)
from classifier_emergence.models.loading import load
from classifier_emergence.models.registry import HubSource
from classifier_emergence.models.sources import checkpoint_of, tokenizer_of
from classifier_emergence.reading.layers import peak_row
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.probes import fit_probes
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.results import plain, write_result
from classifier_emergence.tasks.problems import NEUTRAL
from classifier_emergence.tasks.splits import rotations
from classifier_emergence.training.adapters import Adapter
from classifier_emergence.training.evaluation import answers
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.modules import MLP
from experiments.params import Params
from experiments.shared.expert_words import projection
from experiments.shared.lens import own_class
from experiments.shared.mixtures import DOMAINS, READ, MixtureStudy, in_use, writing
from experiments.shared.model import build
from experiments.shared.probing import TOLERANCE
from experiments.shared.runs import ADAPTERS, Run, Runs
from experiments.shared.stage import main, result_path
from experiments.shared.summaries import accuracy_curve, over, summary_over_seeds

PLANTED = {"planted": "found", "planted_largest": "largest_found", "planted_words": "word_found"}
"""Name in the summary -> test of planted rows."""


def run(params: Params, key: str) -> None:
    """Read the routers of a mixture of experts, or make one and then read them; write one result."""
    source = params.registry[key]
    checkpoint = checkpoint_of(key, source)
    if not has_routers(checkpoint):
        upcycle(params, key)
        return
    tokenizer = tokenizer_of(checkpoint, source)
    weights = load_routers(checkpoint)
    result: dict[str, Any] = {"model": key, "kind": "mixture", "on_hub": isinstance(source, HubSource)}
    experts: Tensor | None = None
    # Asked before gigabytes of experts are fetched that could not be loaded.
    if "quantization_config" in checkpoint.json("config.json"):
        result["routing"], result["routing_not_run"] = None, "the experts are quantised"
    else:
        lm = load(key, params.registry)
        study = MixtureStudy(lm, params, NEUTRAL)
        result["routing"] = in_use(study, lm)
        result["written"], experts = writing(study, lm, weights.layers)
    result["projection"] = projection(weights, tokenizer, params, experts)
    result["bytes_read"], result["total_bytes"] = weights.bytes_read, weights.total_bytes
    result = plain(result)
    result["summary"] = mixtures_summary([result])
    (ADAPTERS / "moe_routers" / key).mkdir(parents=True, exist_ok=True)  # the pipeline wants it of every model
    write_result(result_path("moe_routers", key), result)


# --- Upcycling ---


def upcycle(params: Params, key: str) -> None:
    """Train experts apart, join them, train routers; the dense twin likewise; write one result."""
    settings = params.moe_routers
    with Runs("moe_routers", key, params, build) as runs:
        texts = runs.once("text", write_texts, params)["texts"]
        base = runs.once("base", measure_base, params, texts)
        # The twin's update takes as many steps as those of all experts together: beside them it keeps two workers busy.
        branches = runs.all(
            [
                Run(f"expert_{name}", branch, (params, texts, domains, runs.adapters))
                for name, domains in {"all": DOMAINS, **{of: (of,) for of in DOMAINS}}.items()
            ]
        )
        joint = runs.all(
            [
                Run(f"{kind}_{n}", train, (params, texts, n, runs.adapters))
                for kind, train in (("mixture", mixture), ("twin", twin))
                for n in settings.seeds
            ]
        )
        experts = {of: branches[f"expert_{of}"] for of in (*DOMAINS, "all")}
        mixtures, twins = ([joint[f"{kind}_{n}"] for n in settings.seeds] for kind in ("mixture", "twin"))
        lm, study = runs.study, MixtureStudy(runs.study, params, texts)
        shown = ("answers", *(f"losses.{d}" for d in DOMAINS), *(f"lens.{s}.at_depth" for s in READ),
                 *(f"probe.{s}.at_depth" for s in READ))  # fmt: skip
        sets = {
            "joined": [run["before"] for run in mixtures],
            "mixture": [run["after"] for run in mixtures],
            "twin": [run["after"] for run in twins],
        }
        result: dict[str, Any] = {
            "model": key,
            "kind": "upcycled",
            "layers": lm.layers,
            "depth_layer": lm.layers[study.row],
            "experts": list(DOMAINS),
            "base": _public(base),
            "branches": experts,
            "mixtures": [
                {**run, "before": _public(run["before"]), "after": _public(run["after"], tokens=run is mixtures[0])}
                for run in mixtures
            ],
            "twins": [{**run, "after": _public(run["after"])} for run in twins],
            "over_seeds": {name: summary_over_seeds(runs, shown) for name, runs in sets.items()},
            "mixture_minus_twin": {s: alignment_gap(study, sets["mixture"], sets["twin"], "lens", s) for s in READ},
            "mixture_minus_base": {s: alignment_gap(study, sets["mixture"], [base], "lens", s) for s in READ},
            "written_minus_twin": {s: alignment_gap(study, sets["mixture"], sets["twin"], "written", s) for s in READ},
        }
        result["summary"] = mixtures_summary([run["after"] for run in result["mixtures"]])
        runs.finish(result)


def write_texts(lm: LanguageModel, _: Path, params: Params) -> dict[str, Any]:
    """Text that the model writes itself."""
    settings, openings = params.moe_routers, [" ".join(sentence.split()[:3]) for sentence in NEUTRAL]
    texts = self_generated(
        lm, openings, settings.texts, new_tokens=settings.new_tokens, seed=settings.seed,
        description=f"texts written by {lm.key}",
    )  # fmt: skip
    return {"texts": texts}


def measure_base(lm: LanguageModel, _: Path, params: Params, texts: Sequence[str]) -> dict[str, Any]:
    """The dense model before anything is trained."""
    study = MixtureStudy(lm, params, texts)
    return measure_model(study, lm) | {"written": writing(study, lm, study.routed)[0]}


def branch(
    lm: LanguageModel, _: Path, params: Params, texts: Sequence[str], domains: Sequence[str], adapters: Path
) -> dict[str, Any]:
    """One expert, or with all domains the twin: low-rank updates of the MLPs, by the language-modelling loss.

    With n domains there are n times as many steps: the twin sees as much text as all experts together.
    """
    study, name = MixtureStudy(lm, params, texts), domains[0] if len(domains) == 1 else "all"
    settings = study.settings
    steps, rate = settings.expert_steps * len(domains), settings.expert_learning_rate
    curve = train_expert(
        lm, [study.train[domain] for domain in domains],
        Adapter(MLP, settings.rank, settings.scale, tuple(study.routed)),
        Schedule(steps, settings.batch_size, rate, settings.seed, settings.every), adapters / name,
        description=f"expert of {lm.key} for {name}",
    )  # fmt: skip
    branched = merge_adapter(lm, adapters / name)
    return {"curve": curve, "test_losses": {d: text_losses(branched, study.test[d]).mean() for d in DOMAINS}}


def mixture(
    lm: LanguageModel, _: Path, params: Params, texts: Sequence[str], seed: int, adapters: Path
) -> dict[str, Any]:
    """Join the experts under a fresh router, train it, and measure before and after."""
    study = MixtureStudy(lm, params, texts)
    model = join_experts(lm, [adapters / domain for domain in DOMAINS], top_k=study.settings.top_k, seed=seed)
    before = measure_mixture(study, model, None, {})
    curve = jointly(study, model, seed, f"mixture of {lm.key}: seed {seed}")
    save_file(trained_tensors(model), adapters / f"mixture-{seed}.safetensors")
    words, experts = writing(study, model, study.routed)
    after = measure_mixture(study, model, experts, {"written": words})
    return {"seed": seed, "curve": curve, "before": before, "after": after}


def twin(lm: LanguageModel, _: Path, params: Params, texts: Sequence[str], seed: int, adapters: Path) -> dict[str, Any]:
    """The dense model with all text in one update of its MLPs, and the same further steps on its norm gains."""
    study = MixtureStudy(lm, params, texts)
    model = merge_adapter(lm, adapters / "all")
    curve = jointly(study, model, seed, f"dense twin of {lm.key}: seed {seed}")
    save_file(trained_tensors(model), adapters / f"twin-{seed}.safetensors")
    after = measure_model(study, model) | {"written": writing(study, model, study.routed)[0]}
    return {"seed": seed, "curve": curve, "after": after}


def jointly(study: MixtureStudy, lm: LanguageModel, seed: int, text: str) -> list[dict[str, Any]]:
    """The joint phase on texts of all domains, as many of each in every batch."""
    settings = study.settings
    schedule = Schedule(settings.joint_steps, settings.batch_size, settings.learning_rate, seed, settings.every)
    joint = Joint(settings.router_learning_rate, settings.balance)
    return train_jointly(lm, [study.train[domain] for domain in DOMAINS], schedule, joint, description=text)


# --- Measures ---


def measure_mixture(
    study: MixtureStudy, lm: LanguageModel, experts: Tensor | None, more: Mapping[str, Any]
) -> dict[str, Any]:
    """All measures of a mixture: as of a dense model, routing in use, and rows of routers against the vocabulary.

    ``experts`` is what each writes, which goes against the vocabulary with the rows; ``more`` are further measures.
    """
    with tempfile.TemporaryDirectory() as folder:
        weights = load_routers(save_routers(lm, Path(folder)))
        rows = projection(weights, lm.tokenizer, study.params, experts, DOMAINS)
    return {**measure_model(study, lm), **more, "routing": in_use(study, lm, DOMAINS), "projection": rows}


def measure_model(study: MixtureStudy, lm: LanguageModel) -> dict[str, Any]:
    """Losses on held-out texts, answers, the lens and probes at the last prompt token; of dense models and mixtures."""
    now = answers(lm, study.prompts(), [f" {problem.answer}" for problem in study.problems.test])
    states = {style: residual_stream(lm, study.prompts(style)) for style in READ}
    return {
        "losses": {domain: study.mean(text_losses(lm, study.test[domain])) for domain in DOMAINS},
        "answers": study.share(now.exact, study.units()),
        "lens": {style: lens_of_operations(study, lm, states[style]) for style in READ},
        "probe": {style: probe_of_operations(study, states[style]) for style in READ},
    }


def lens_of_operations(study: MixtureStudy, lm: LanguageModel, states: Tensor) -> dict[str, Any]:
    """Alignment of the own operation word at every layer, and at the one chosen beforehand."""
    labels = torch.tensor(study.own)
    scores = lens_scores(states, lm.readout, [word.ids for word in study.words], ranked=[[own] for own in study.own])
    own = own_class(scores.log_alignment, labels).exp()
    peak = peak_row(own.mean(-1))
    return {
        "alignment": own.mean(-1),
        "at_depth": study.mean(own[study.row], study.frames),
        "peak": study.mean(own[peak], study.frames),
        "peak_layer": lm.layers[peak],
        "rank": scores.rank[..., 0].double().quantile(0.5, dim=-1),
        "choice": accuracy_curve(
            scores.log_alignment.argmax(-1) == labels, study.params.confidence, clusters=study.frames
        ),
        "by_prompt": own[study.row],
    }


def probe_of_operations(study: MixtureStudy, states: Tensor) -> dict[str, Any]:
    """Accuracy of probes on held-out operand pairs at every layer, and at the one chosen beforehand."""
    y, frames = torch.tensor(study.own), study.frames
    right = torch.zeros(states.shape[:2], dtype=torch.bool)
    for part in rotations(study.units(), study.settings.folds, seed=study.settings.seed):
        learn = np.concatenate([part.train, part.validation])  # no layer is chosen, so none is needed to choose on
        probes = fit_probes(states[:, learn], y[learn], standardise=True, tol=TOLERANCE)
        right[:, part.test] = probes.predict(states[:, part.test]) == y[part.test]
    curve = accuracy_curve(right, study.params.confidence, clusters=frames)
    return {**curve, "at_depth": study.share(right[study.row], frames)}


def alignment_gap(
    study: MixtureStudy, these: Sequence[Mapping[str, Any]], those: Sequence[Mapping[str, Any]], part: str, style: str
) -> dict[str, Any]:
    """Alignment of one set of models minus that of another at the layer chosen beforehand, seed by seed.

    Paired by prompt. The intervals are bootstraps over templates, of which the union over seeds is given.

    Args:
        study: Of both.
        these: Measures, one a seed.
        those: As many, or the one of a model that no seed changes.
        part: Where it is aligned: in the ``lens``, or in what MLPs have ``written``.
        style: Of the prompts.
    """
    a, b = (np.array([run[part][style]["by_prompt"] for run in runs]) for runs in (these, those))
    number = over([study.mean(row, study.frames) for row in a - b])
    return {"mean": number.pop("value"), **number}


def mixtures_summary(mixtures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the claims read: of the mixtures of all seeds, or of one that was not made here.

    Shares of experts that stand out at the false discovery rate, the smallest q of a word and an expert, and the share
    of planted rows, and of words planted in them, that is found, by their cosine (``at_50``: 0.5). Of mixtures that ran
    also how much of routing another context changes, how much the token alone decides (means over layers), what paths
    of experts tell, and words in what experts write; None if they did not.
    """
    rows = [mixture["projection"] for mixture in mixtures]
    contexts = [mixture["routing"]["context"] for mixture in mixtures if mixture["routing"]]
    change, decided = [], []
    for context in contexts:
        mean, (low, high), others = context["overall"], context["overall_interval"], np.mean(context["other_tokens"])
        change.append({"mean": mean, "interval": [low, high], "n": context["tokens"]})
        if others:
            ends = [float(1 - high / others), float(1 - low / others)]
            decided.append({"mean": float(1 - mean / others), "interval": ends, "n": context["tokens"]})
    unknown = dict.fromkeys(("value", "least", "largest", "interval", "n"))
    ran = [mixture for mixture in mixtures if mixture["routing"]]
    spoken = [row["written"] for row in rows if "written" in row]
    own = [np.min(each["own_words"]["q"]) for each in spoken if "own_words" in each]
    return {
        "experts": np.size(rows[0]["reported"]["q"]),
        "largest_cosine": over([row["reported"]["largest"] for row in rows]),
        **{
            f"{name}_found": over([row[name]["found"] / np.size(row[name]["q"]) for row in rows])
            for name in ("reported", "controlled", "coherence")
        },
        "words_smallest_q": over([min((word["q"] for word in row["words"]), default=1.0) for row in rows]),
        "context_change": over(change) if change else unknown,
        "decided_by_token": over(decided) if decided else unknown,
        **{
            name: {
                f"at_{round(100 * cosine)}": over([_entry(row["power"][test], i) for row in rows])
                for i, cosine in enumerate(rows[0]["power"]["cosine"])
            }
            for name, test in PLANTED.items()
        },
        "largest_found": over([row["largest"]["share"] for row in rows]),
        "written_found": over([each["controlled"]["share"] for each in spoken]) if spoken else unknown,
        "own_words_smallest_q": over(own) if own else unknown,
        "written": {
            style: {
                name: over([mixture["written"][style]["at_depth"][name] for mixture in ran]) if ran else unknown
                for name in ("alignment", "contrast_p")
            }
            for style in READ
        },
        "paths": {
            style: {
                name: over([mixture["routing"]["prompts"][style]["path"][name] for mixture in ran]) if ran else unknown
                for name in ("layer", "path", "beyond_layer", "beyond_token")
            }
            for style in READ
        },
    }


def _entry(curve: Mapping[str, Any], i: int) -> dict[str, Any]:
    """A number of a curve, with its interval."""
    return {"accuracy": curve["accuracy"][i], "interval": curve["interval"][i], "n": curve["n"]}


def _public(measured: Mapping[str, Any], *, tokens: bool = False) -> dict[str, Any]:
    """A measure without its values by prompt and, unless asked for, without the long lists of top tokens."""
    shown = {}
    for key, value in measured.items():
        if key != "by_prompt" and (tokens or not key.startswith("top_")):
            shown[key] = _public(value, tokens=tokens) if isinstance(value, dict) else value
    return shown


if __name__ == "__main__":
    main(run, __doc__)
