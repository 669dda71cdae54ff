"""Tables of supervised training: the dual reward, plain fine-tuning, chains of thought, and other tasks."""

from collections.abc import Iterator, Mapping
from typing import Any

from classifier_emergence.numbers import number, percent, small_share
from classifier_emergence.reading.layers import layer_row
from experiments.report import names
from experiments.report.tables.cells import (
    NOTHING,
    decimals,
    distinct,
    known,
    share,
    small_interval,
    times_seeds,
    value,
)
from experiments.report.tables.table import Result, Rows, table


@table("dual_reward", "Layer | `Prompt` | `Before` | Own word | `After` | Top | Own word after")
def dual_reward_reported(result: Result) -> Rows:
    """Dual reward under the reported protocol: the lens at one layer, before and after training."""
    pairs = (result[when]["reported"]["prompts"] for when in ("before", "main"))
    for old, new in zip(*pairs, strict=True):
        yield [
            result["layer"], old["prompt"], old["top_token"], small_share(old["own_probability"]), new["top_token"],
            percent(new["top_probability"]), percent(new["own_probability"]),
        ]  # fmt: skip


@table("dual_reward", "Arm | Steps | Parameters | Symbols | Words | Alignment | Answers | Change | KL | Half at")
def dual_reward_arms(result: Result) -> Rows:
    """Dual-reward training and its controls."""
    yield ["before training", number(0), NOTHING, *_made(result["before"]), *[NOTHING] * 3]
    main, steps = result["main"], result["steps"]
    half = _first_steps([main["first_step_above_threshold"]])
    yield [names.arm_name("vo"), number(steps["main"]), number(main["parameters"]), *_made(main), *_cost(main), half]
    further = [key for key in result["arms"] if key not in (*names.DUAL_REWARD_ARMS, *names.DUAL_REWARD_FLAWS)]
    for key in (*names.DUAL_REWARD_ARMS, *further):
        arm = result["arms"][key]
        yield [
            names.arm_name(key), number(steps["arms"]) + times_seeds(arm), number(arm["parameters"]), *_made(arm),
            *_cost(arm), _first_steps(arm["first_step_above_threshold"]),
        ]  # fmt: skip


def _made(found: Mapping[str, Any]) -> Iterator[str]:
    """Top tokens on symbols and on words, alignment and answers."""
    yield share(found["symbol"]["top"])
    yield percent(value(found["word"]["top"]))
    yield small_share(value(found["symbol"]["alignment"]))
    yield share(found["answers"]["exact"])


def _cost(found: Mapping[str, Any]) -> Iterator[str]:
    """Change of the answers' log-probability, and divergence on plain text."""
    yield number(value(found["answers"]["change"]), 2)
    yield number(value(found["kl"]), 2)


def _first_steps(steps: list[int | None]) -> str:
    """The first step above the threshold for each seed, once if they agree; a dash where it was never reached."""
    return ", ".join(map(known, steps if len(set(steps)) > 1 else steps[:1]))


@table("dual_reward_long", "Seeds | Symbols | Words | Stories | Alignment | Answers | Change | KL | Half at")
def dual_reward_long(result: Result) -> Rows:
    """Dual reward at full length, over seeds."""
    main = result["main"]
    yield [
        number(main["seeds"]), *(share(main[style]["top"]) for style in ("symbol", "word", "story")),
        percent(value(main["symbol"]["alignment"])), share(main["answers"]["exact"]), *_cost(main),
        _first_steps(main["first_step_above_threshold"]),
    ]  # fmt: skip


@table("dual_reward_long", "Training | Without the words | Without random ones | Difference | Interval")
def dual_reward_reading(result: Result) -> Rows:
    """Change of the answers' log-probability, in nats, when directions are removed at the classifier layer."""
    for when, found in (("before", result["reading_before"]), ("after", result["main"]["reading"])):
        changes = (number(value(found[key]), 3) for key in ("words", "random", "difference"))
        yield [when, *changes, decimals(found["difference"]["interval"])]


@table("dual_reward", "Flaw | Eight prompts | Symbols | Answer loss in training | Exact answers")
def dual_reward_flaws(result: Result) -> Rows:
    """Flaws of the originals, switched on one by one."""
    for key, name in {"vo": "none", **names.DUAL_REWARD_FLAWS}.items():
        arm = result["arms"][key]
        yield [
            name, percent(value(arm["reported"]["top"])), share(arm["symbol"]["top"]),
            number(arm["final_losses"][0]["answer_loss"], 4), share(arm["answers"]["exact"]),
        ]  # fmt: skip
    for key, name in (("lone_space", "read at a lone space"), ("without_o", "reloaded without O")):
        yield [f"{name} (main)", percent(value(result["main"][key]["top"])), *[NOTHING] * 3]


