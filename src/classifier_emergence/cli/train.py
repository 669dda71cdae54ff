"""Commands that train a model: dual-reward, sft, grpo."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import classifier_emergence as library  # each of its names is imported on first use
from classifier_emergence.cli import options
from classifier_emergence.cli.options import check_outputs, example, labelled_prompts, write_outputs
from classifier_emergence.cli.terminal import printable, report_fed, say, table
from classifier_emergence.numbers import percent, share_text
from classifier_emergence.processes import is_first

if TYPE_CHECKING:
    from classifier_emergence.instruments.fine_tuned import FineTuned

Output = Annotated[
    Path | None, typer.Option("--output", metavar="FOLDER", help="New folder for the adapter (PEFT format).")
]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Training steps.")]
Rank = Annotated[int, typer.Option("--rank", min=1, help="Of the adapter.")]
Rate = Annotated[float, typer.Option("--learning-rate", min=1e-12, help="Constant learning rate of AdamW.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Items a step.")]
Layer = Annotated[
    str | None, typer.Option("--layer", metavar="LAYER", help="Classifier layer: L16 or 16. Default: at 55 % depth.")
]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command, line in (
        (dual_reward, "dual-reward -m smollm2-135m-instruct --steps 60"),
        (sft, "sft -m smollm2-135m-instruct --steps 20"),
        (grpo, "grpo -m smollm2-135m-instruct --steps 30"),
    ):
        app.command(epilog=example(f"{line} --output adapter"))(command)


def dual_reward(
    model: options.Model,
    output: Output = None,
    classes: options.Classes = None,
    file: options.PromptFile = None,
    columns: options.Columns = None,
    task: options.TaskName = None,
    steps: Steps = 60,
    class_weight: Annotated[
        float, typer.Option("--class-weight", help="Weight of the lens; 1 needs no answers.")
    ] = 0.4,
    layer: Layer = None,
    rank: Rank = 16,
    learning_rate: Rate = 5e-4,
    batch_size: Batch = 4,
    seed: options.Seed = 0,
    position: options.Position = "last",
    chat: options.Chat = False,
    system: options.System = None,
    tokens: options.ShowTokens = False,
    adapter: options.AdapterFolder = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """Train the lens to name the class (LoRA on V, O).

    Answers are trained along, so that they stay right. Without prompts on arithmetic.
    Measured on items that are held out. A stopped run resumes when you repeat the same command.
    """
    _train("dual_reward", **locals())


def sft(
    model: options.Model,
    output: Output = None,
    classes: options.Classes = None,
    file: options.PromptFile = None,
    columns: options.Columns = None,
    task: options.TaskName = None,
    steps: Steps = 100,
    layer: Layer = None,
    rank: Rank = 8,
    learning_rate: Rate = 1e-4,
    batch_size: Batch = 8,
    seed: options.Seed = 0,
    position: options.Position = "last",
    chat: options.Chat = False,
    system: options.System = None,
    tokens: options.ShowTokens = False,
    adapter: options.AdapterFolder = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """Train on answers alone (LoRA everywhere).

    Does the lens name the class then? Without prompts on arithmetic.
    Measured on items that are held out. A stopped run resumes when you repeat the same command.
    """
    _train("sft", **locals())


def grpo(
    model: options.Model,
    output: Output = None,
    classes: options.Classes = None,
    file: options.PromptFile = None,
    columns: options.Columns = None,
    task: options.TaskName = None,
    steps: Steps = 30,
    class_weight: Annotated[
        float, typer.Option("--class-weight", help="Weight of a loss that has the lens name the class.")
    ] = 0.0,
    layer: Layer = None,
    shots: Annotated[int, typer.Option("--shots", min=0, help="Solved items before every prompt.")] = 3,
    group: Annotated[int, typer.Option("--group", min=2, help="Completions of a prompt.")] = 4,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Most tokens of a completion.")] = 8,
    kl_weight: Annotated[
        float, typer.Option("--kl-weight", min=0, help="Of the divergence from the model at the start.")
    ] = 0.04,
    rank: Rank = 16,
    learning_rate: Rate = 1e-4,
    batch_size: Batch = 8,
    seed: options.Seed = 0,
    position: options.Position = "last",
    chat: options.Chat = False,
    system: options.System = None,
    tokens: options.ShowTokens = False,
    adapter: options.AdapterFolder = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """Train by reward for right answers (GRPO, LoRA everywhere).

    Does the lens name the class then? Without prompts on arithmetic. A completion that begins with the answer is right.
    Measured on items that are held out. A stopped run resumes when you repeat the same command.
    """
    _train("grpo", **locals())


def _train(
    method: str,
    *,
    model: str,
    adapter: list[Path] | None,
    device: str,
    dtype: str,
    output: Path | None,
    classes: list[str] | None,
    file: Path | None,
    columns: list[str] | None,
    task: str | None,
    tokens: bool,
    json: Path | None,
    plot: Path | None,
    **settings: Any,
) -> None:
    """Run a command with all of its options; ``settings`` are named as the function of the library names them."""
    data = labelled_prompts(classes, file, task if classes or file or task else "arithmetic", columns)
    check_outputs(json, plot)
    train = getattr(library, method)
    lm = library.open_model(model, adapter=adapter, device=device, dtype=dtype)
    reading: FineTuned = train(lm, data, output, write=lambda reading: write_outputs(reading, json, plot), **settings)
    if not is_first():
        return
    report_fed(reading.fed, tokens)
    _report(reading, output)
    if method == "grpo":
        _report_rewards(reading)
    for warning in reading.warnings:
        say(f"warning: {warning}")


def _report(reading: "FineTuned", output: Path | None) -> None:
    row, before, after = reading.layers.index(reading.layer), reading.before, reading.after
    lines = [["mean probability of the class's word", *(percent(float(m.alignment[row]), 2) for m in (before, after))]]
    for what, pair in {
        "top token is the class's word": (before.top, after.top),
        "class's word beats those of the others": (before.choice, after.choice),
        "exact answers": (before.answers, after.answers),
    }.items():
        lines.append([what, *(share_text(p.accuracy, p.interval) if p else "no answers" for p in pair)])
    table(
        [f"lens at {reading.layer}, {reading.n_test} held-out items", "before", "after"],
        lines,
        title=f"{printable(reading.model)}: {reading.method}, {reading.n_train} items trained on",
    )
    say(f"adapter: {printable(str(output))}" if output else "adapter: not kept; name a folder with --output to keep it")


def _report_rewards(reading: "FineTuned") -> None:
    rewards = [step["reward"] for step in reading.losses]
    mixed = 1 - sum(step["zero_variance"] for step in reading.losses) / len(reading.losses)
    n = max(1, len(rewards) // 5)
    first, last = (percent(sum(part) / n) for part in (rewards[:n], rewards[-n:]))
    say(f"right while training: {first} in the first {n} steps, {last} in the last {n}")
    if mixed:
        say(f"{percent(mixed)} of the prompts got both right and wrong answers; only these teach")
    else:
        say("no prompt got both right and wrong answers, so rewards taught nothing")
        say("take prompts that the model answers sometimes, more --shots or a larger --group")
