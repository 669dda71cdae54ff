"""Tables of supervised training: the dual reward, plain fine-tuning, chains of thought, and other tasks."""

from classifier_emergence.numbers import number, percent, small_share
from classifier_emergence.reading.layers import layer_row
from experiments.report.names import NAMES, arm_name
from experiments.report.tables.cells import NOTHING, cells, distinct, known, times_seeds, value
from experiments.report.tables.table import Result, Rows, table

MADE = "symbol.top:share | word.top:percent | symbol.alignment:small | answers.exact:share"
COST = "answers.change:2 | kl:2"
"""What the dual reward makes, and what it costs: the answers' log-probability, and divergence on plain text."""


@table("dual_reward", "Layer | `Prompt` | `Before` | Own word | `After` | Top | Own word after")
def dual_reward_reported(result: Result) -> Rows:
    """Dual reward under the reported protocol: the lens at one layer, before and after training."""
    for old, new in zip(*(result[when]["reported"]["prompts"] for when in ("before", "main")), strict=True):
        after = cells(new, "top_token | top_probability:percent | own_probability:percent")
        yield [result["layer"], *cells(old, "prompt | top_token | own_probability:small"), *after]


@table("dual_reward", "Arm | Steps | Parameters | Symbols | Words | Alignment | Answers | Change | KL | Half at")
def dual_reward_arms(result: Result) -> Rows:
    """Dual-reward training and its controls."""
    yield ["before training", 0, NOTHING, *cells(result["before"], MADE), *[NOTHING] * 3]
    main, steps, arms = result["main"], result["steps"], NAMES["dual_reward_arms"]
    half = _first_steps([main["first_step_above_threshold"]])
    yield [arm_name("vo"), steps["main"], *cells(main, f"parameters | {MADE} | {COST}"), half]
    made = result["arms"]
    for key in (
        *(key for key in arms if key in made),
        *(k for k in made if k not in arms | NAMES["dual_reward_flaws"]),
    ):
        arm = made[key]
        half = _first_steps(arm["first_step_above_threshold"])
        yield [
            arm_name(key),
            number(steps["arms"]) + times_seeds(arm),
            *cells(arm, f"parameters | {MADE} | {COST}"),
            half,
        ]


def _first_steps(steps: list[int | None]) -> str:
    """The first step above the threshold for each seed, once if they agree; a dash where it was never reached."""
    return ", ".join(map(known, steps if len(set(steps)) > 1 else steps[:1]))


@table("dual_reward_long", "Seeds | Symbols | Words | Stories | Alignment | Answers | Change | KL | Half at")
def dual_reward_long(result: Result) -> Rows:
    """Dual reward at full length, over seeds."""
    tops = "symbol.top:share | word.top:share | story.top:share | symbol.alignment:percent"
    half = _first_steps(result["main"]["first_step_above_threshold"])
    yield [*cells(result["main"], f"seeds | {tops} | answers.exact:share | {COST}"), half]


@table("dual_reward_long", "Training | Without the words | Without random ones | Difference | Interval")
def dual_reward_reading(result: Result) -> Rows:
    """Change of the answers' log-probability, in nats, when directions are removed at the classifier layer."""
    for when, found in (("before", result["reading_before"]), ("after", result["main"]["reading"])):
        yield [when, *cells(found, "words:3 | random:3 | difference:3 | difference.interval:3")]


@table("dual_reward_long", "Steps on | Symbols | Alignment | Answers | Change | Dual reward minus it")
def dual_reward_equal_steps(result: Result) -> Rows:
    """Answers alone, and Q and K, for as many steps as the dual reward, and what that makes more.

    More log-probability of the answers, or more prompts with the word on top; paired by problem.
    """
    against = {"answer_only": "answer_only.log_prob", "qk": "qk.top"}
    for key, path in against.items():
        shown = cells(result["arms"][key], "symbol.top:share | symbol.alignment:percent | answers.exact:share")
        change = cells(result["arms"][key], "answers.change:3")
        yield [arm_name(key), *shown, *change, *cells(result["contrasts"], f"{path}:3")]


@table("dual_reward_long", "Training | Followed before | Interchanged | At random | Difference | Interval")
def interchange(result: Result) -> Rows:
    """Share of products and sums whose more probable answer is the other operation's.

    With the words as they are, with "multiply" and "add" interchanged, and with as much added along random directions.
    """
    for when, found in (("before", result["reading_before"]), ("after", result["main"]["reading"])):
        shown = "before:percent | words:percent | random:percent | difference:3 | difference.interval:3"
        yield [when, *cells(found["interchange"]["followed"], shown)]


@table("sample_efficiency", "Problems | Rate | Symbols | Words | Stories | Alignment")
def sample_efficiency(result: Result) -> Rows:
    """Dual reward on few distinct problems, {steps} steps at several learning rates: on held-out operands."""
    for cell in sorted(result["cells"].values(), key=lambda cell: (cell["problems"], cell["learning_rate"])):
        tops = "symbol.top:share | word.top:share | story.top:share | symbol.alignment:percent"
        yield [cell["problems"], number(cell["learning_rate"]), *cells(cell, tops)]


@table(
    "tuning",
    "Variant | Right replies | Probe, symbols | Probe, words | Class loss | Steps to half | Alignment | Exact answers",
)
def tuning(result: Result) -> Rows:
    """A base model, tuned on conversations, and tuned on the same words in another order; then dual reward on each."""
    shown = (
        "follows.right:share | probes.symbol.at_depth:percent | probes.word.at_depth:percent"
        " | reward.class_loss_before:2 | reward.steps_to_half:1 | reward.symbol_alignment:percent"
        " | reward.answers_exact:share"
    )
    for kind, name in NAMES["tuning"].items():
        yield [name, *cells(result["models"][kind], shown)]


