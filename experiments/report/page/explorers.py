"""What the page draws: for every combination of choices (model, protocol, layer, seed ...) the lines of one view.

An explorer only arranges numbers of results; what is a mean over seeds is drawn with the least and the largest of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from classifier_emergence.results import lookup
from classifier_emergence.tasks.arithmetic import OPERATIONS, STYLES
from experiments.report.names import NAMES, model_name, upcycled

Result = Mapping[str, Any]
Results = Mapping[str, Mapping[str, Result]]
"""Stage -> model -> result."""
Views = Iterator[tuple[tuple[str, ...], "View"]]
ALIGNMENT = "mean alignment"
ACCURACY = "accuracy"
ALL_SEEDS = "all: mean, least and largest"
CHANCE = 1 / len(OPERATIONS)


@dataclass(frozen=True)
class Line:
    """A curve, and what its band lies between."""

    name: str
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclass(frozen=True)
class View:
    """What is drawn for one combination of choices."""

    ticks: Sequence[str]
    """Names of the points."""
    unit: str
    """Of the vertical axis."""
    lines: Sequence[Line]
    log: bool = False
    at: Sequence[int] | None = None
    """Where the points lie, if not evenly."""
    lead: int = 0
    """The line at whose largest value reading starts."""


@dataclass(frozen=True)
class Explorer:
    """A figure with choices."""

    name: str
    title: str
    text: str
    along: str
    """What runs along the bottom."""
    choices: Sequence[str]
    """What one can choose, in order; the options of each may depend on those before it."""
    views: Callable[[Results], Views]

    def data(self, results: Results) -> dict[str, Any]:
        """As the page's script reads it; numbers have four significant digits."""
        views = {"|".join(key): view for key, view in self.views(results)}
        return {
            "name": self.name,
            "along": self.along,
            "choices": self.choices,
            "views": {key: _packed(view) for key, view in views.items()},
        }


def _packed(view: View) -> dict[str, Any]:
    lines = [
        {"name": line.name, **{key: _short(ys) for key, ys in (("y", line.y), ("l", line.low), ("h", line.high)) if ys}}
        for line in view.lines
    ]
    at = {} if view.at is None else {"at": list(view.at)}
    return {"ticks": list(view.ticks), "unit": view.unit, "log": view.log, "lines": lines, "lead": view.lead, **at}


def _short(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None else float(f"{value:.4g}") for value in values]


def measured(name: str, y: Sequence[float], interval: Any) -> Line:
    """A line with the intervals (n, 2) of its points."""
    low, high = np.transpose(interval).tolist()
    return Line(name, y, low, high)


def seeds(name: str, curves: Sequence[Sequence[float]], chosen: int | None) -> Line:
    """Of curves of several seeds the chosen one; or their mean, with the least and the largest around it."""
    values = np.array(curves, dtype=float)
    if chosen is not None or len(values) == 1:
        return Line(name, values[chosen or 0].tolist())
    return Line(name, values.mean(0).tolist(), values.min(0).tolist(), values.max(0).tolist())


def seed_choices(n: int) -> list[tuple[str, int | None]]:
    """What one can choose where a training ran n times."""
    each: list[tuple[str, int | None]] = [(f"run {i + 1}", i) for i in range(n)]
    return [(ALL_SEEDS, None), *each] if n > 1 else each


def level(name: str, value: float, n: int) -> Line:
    """A line that is the same everywhere."""
    return Line(name, [value] * n)


# --- Models as they are published ---


def _probes(results: Results) -> Views:
    for model, result in results["probing"].items():
        named = model_name(model)
        for style in STYLES:
            for protocol, found in _protocols(result, style):
                yield (named, f"arithmetic, {style}", protocol), _probe(result["layers"], found, CHANCE)
        other = results["other_tasks"].get(model, {})
        for task, part in product(NAMES["other_tasks"] if other else (), NAMES["held_out"]):
            found = other[task]["probing"][part]
            view = _probe(other["layers"], found, 1 / len(other[task]["classes"]))
            yield (named, task, f"controlled, {part.replace('_', ' ')}"), view


