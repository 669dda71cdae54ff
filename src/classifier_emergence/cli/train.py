"""Commands that train a model: dual-reward, sft, grpo."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from classifier_emergence.cli.options import (
    EXAMPLE,
    AdapterFolder,
    Classes,
    File,
    JsonFile,
    Model,
    PlotFile,
    Seed,
    TaskName,
    check_outputs,
    labelled_prompts,
    write_outputs,
)
from classifier_emergence.cli.terminal import printable, say, table

if TYPE_CHECKING:
    from classifier_emergence.instruments.finetune import FineTuned
    from classifier_emergence.tasks.classification import Task

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
    for name, command, settings in (
        ("dual-reward", dual_reward, "--steps 60"),
        ("sft", sft, "--steps 20"),
        ("grpo", grpo, "--steps 30"),
    ):
        line = f"classifier-emergence {name} -m smollm2-135m-instruct {settings} --output adapter"
        app.command(name, epilog=EXAMPLE + line)(command)


def dual_reward(
    model: Model,
    output: Output = None,
    classes: Classes = None,
    file: File = None,
    task: TaskName = None,
    steps: Steps = 60,
    class_weight: Annotated[
        float, typer.Option("--class-weight", help="Weight of the lens; 1 needs no answers.")
    ] = 0.4,
    layer: Layer = None,
    rank: Rank = 16,
    learning_rate: Rate = 5e-4,
    batch_size: Batch = 4,
    seed: Seed = 0,
    adapter: AdapterFolder = None,
    json: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Train the lens to name the class (LoRA on V, O).

    Answers are trained along, so that they stay right. Without prompts on arithmetic.
    Measured on items that are held out. A run that is stopped goes on when the same command is given again.
    """
    data = _items(classes, file, task, json, plot)
    from classifier_emergence.instruments.finetune import dual_reward as train
    from classifier_emergence.models.names import open_model

    reading = train(
        open_model(model, adapter=adapter or ()),
        data,
        output,
        steps=steps,
        class_weight=class_weight,
        layer=layer,
        rank=rank,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
    )
    _report(reading, output)
    write_outputs(reading, json, plot)


def sft(
    model: Model,
    output: Output = None,
    classes: Classes = None,
    file: File = None,
    task: TaskName = None,
    steps: Steps = 100,
    layer: Layer = None,
    rank: Rank = 8,
    learning_rate: Rate = 1e-4,
    batch_size: Batch = 8,
    seed: Seed = 0,
    adapter: AdapterFolder = None,
    json: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Train on answers alone (LoRA everywhere).

    Does the lens name the class then? Without prompts on arithmetic.
    Measured on items that are held out. A run that is stopped goes on when the same command is given again.
    """
    data = _items(classes, file, task, json, plot)
    from classifier_emergence.instruments.finetune import sft as train
    from classifier_emergence.models.names import open_model

    reading = train(
        open_model(model, adapter=adapter or ()),
        data,
        output,
        steps=steps,
        layer=layer,
        rank=rank,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
    )
    _report(reading, output)
    write_outputs(reading, json, plot)


def grpo(
    model: Model,
    output: Output = None,
    classes: Classes = None,
    file: File = None,
    task: TaskName = None,
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
    seed: Seed = 0,
    adapter: AdapterFolder = None,
    json: JsonFile = None,
    plot: PlotFile = None,
) -> None:
    """Train by reward for right answers (GRPO, LoRA everywhere).

    Does the lens name the class then? Without prompts on arithmetic. A completion that begins with the answer is right.
    Measured on items that are held out. A run that is stopped goes on when the same command is given again.
    """
    data = _items(classes, file, task, json, plot)
    from classifier_emergence.instruments.grpo import grpo as train
    from classifier_emergence.models.names import open_model

    reading = train(
        open_model(model, adapter=adapter or ()),
        data,
        output,
        steps=steps,
        class_weight=class_weight,
        layer=layer,
        shots=shots,
        batch_size=batch_size,
        group=group,
        new_tokens=new_tokens,
        kl_weight=kl_weight,
        rank=rank,
        learning_rate=learning_rate,
        seed=seed,
    )
    _report(reading, output)
    _report_rewards(reading)
    write_outputs(reading, json, plot)


def _items(
    classes: list[str] | None, file: Path | None, task: str | None, json: Path | None, plot: Path | None
) -> "Task":
    if not (classes or file or task):
        task = "arithmetic"
    data = labelled_prompts(classes, file, task)
    check_outputs(json, plot)
    return data


def _report(reading: "FineTuned", output: Path | None) -> None:
    from classifier_emergence.numbers import interval_text, percent

    row = reading.layers.index(reading.layer)
    before, after = reading.before, reading.after
    lines = [["mean probability of the class's word", *(percent(float(m.alignment[row]), 2) for m in (before, after))]]
    for what, pair in {
        "top token is the class's word": (before.top, after.top),
        "class's word beats those of the others": (before.choice, after.choice),
        "exact answers": (before.answers, after.answers),
    }.items():
        cells = [f"{percent(p.accuracy)} {interval_text(p.interval, 0)}" if p else "no answers" for p in pair]
        lines.append([what, *cells])
    table(
        [f"lens at {reading.layer}, {reading.n_test} held-out items", "before", "after"],
        lines,
        title=f"{printable(reading.model)}: {reading.method}, {reading.n_train} items trained on",
    )
    say(f"adapter: {output}" if output else "adapter: not kept; name a folder with --output to keep it")


def _report_rewards(reading: "FineTuned") -> None:
    from classifier_emergence.numbers import percent

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
