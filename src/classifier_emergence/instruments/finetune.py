"""Fine-tuning for anyone's task: dual reward (the lens should name the class) and plain LoRA on answers.

Every way of training, ``instruments.grpo`` among them, trains an adapter on part of a task's items and measures on the
rest, held out with their groups, before and after.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from peft import PeftModel
from safetensors import SafetensorError

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.base import pick_rows
from classifier_emergence.instruments.fine_tuned import FineTuned, HeldOutScores
from classifier_emergence.instruments.prepared_task import PreparedTask, prepare
from classifier_emergence.processes import is_first
from classifier_emergence.reading.layers import layer_at, layer_of, layer_row
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import Fed, Position, read_states
from classifier_emergence.reading.vocabulary import WordTokens
from classifier_emergence.statistics import Proportion, student_interval
from classifier_emergence.tasks.classification import Item, Task
from classifier_emergence.tasks.problems import NEUTRAL
from classifier_emergence.training.adapters import Adapter, adapted
from classifier_emergence.training.evaluation import answers, divergence
from classifier_emergence.training.examples import Example, Objective, encode
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.modules import MLP, QKVO, VO
from classifier_emergence.training.sharding import check_whole
from classifier_emergence.training.supervised import train

CONFIDENCE = 0.95
LARGE = 2.0
"""Nats a token from which on a model says something else. Random guesses are ``ln(vocabulary)`` from certainty, about
11; what training on a narrow task does to other text is below 1."""


def dual_reward(
    lm: LanguageModel,
    task: Task,
    output: str | Path | None = None,
    *,
    steps: int = 60,
    class_weight: float = 0.4,
    layer: str | int | None = None,
    rank: int = 16,
    learning_rate: float = 5e-4,
    batch_size: int = 4,
    seed: int = 0,
    position: Position = "last",
    chat: bool = False,
    system: str | None = None,
    write: "Writer" = None,
) -> FineTuned:
    """Train V and O below a layer so that the lens there names the class while answers stay right.

    The loss is ``w * CE(lens, class word) + (1 - w) * CE(answer)``, the lens at the last token of the prompt, the
    target being the word's token with a leading space. The adapter is written to ``output`` in the PEFT format. A run
    that is killed goes on from its last checkpoint (in ``<output>.partial``) when it is called again with the same
    arguments.

    Args:
        lm: A causal language model whose attention has ``v_proj`` and ``o_proj``.
        task: Its items need answers unless ``class_weight`` is 1.
        output: Folder for the adapter; must not exist. None keeps nothing.
        steps: Of AdamW.
        class_weight: w, within (0, 1].
        layer: After which block the lens is trained; default the one at 55 % depth.
        rank: Of the adapter.
        learning_rate: Constant.
        batch_size: Items a step.
        seed: Of initial weights and order.
        position: Where the lens is trained and read, see ``positions.feed``.
        chat: Pass prompts through the model's own chat template; answers stand at the start of its turn, without their
            leading space.
        system: What the system says in the chat.
        write: Writes the result, before the adapter is put in place: where the adapter is, what this wrote is, too,
            whenever the run is killed.

    Raises:
        InputError: A setting is out of range, a class word is no single token, an item lacks its answer, a class is
            too small to hold any out, a prompt has no such position, there is no chat template, ``output`` exists or is
            being written, or training diverges.
    """
    if not 0 < class_weight <= 1:
        raise InputError(f"class_weight: {class_weight} is not within (0, 1]; for answers alone use sft")
    block = classifier_block(lm, layer)
    if block < 1:
        raise InputError(f"layer: L{block} has no block below it to train; choose a later one")
    adapter = Adapter(VO, rank, 2.0, tuple(range(block)))
    schedule = Schedule(steps, batch_size, learning_rate, seed, min(20, steps))
    recipe = Recipe("dual reward", adapter, schedule, block, class_weight, 1 - class_weight)
    prepared = prepare(lm, task, position=position, chat=chat, system=system)
    return _supervised(lm, task, prepared, output, recipe, Objective(class_weight, block), write)


def sft(
    lm: LanguageModel,
    task: Task,
    output: str | Path | None = None,
    *,
    steps: int = 100,
    layer: str | int | None = None,
    rank: int = 8,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    seed: int = 0,
    position: Position = "last",
    chat: bool = False,
    system: str | None = None,
    write: "Writer" = None,
) -> FineTuned:
    """Plain LoRA fine-tuning of all linear maps on answers; does the lens name the class by itself afterwards?

    Arguments and errors as in ``dual_reward``; every item needs an answer, and the lens is only read at ``layer`` and
    ``position``.
    """
    adapter = all_linear_maps(lm, rank, scale=20.0)
    schedule = Schedule(steps, batch_size, learning_rate, seed, min(20, steps))
    recipe = Recipe("sft", adapter, schedule, classifier_block(lm, layer), 0.0, 1.0)
    prepared = prepare(lm, task, position=position, chat=chat, system=system)
    return _supervised(lm, task, prepared, output, recipe, Objective(0.0), write)


def _supervised(
    lm: LanguageModel,
    task: Task,
    prepared: PreparedTask,
    output: str | Path | None,
    recipe: "Recipe",
    objective: Objective,
    write: "Writer",
) -> FineTuned:
    examples = [
        _example(prepared.lm, item, fed, prepared.words[item.label], objective)
        for item, fed in zip(prepared.train, prepared.fed, strict=False)
    ]

    def run(wrapped: PeftModel, work: Path) -> Outcome:
        text = f"{recipe.method} of {lm.key}"
        done = train(lm, wrapped, examples, objective, recipe.schedule, work=work, description=text)
        return Outcome(done.parameters, done.losses)

    return fine_tune(lm, task, prepared, output, recipe, run, write)


# --- What every way of training shares ---

Writer = Callable[[FineTuned], object] | None
"""What is done with a result while its adapter is not in place yet."""


@dataclass(frozen=True)
class Recipe:
    """One way of training."""

    method: str
    """Named in the result."""
    adapter: Adapter
    schedule: Schedule
    block: int
    """After which the lens is read."""
    class_weight: float
    """Of the lens's loss in what is trained."""
    answer_weight: float
    """Of the answers' loss; 0 where they are only rewarded."""
    settings: dict[str, Any] = field(default_factory=dict)
    """To report beside these and those of adapter and schedule."""


