"""Tables of supervised training: the dual reward, plain fine-tuning and chains of thought."""

from collections.abc import Iterator, Mapping
from typing import Any

from classifier_emergence.numbers import number, percent, small_share
from experiments.report.names import DUAL_REWARD_ARMS, DUAL_REWARD_FLAWS, FORMATS, arm_name
from experiments.report.tables.cells import NOTHING, decimals, distinct, share, times_seeds, value
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
    yield [arm_name("vo"), number(steps["main"]), number(main["parameters"]), *_made(main), *_cost(main), half]
    further = [key for key in result["arms"] if key not in (*DUAL_REWARD_ARMS, *DUAL_REWARD_FLAWS)]
    for key in (*DUAL_REWARD_ARMS, *further):
        arm = result["arms"][key]
        yield [
            arm_name(key), number(steps["arms"]) + times_seeds(arm), number(arm["parameters"]), *_made(arm),
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
    shown = [NOTHING if step is None else number(step) for step in steps]
    return ", ".join(shown) if len(set(shown)) > 1 else shown[0]


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
    for key, name in {"vo": "none", **DUAL_REWARD_FLAWS}.items():
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
    scored = {key: {"value": before["reported"][key]} for key in ("score", "control")}
    yield [*looked_at(0, {**before, "reported": scored}, [before["symbol"]["peak_layer"]]), *ends(before)]
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
    for key, name in FORMATS.items():
        found = result[key]
        words, score = found["alignment"], found["reported"]["score"]
        layers = distinct(run["alignment"]["inner_peak_layer"] for run in found.get("by_seed", [found]))
        yield [
            name, percent(value(found["reported"]["answers"])),
            percent(score if key == "before" else value(score), 2), share(found["answers"]["exact"]),
            percent(value(found["writes_word"])), small_share(value(words["at_classifier"])),
            f"{small_share(value(words['inner_peak']))} at {layers}", small_share(value(words["last"])),
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
        yield [FORMATS[key], *(percent(value(item)) for item in shares)]