def _protocols(result: Result, style: str) -> list[tuple[str, Result]]:
    parts = [(f"controlled, {part.replace('_', ' ')}", result["controlled"][style].get(part))
             for part in ("held_out_operands", "held_out_templates")]  # fmt: skip
    parts += [("as reported", result["reported"].get(style))]
    parts += [(f"flaw: {flaw.replace('_', ' ')}", found.get(style)) for flaw, found in result["flaws"].items()]
    return [(name, found) for name, found in parts if found and "accuracy" in found]


def _probe(layers: Sequence[str], found: Result, chance: float) -> View:
    lines = [measured("probe", found["accuracy"], found["interval"])]
    if "shuffled_accuracy" in found and isinstance(found["shuffled_accuracy"], list):
        lines.append(Line("probe of shuffled labels", found["shuffled_accuracy"]))
    if "bag_of_tokens" in found:
        lines.append(level("counts of tokens", found["bag_of_tokens"]["accuracy"], len(layers)))
    return View(layers, ACCURACY, [*lines, level("chance", chance, len(layers))])


def _lens(results: Results) -> Views:
    for model, result in results["logit_lens"].items():
        for style in STYLES:
            for measure, view in _readings(result["layers"], result["controlled"][style]):
                yield (model_name(model), style, measure), view


def _readings(layers: Sequence[str], found: Result) -> list[tuple[str, View]]:
    word, null = found["word"], found["word"]["null"]
    others = [(name, found[name]) for name in ("synonyms", "symbols")]

    def each(key: str, own: Line) -> list[Line]:
        return [own, *(Line(name, lookup(other, key)) for name, other in others)]

    operations = [Line(name, curve) for name, curve in word["by_operation"].items()]
    aligned = each("alignment", measured("operation word", word["alignment"], word["interval"]))
    nulls = (("max", "largest"), ("95", "95 %"), ("median", "median"))
    aligned += [Line(f"null words, {name}", null[f"alignment_{key}"]) for key, name in nulls]
    choice = measured("operation word", word["choice"]["accuracy"], word["choice"]["interval"])
    chosen = [*each("choice.accuracy", choice), level("chance", CHANCE, len(layers))]
    contrast = each("log_contrast", Line("operation word", word["log_contrast"]))
    contrast.append(Line("null words, 95 %", null["log_contrast_95"]))
    return [
        (ALIGNMENT, View(layers, ALIGNMENT, aligned, log=True)),
        ("alignment by operation", View(layers, ALIGNMENT, operations, log=True)),
        ("choice among the words", View(layers, ACCURACY, chosen)),
        ("contrast", View(layers, "contrast, nats", contrast)),
        ("rank", View(layers, "median rank", each("rank", Line("operation word", word["rank"])), log=True)),
    ]


# --- Training ---


def _depth(results: Results) -> Views:
    """Alignment over layers, before, during and after every kind of training."""
    for model, found in results["dual_reward_long"].items():
        yield from _watched(model, "dual reward", found["layers"], found["main"]["watched"])
    for model, found in results["lora_sft"].items():
        watched = [[{**entry["symbol"], "step": entry["step"]} for entry in run["watched"]] for run in found["by_seed"]]
        yield from _watched(model, "answers alone (LoRA)", found["layers"], watched, log=True)
    for model, found in results["cot_alignment"].items():
        before = found["before"]["alignment"]["by_layer"]["mean"]
        after = {f"trained on {name}": [run["alignment"]["by_layer"]["mean"] for run in found[key]["by_seed"]]
                 for key, name in NAMES["training_formats"].items() if key != "before"}  # fmt: skip
        yield from _compared(model, "word before the answer", found["layers"], before, after)
    for model, found in results["grpo"].items():
        before = found["before"]["alignment"]["alignment"]
        for arm, name in NAMES["grpo_arms"].items():
            runs = [run["alignment"] for run in found["arms"][arm]["runs"]]
            null = np.max([run["null"]["alignment_max"] for run in runs], axis=0).tolist()
            after = {"after GRPO": [run["alignment"] for run in runs], "largest null word, after": [null] * len(runs)}
            yield from _compared(model, f"GRPO, {name}", found["layers"], before, after)
    for model, found in upcycled(results["moe_routers"]).items():
        parts = {
            "fresh routers": ("mixtures", "before"),
            "mixture": ("mixtures", "after"),
            "dense twin": ("twins", "after"),
        }
        for style in ("symbol", "word"):
            after = {name: [run[when]["lens"][style]["alignment"] for run in found[runs]]
                     for name, (runs, when) in parts.items()}  # fmt: skip
            before = found["base"]["lens"][style]["alignment"]
            yield from _compared(model, f"mixture of experts, {style} prompts", found["layers"], before, after)