@dataclass(frozen=True)
class Outcome:
    """What a run gives beside the adapter."""

    parameters: int
    """Trained parameters."""
    losses: list[dict[str, float]]
    """By step."""


def all_linear_maps(lm: LanguageModel, rank: int, *, scale: float) -> Adapter:
    """An adapter on every linear map of every block."""
    return Adapter((*QKVO, *MLP), rank, scale, tuple(range(lm.n_layers)))


def fine_tune(
    lm: LanguageModel,
    task: Task,
    prepared: PreparedTask,
    output: str | Path | None,
    recipe: Recipe,
    run: Callable[[PeftModel, Path], Outcome],
    write: Writer = None,
) -> FineTuned:
    """Train an adapter, write it, and measure the held-out part before and after.

    Args:
        lm: The model; it is left as it was.
        task: What is trained on.
        prepared: From ``prepare``.
        output: Folder for the adapter; None keeps nothing.
        recipe: What is trained how.
        run: Trains, with a folder for checkpoints.
        write: See ``dual_reward``.

    Raises:
        InputError: A setting is out of range, ``output`` exists or is being written, ``run`` raises, or the trained
            model gives no finite numbers.
    """
    adapter, schedule, block = recipe.adapter, recipe.schedule, recipe.block
    check_whole()
    check_positive(steps=schedule.steps, batch_size=schedule.batch_size, rank=adapter.rank)
    if not schedule.learning_rate > 0:
        raise InputError(f"learning_rate: {schedule.learning_rate} is not positive; pass for instance 0.0005")
    with TemporaryDirectory() if output is None else _output_folder(Path(output)) as folder:
        partial = Path(folder)
        before, losses_before = _measure(prepared, recipe)
        with adapted(lm, adapter, seed=schedule.seed) as wrapped:
            outcome = run(wrapped, partial / "work")
            moved = float(divergence(lm, wrapped, NEUTRAL).mean())
            if not math.isfinite(moved):
                raise InputError(
                    f"learning_rate: at {schedule.learning_rate:g} training diverged: the model gives no finite "
                    "numbers any more; choose a smaller one"
                )
            after, losses_after = _measure(prepared, recipe)
            if is_first():
                wrapped.save_pretrained(str(partial / "adapter"))
        groups = [item.group for item in prepared.test]
        labels = lm.layers
        reading = FineTuned(
            model=lm.key,
            layers=tuple(labels),
            task=task.name,
            method=recipe.method,
            classes=task.classes,
            words=task.words,
            layer=labels[layer_row(block)],
            settings={
                "steps": schedule.steps,
                "modules": adapter.modules,
                "blocks": len(adapter.layers),
                "rank": adapter.rank,
                "scale": adapter.scale,
                "learning_rate": schedule.learning_rate,
                "batch_size": schedule.batch_size,
                "seed": schedule.seed,
                "confidence": CONFIDENCE,
                "class_weight": recipe.class_weight,
                **prepared.how,
                **recipe.settings,
            },
            n_train=len(prepared.train),
            n_test=len(prepared.test),
            parameters=outcome.parameters,
            losses=tuple(outcome.losses),
            before=before,
            after=after,
            drift=moved,
            warnings=tuple(_warnings(losses_after - losses_before, groups, moved)),
            fed=prepared.fed,
        )
        if is_first():
            if write is not None:
                write(reading)
            if output is not None:
                (partial / "adapter").replace(output)
    return reading