@table("dual_reward", "Flaw | Eight prompts | Symbols | Answer loss in training | Exact answers")
def dual_reward_flaws(result: Result) -> Rows:
    """Flaws of the originals, switched on one by one."""
    shown = "reported.top:percent | symbol.top:share | final_losses.0.answer_loss:4 | answers.exact:share"
    switched = {"vo": "none", **NAMES["dual_reward_flaws"]}
    for key, name in ((key, name) for key, name in switched.items() if key in result["arms"]):
        yield [name, *cells(result["arms"][key], shown)]
    for key, name in (("lone_space", "read at a lone space"), ("without_o", "reloaded without O")):
        yield [f"{name} (main)", percent(value(result["main"][key]["top"])), *[NOTHING] * 3]


@table("lora_sft", "Steps | Score | Other signs | Alignment | Largest at | Words | Exact answers")
def lora_sft(result: Result) -> Rows:
    """Plain LoRA fine-tuning."""
    before, final, (_, *between, last) = result["before"], result["final"], result["by_step"]
    peaks = [seed["final"]["symbol"]["peak_layer"] for seed in result["by_seed"]]
    looked_at = [(0, before, [before["symbol"]["peak_layer"]])]
    looked_at += [(entry["step"], entry, entry["peak_layers"]) for entry in between]
    for step, found, layers in [*looked_at, (last["step"], final, peaks)]:
        scores = [percent(value(found["reported"][key]), 2) for key in ("score", "control")]
        ends = cells(found, "word.peak:small | answers.exact:share") if "answers" in found else [NOTHING, NOTHING]
        yield [step, *scores, small_share(value(found["symbol"]["peak"])), distinct(layers), *ends]


@table(
    "cot_alignment",
    "Trained on | Nine prompts | Score | Exact answers | Writes the word | At the layer | Largest inner | Last layer",
)
def cot_alignment(result: Result) -> Rows:
    """Fine-tuning on answers, and on a word before the answer."""
    for key, name in NAMES["training_formats"].items():
        found, words = result[key], result[key]["alignment"]
        layers = distinct(run["alignment"]["inner_peak_layer"] for run in found.get("by_seed", [found]))
        yield [
            name, percent(value(found["reported"]["answers"])), percent(value(found["reported"]["score"]), 2),
            *cells(found, "answers.exact:share | writes_word:percent | alignment.at_classifier:small"),
            f"{small_share(value(words['inner_peak']))} at {layers}", small_share(value(words["last"])),
        ]  # fmt: skip


@table(
    "cot_alignment",
    "Trained on | Nine prompts | Reloaded | Exact answers | Reloaded: exact | Word on top, last layer "
    "| After a lone space",
)
def cot_flaws(result: Result) -> Rows:
    """The same adapters with two flaws of the originals."""
    reloaded = "flaws.reloaded_q_and_v"
    keys = ("reported.answers", f"{reloaded}.reported.answers", "answers.exact", f"{reloaded}.exact")
    shown = " | ".join(f"{key}:percent" for key in (*keys, "alignment.last_top", "flaws.lone_space.last_top"))
    for key in ("direct", "chain_of_thought"):
        yield [NAMES["training_formats"][key], *cells(result[key], shown)]


@table("other_tasks", "Task | Held out | emb | L0 | Chosen layer | Shuffled | Token counts | Chosen")
def other_tasks_probes(result: Result) -> Rows:
    """Probes on other tasks, n = {comparison.probing.held_out_groups.n} in every cell."""
    shown = (
        f"accuracy.0:percent | accuracy.{layer_row(0)}:percent | selected:share | selected.shuffled_accuracy:percent"
    )
    for task in NAMES["other_tasks"]:
        for part, name in NAMES["held_out"].items():
            found = result[task]["probing"][part]
            yield [task, name, *cells(found, f"{shown} | bag_of_tokens:share"), ", ".join(found["selected"]["layers"])]


@table("other_tasks", "Task | Layer | Alignment | Interval | Median rank | Null 95 % | p | Contrast p | Choice")
def other_tasks_lens(result: Result) -> Rows:
    """Alignment of the prompt's own class word before training, against words matched in unembedding norm."""
    fixed = result["layers"].index(result["layer"])
    for task in NAMES["other_tasks"]:
        found = result[task]["lens"]
        largest = result["layers"].index(found["largest"]["layer"])
        for row, mark, null in (
            (fixed, "", f"null.alignment_95.{fixed}:small | null.p.{fixed}:3"),
            (largest, " (largest)", "largest.null_95:small | largest.p:3"),  # of the largest over layers
        ):
            shown = f"alignment.mean.{row}:small | alignment.interval.{row}:small | rank.{row}:0 | {null}"
            against = f"null.contrast_p.{row}:3 | choice.accuracy.{row}:percent"
            yield [task, result["layers"][row] + mark, *cells(found, f"{shown} | {against}")]


@table("other_tasks", "Task | Arm | Held out | Top token | Choice | Alignment | Exact answers | Change")
def other_tasks_training(result: Result) -> Rows:
    """Dual-reward training on other tasks and its controls."""
    for task in NAMES["other_tasks"]:
        for key, name in NAMES["other_tasks_arms"].items():
            arm = result[task][key]
            for part, held_out in NAMES["held_out"].items():
                made = cells(arm[part], "top:share | choice:share | alignment:small | answers_exact:share")
                change = [NOTHING] if key == "before" else cells(arm[part], "answers_change:2")
                yield [task, name + times_seeds(arm), held_out, *made, *change]