def _watched(model: str, name: str, layers: Sequence[str], runs: Any, *, log: bool = False) -> Views:
    """One line for each of a few steps at which all runs were watched."""
    at = np.unique(np.linspace(0, len(runs[0]) - 1, 6).round().astype(int)).tolist()
    for seed, i in seed_choices(len(runs)):
        lines = [seeds(f"step {runs[0][k]['step']}", [run[k]["by_layer"] for run in runs], i) for k in at]
        yield (model_name(model), name, seed), View(layers, ALIGNMENT, lines, log=log, lead=-1)


def _compared(model: str, name: str, layers: Sequence[str], before: Any, after: Mapping[str, Any]) -> Views:
    """The model before, beside what each of several trainings (name -> curves of its runs) makes of it."""
    for seed, i in seed_choices(len(next(iter(after.values())))):
        lines = [Line("before training", before), *(seeds(each, curves, i) for each, curves in after.items())]
        yield (model_name(model), name, seed), View(layers, ALIGNMENT, lines, log=True, lead=1)


def _steps(results: Results) -> Views:
    """Alignment over steps at one layer."""
    for stage, name in (("dual_reward_long", "dual reward"), ("lora_sft", "answers alone (LoRA)")):
        for model, found in results[stage].items():
            dual = stage == "dual_reward_long"
            runs = found["main"]["watched"] if dual else [run["watched"] for run in found["by_seed"]]
            curves = np.array([[(e if dual else e["symbol"])["by_layer"] for e in run] for run in runs])
            steps = [entry["step"] for entry in runs[0]]
            # The layer that is trained first: it is what one looks for.
            first = found["layers"].index(found.get("layer", found["layers"][-1]))
            for row in (first, *(row for row in range(len(found["layers"])) if row != first)):
                for seed, i in seed_choices(len(runs)):
                    line = seeds("operation word", curves[:, :, row].tolist(), i)
                    view = View([f"step {step}" for step in steps], ALIGNMENT, [line], log=not dual, at=steps)
                    yield (model_name(model), name, found["layers"][row], seed), view


CURVES = {"reward": "reward", "kl": "KL, nats", "entropy": "entropy, nats", "zero_variance": "equal groups",
          "class_loss": "loss on the lens, nats"}  # fmt: skip


def _rewarded(results: Results) -> Views:
    """Curves of reinforcement learning, alone and with a loss on the lens."""
    for stage, names in (("grpo", {key: f"GRPO, {name}" for key, name in NAMES["grpo_arms"].items()}),
                         ("collapse", _collapse_names())):  # fmt: skip
        for model, found in results[stage].items():
            arms = found["arms"]
            for arm in [*(arm for arm in names if arm in arms), *(arm for arm in arms if arm not in names)]:
                for seed, i in seed_choices(len(arms[arm]["runs"])):
                    chosen = arms[arm]["runs"] if i is None else [arms[arm]["runs"][i]]
                    for measure, view in _curves(chosen, found.get("classes", [])):
                        yield (model_name(model), names.get(arm, arm.replace("_", " ")), measure, seed), view


def _collapse_names() -> dict[str, str]:
    causes = product(*(kind.items() for kind in NAMES["collapse_levels"].values()))
    return {
        **{key: ", ".join(name) for key, name in NAMES["collapse_factorial"].items()},
        **{key: f"as reported: {name}" for key, name in NAMES["collapse_attempts"].items()},
        **{"_".join(key for key, _ in levels): f"causes: {', '.join(name for _, name in levels)}" for levels in causes},
    }