def _warnings(rise: NDArray[np.float64], groups: Sequence[int], moved: float) -> Iterator[str]:
    """What is wrong with a run: ``rise``, of the loss, is one number a held-out item, none where no loss is trained."""
    means = [rise[np.equal(groups, group)].mean() for group in dict.fromkeys(groups)] if len(rise) else []
    if len(means) > 1 and (interval := student_interval(means, confidence=CONFIDENCE))[0] > 0:
        yield (
            f"the trained loss rose by {np.mean(means):.3g} nats on held-out items "
            f"({CONFIDENCE:.0%} interval {interval[0]:.3g} to {interval[1]:.3g}, n = {len(means)}); "
            "take fewer steps, a smaller learning rate or more items"
        )
    if moved > LARGE:
        yield (
            f"the model says something else on neutral text (by {moved:.3g} nats a token): training destroyed it; "
            "take a smaller learning rate or fewer steps"
        )


def classifier_block(lm: LanguageModel, layer: str | int | None) -> int:
    """The block after which the lens is read: the one that is named, or the one at 55 % depth."""
    if layer is None:
        return layer_at(0.55, lm.n_layers)
    block = layer_of(pick_rows(lm, [layer])[0])
    if block < 0:
        raise InputError("layer: emb is no block; choose L1 or later")
    return block


def check_positive(**settings: int) -> None:
    """Refuse settings below 1.

    Raises:
        InputError: One is; names it.
    """
    for name, value in settings.items():
        if value < 1:
            raise InputError(f"{name}: {value} is too small; pass at least 1")


def _example(lm: LanguageModel, item: Item, fed: Fed, word: WordTokens, objective: Objective) -> Example:
    target = word.forms[f" {word.word}"]
    if objective.class_weight == 1:
        ids = fed.ids[: fed.read[0] + 1]
        # The end-of-text token stands where an answer would; the loss does not look at it.
        return Example([*ids, int(lm.tokenizer.eos_token_id)], len(ids), target)
    if item.answer is None:
        raise InputError(f"prompt {item.prompt!r}: no answer to train on; give an answer column, or class weight 1")
    return replace(encode(lm.tokenizer, item.prompt, item.answer, target), read_at=fed.read[0])


def _measure(prepared: PreparedTask, recipe: Recipe) -> tuple[HeldOutScores, NDArray[np.float64]]:
    """The scores, and of each item what training lowers, in nats; of none where answers are only rewarded."""
    lm, words, row = prepared.lm, prepared.words, layer_row(recipe.block)
    prompts, classes = [item.prompt for item in prepared.test], [item.label for item in prepared.test]
    states = read_states(lm, prepared.fed[len(prepared.train) :])
    scores = lens_scores(states, lm.readout, [word.ids for word in words], ranked=[[0]] * len(prompts))
    own = scores.log_alignment[:, torch.arange(len(prompts)), torch.tensor(classes)].double()
    is_top = [token in words[c].ids for token, c in zip(scores.top_id[row].tolist(), classes, strict=True)]
    wanted = [item.answer for item in prepared.test if item.answer is not None]
    answered = answers(lm, prompts, wanted) if len(wanted) == len(prompts) else None
    loss = -recipe.class_weight * own[row]
    if answered is not None:
        loss -= recipe.answer_weight * answered.per_token
    return HeldOutScores(
        alignment=own.exp().mean(-1).numpy(),
        top=_share(torch.tensor(is_top)),
        choice=_share(scores.log_alignment[row].argmax(-1) == torch.tensor(classes)),
        answers=None if answered is None else _share(answered.exact),
    ), loss.numpy() if recipe.class_weight + recipe.answer_weight else np.empty(0)


def _share(hits: torch.Tensor) -> Proportion:
    return Proportion.of(hits.numpy(), np.ones(len(hits), dtype=bool), confidence=CONFIDENCE)


@contextmanager
def _output_folder(output: Path) -> Iterator[Path]:
    """The working folder of an adapter that is about to be written, for one run at a time; removed on success."""
    if output.exists():
        raise InputError(f"output {output}: exists already; name a new folder, or remove it")
    partial = output.with_name(f"{output.name}.partial")
    if not is_first():  # another process of this job has made it, or is about to
        yield partial
        return
    try:
        partial.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(partial / "lock", timeout=0):
            shutil.rmtree(partial / "adapter", ignore_errors=True)  # of a run that was killed while it wrote
            yield partial
        shutil.rmtree(partial)
    except Timeout as error:
        raise InputError(f"output {output}: another run is writing it; wait, or name another folder") from error
    except (OSError, SafetensorError) as error:
        raise InputError(f"output {output}: cannot be written ({error}); free space or name another folder") from error