@table("lora_sft", "Steps | Score | Other signs | Alignment | Largest at | Words | Exact answers")
def lora_sft(result: Result) -> Rows:
    """Plain LoRA fine-tuning."""

    def looked_at(step: int, found: Mapping[str, Any], peak_layers: list[str]) -> list[str]:
        scores = (percent(value(found["reported"][key]), 2) for key in ("score", "control"))
        return [number(step), *scores, small_share(value(found["symbol"]["peak"])), distinct(peak_layers)]

    def ends(found: Mapping[str, Any]) -> list[str]:
        return [small_share(value(found["word"]["peak"])), share(found["answers"]["exact"])]

    before, final = result["before"], result["final"]
    yield [*looked_at(0, before, [before["symbol"]["peak_layer"]]), *ends(before)]
    *_, last = result["by_step"]
    for entry in result["by_step"][1:-1]:
        yield [*looked_at(entry["step"], entry, entry["peak_layers"]), NOTHING, NOTHING]
    peaks = [seed["final"]["symbol"]["peak_layer"] for seed in result["by_seed"]]
    yield [*looked_at(last["step"], final, peaks), *ends(final)]


@table(
    "cot_alignment",
    "Trained on | Nine prompts | Score | Exact answers | Writes the word | At the layer | Largest inner | Last layer",
)
def cot_alignment(result: Result) -> Rows:
    """Fine-tuning on answers, and on a word before the answer."""
    for key, name in names.FORMATS.items():
        found = result[key]
        words, reported = found["alignment"], found["reported"]
        layers = distinct(run["alignment"]["inner_peak_layer"] for run in found.get("by_seed", [found]))
        yield [
            name, percent(value(reported["answers"])), percent(value(reported["score"]), 2),
            share(found["answers"]["exact"]), percent(value(found["writes_word"])),
            small_share(value(words["at_classifier"])), f"{small_share(value(words['inner_peak']))} at {layers}",
            small_share(value(words["last"])),
        ]  # fmt: skip


@table(
    "cot_alignment",
    "Trained on | Nine prompts | Reloaded | Exact answers | Reloaded: exact | Word on top, last layer "
    "| After a lone space",
)
def cot_flaws(result: Result) -> Rows:
    """The same adapters with two flaws of the originals."""
    for key in ("direct", "chain_of_thought"):
        found = result[key]
        reloaded, lone_space = found["flaws"]["reloaded_q_and_v"], found["flaws"]["lone_space"]
        shares = (
            found["reported"]["answers"], reloaded["reported"]["answers"], found["answers"]["exact"],
            reloaded["exact"], found["alignment"]["last_top"], lone_space["last_top"],
        )  # fmt: skip
        yield [names.FORMATS[key], *(percent(value(item)) for item in shares)]


@table(
    "other_tasks",
    "Task | Held out | emb | L0 | Chosen layer | Shuffled | Token counts | Chosen",
    n=f"{names.OTHER_TASKS[0]}.probing.held_out_groups.n",
)
def other_tasks_probes(result: Result) -> Rows:
    """Probes on other tasks, n = {n} in every cell."""
    for task in names.OTHER_TASKS:
        for part, name in names.HELD_OUT.items():
            found = result[task]["probing"][part]
            accuracy, chosen = found["accuracy"], found["selected"]
            yield [
                task, name, percent(accuracy[0]), percent(accuracy[layer_row(0)]), share(chosen),
                percent(chosen["shuffled_accuracy"]), share(found["bag_of_tokens"]), ", ".join(chosen["layers"]),
            ]  # fmt: skip


@table("other_tasks", "Task | Layer | Alignment | Interval | Median rank | Null 95 % | p | Contrast p | Choice")
def other_tasks_lens(result: Result) -> Rows:
    """Alignment of the prompt's own class word before training, against words matched in unembedding norm."""
    for task in names.OTHER_TASKS:
        found, largest = result[task]["lens"], result[task]["lens"]["largest"]
        row = result["layers"].index(result["layer"])
        there = {"null_95": found["null"]["alignment_95"][row], "p": found["null"]["p"][row]}
        yield [task, result["layer"], *_lens_cells(found, row, there)]
        row = result["layers"].index(largest["layer"])
        # Of the largest over layers; so is its null.
        yield [task, f"{largest['layer']} (largest)", *_lens_cells(found, row, largest)]


def _lens_cells(found: Mapping[str, Any], row: int, null: Mapping[str, Any]) -> list[str]:
    return [
        small_share(found["alignment"]["mean"][row]), small_interval(found["alignment"]["interval"][row]),
        number(found["rank"][row], 0), small_share(null["null_95"]), number(null["p"], 3),
        number(found["null"]["contrast_p"][row], 3), percent(found["choice"]["accuracy"][row]),
    ]  # fmt: skip


@table("other_tasks", "Task | Arm | Held out | Top token | Choice | Alignment | Exact answers | Change")
def other_tasks_training(result: Result) -> Rows:
    """Dual-reward training on other tasks and its controls."""
    for task in names.OTHER_TASKS:
        for key, name in names.OTHER_TASKS_ARMS.items():
            arm = result[task][key]
            for part, held_out in names.HELD_OUT.items():
                found = arm[part]
                yield [
                    task, name + times_seeds(arm), held_out, share(found["top"]), share(found["choice"]),
                    small_share(value(found["alignment"])), share(found["answers_exact"]),
                    NOTHING if key == "before" else number(value(found["answers_change"]), 2),
                ]  # fmt: skip