def _curves(runs: Sequence[Result], classes: Sequence[str]) -> list[tuple[str, View]]:
    """What is drawn of runs, as far as all of them go: some end when they have reached what they are for."""
    steps, drawn = _together([run["steps"] for run in runs]), []
    for key, unit in CURVES.items():
        if all(entry.get(key) is not None for run in steps for entry in run):
            line = seeds(key.replace("_", " "), [[entry[key] for entry in run] for run in steps], None)
            drawn.append((unit, _stepwise(steps[0], unit, [line])))
    if classes:
        watched = _together([run["watched"] for run in runs])
        lines = [seeds(each, [[entry["shares"][each] for entry in run] for run in watched], None) for each in classes]
        drawn.append(("class that the lens gives", _stepwise(watched[0], "share of prompts", lines)))
    return drawn


def _together(runs: Sequence[Sequence[Result]]) -> list[Sequence[Result]]:
    shortest = min(map(len, runs))
    return [run[:shortest] for run in runs]


def _stepwise(entries: Sequence[Result], unit: str, lines: Sequence[Line]) -> View:
    steps = [entry["step"] for entry in entries]
    return View([f"step {step}" for step in steps], unit, lines, at=steps)


ROUTING = {
    "what the text's domain tells": ("part of the domain told", "domain.share"),
    "own expert, symbol prompts": ("share", "prompts.symbol.own_share"),
    "own expert, word prompts": ("share", "prompts.word.own_share"),
    "changed by context": ("share of experts", "context.change"),
}


def _routing(results: Results) -> Views:
    for model, found in upcycled(results["moe_routers"]).items():
        runs = found["mixtures"]
        for seed, i in seed_choices(len(runs)):
            for measure, (unit, key) in ROUTING.items():
                lines = [seeds(name, [lookup(run[when]["routing"], key) for run in runs], i)
                         for when, name in NAMES["routers"].items()]  # fmt: skip
                layers = runs[0]["after"]["routing"]["layers"]
                yield (model_name(model), measure, seed), View(layers, unit, lines, lead=-1)


EXPLORERS = (
    Explorer(
        "probes", "Is the class encoded?",
        "Accuracy of linear probes over layers: with operands or templates held out, as the write-ups measured it, and "
        "with one of their flaws switched on.",
        "layer", ("Model", "Prompts", "Protocol"), _probes,
    ),
    Explorer(
        "lens", "Is it in the vocabulary?",
        "What the logit lens gives the operation word over layers, beside synonyms, symbols, and other words of the "
        "same unembedding norm (the null).",
        "layer", ("Model", "Prompts", "Measure"), _lens,
    ),
    Explorer(
        "depth", "Which training puts it there?",
        "Alignment of the operation word over layers, before, during and after every kind of training.",
        "layer", ("Model", "Training", "Seed"), _depth,
    ),
    Explorer(
        "steps", "When does it come?",
        "Alignment of the operation word over the steps of training, at one layer.",
        "step", ("Model", "Training", "Layer", "Seed"), _steps,
    ),
    Explorer(
        "rewarded", "What does reinforcement learning do, and what collapses?",
        "Curves of reinforcement learning alone, and with a loss on the lens: reward, divergence, entropy, and the "
        "class that the lens gives to held-out problems.",
        "step", ("Model", "Configuration", "Measure", "Seed"), _rewarded,
    ),
    Explorer(
        "routing", "Do routers say it?",
        "A dense model made into a mixture of experts: what its routers go by, before and after they were trained.",
        "layer", ("Model", "Measure", "Seed"), _routing,
    ),
)  # fmt: skip
"""In the order of the paper's questions."""


def prompts(results: Results) -> list[dict[str, Any]]:
    """The write-ups' prompts as a map of each model: layers down, prompts across, top token and alignment in a cell."""
    return [
        {
            "model": model_name(model),
            "layers": result["layers"],
            "read": result["reported"]["layer"],
            "prompts": [entry["prompt"] for entry in result["reported"]["prompts"]],
            "operations": [entry["operation"] for entry in result["reported"]["prompts"]],
            "tokens": result["reported"]["top_tokens"],
            "alignment": [_short(row) for row in result["reported"]["alignment"]],
            "strict": [_short(row) for row in result["reported"]["strict_probability"]],
        }
        for model, result in results["logit_lens"].items()
    ]
