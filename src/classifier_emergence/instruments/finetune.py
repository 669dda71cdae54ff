"""Fine-tuning for anyone's task: dual reward (the lens should name the class) and plain LoRA on answers.

Every way of training, ``instruments.grpo`` among them, trains an adapter on part of a task's items and measures on the
rest, held out with their groups, before and after.
"""

import copy
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from tokenizers.processors import TemplateProcessing

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.base import (
    Reading,
    check_prompts,
    feed_prompts,
    known_word,
    one_position,
    pick_rows,
)
from classifier_emergence.instruments.probe import folds_of
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
from classifier_emergence.training.modules import MLP, QKVO, VO
from classifier_emergence.training.sharding import check_whole
from classifier_emergence.training.supervised import Example, Objective, Schedule, encode, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELD_OUT = 4
"""One item in so many is held out."""
CONFIDENCE = 0.95
LARGE = 2.0
"""Nats a token from which on a model says something else. Random guesses are ``ln(vocabulary)`` from certainty, about
11; what training on a narrow task does to other text is below 1."""


@dataclass(frozen=True, eq=False)
class HeldOutScores:
    """The model on the held-out items."""

    alignment: NDArray[np.float64]
    """(layers,) mean total probability of the forms of the item's own class word."""
    top: Proportion
    """How often the lens's top token at the classifier layer is a form of the own word."""
    choice: Proportion
    """How often the own word has the largest alignment of all class words there."""
    answers: Proportion | None
    """How often greedy decoding writes the answer; None where the items have none."""


@dataclass(frozen=True, eq=False)
class FineTuned(Reading):
    """What fine-tuning did, on items that were never trained on."""

    task: str
    method: str
    classes: tuple[str, ...]
    words: tuple[str, ...]
    layer: str
    """The classifier layer, where the lens is read (and trained, by dual reward)."""
    settings: dict[str, Any]
    n_train: int
    n_test: int
    parameters: int
    """Trained parameters."""
    losses: tuple[dict[str, float], ...]
    before: HeldOutScores
    after: HeldOutScores
    drift: float
    """How far the model moved on text that has nothing to do with the task: ``divergence`` on ``NEUTRAL``, the mean."""
    warnings: tuple[str, ...]
    """What is wrong with the run, in words; empty if nothing is."""
    fed: tuple[Fed, ...]
    """What the model was fed for each prompt, and where it was read: of items trained on, then of those held out."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer: mean alignment of the own word before and after."""
        return [
            {"layer": layer, "before": b, "after": a, "n": self.n_test}
            for layer, b, a in zip(self.layers, self.before.alignment, self.after.alignment, strict=True)
        ]

    def plot(self) -> "Figure":
        """Alignment over depth, before and after; and what was trained, or rewarded, over steps."""
        from classifier_emergence.instruments.drawing import FLOOR, drawable, layer_axis, panels, probability_axis

        figure, (depth, curve) = panels(1, 2, (9.6, 3.4), width_ratios=[3, 2])
        depth.plot(np.clip(self.before.alignment, FLOOR, None), color="0.5", ls="--", label="before")
        depth.plot(np.clip(self.after.alignment, FLOOR, None), color="0.0", label="after")
        depth.axvline(self.layers.index(self.layer), color="0.7", lw=0.7)
        depth.set_xlabel(f"layer  ({self.method}, {self.n_test} held-out items)")
        layer_axis(depth, self.layers)
        probability_axis(depth, "alignment of the class's word")
        depth.legend(frameon=False)
        depth.set_title(drawable(self.model), loc="left", fontsize="medium")
        shown = ("reward", "class_loss") if "reward" in self.losses[-1] else ("class_loss", "answer_loss")
        for part, line in zip(shown, ("-", "--"), strict=True):
            if part in self.losses[-1]:
                x, y = zip(*((step["step"], step[part]) for step in self.losses if part in step), strict=True)
                curve.plot(x, y, color="0.0", ls=line, marker=".", label=part.replace("_", " "))
        curve.set_xlabel("step")
        units = {"reward": "mean reward", "class_loss": "nats", "answer_loss": "nats"}
        curve.set_ylabel("; ".join(dict.fromkeys(units[part] for part in shown if part in self.losses[-1])))
        curve.set_ylim(bottom=0)
        curve.legend(frameon=False)
        curve.set_title("while training", loc="left", fontsize="medium")
        return figure


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
    prepared: "PreparedTask",
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


@dataclass(frozen=True)
class PreparedTask:
    """A task made ready for a model."""

    lm: LanguageModel
    """With a tokenizer that makes of the prompts what is fed."""
    words: list[WordTokens]
    """Of the classes."""
    train: list[Item]
    """Prompts as the model is fed."""
    test: list[Item]
    fed: tuple[Fed, ...]
    """Of the items to train on, then of those to test on."""
    how: dict[str, Any]
    """``position``, ``chat`` and ``system``."""


def prepare(
    lm: LanguageModel,
    task: Task,
    *,
    position: Position = "last",
    chat: bool = False,
    system: str | None = None,
    shots: int = 0,
) -> PreparedTask:
    """Check a task against a model and hold a part of it out.

    Args:
        lm: The model.
        task: The task.
        position: Where prompts are read, see ``positions.feed``.
        chat: Pass them through the model's own chat template; answers then lose their leading space.
        system: What the system says in the chat.
        shots: Solved training items, the classes in turn, before every prompt; they are not trained on themselves.

    Raises:
        InputError: An adapter is on the model, a prompt cannot be read, a class word with its leading space is no
            single token, a class is too small to hold any out, or see ``shots_of`` and ``positions.feed``.
    """
    if any(isinstance(module, BaseTunerLayer) for module in lm.model.modules()):
        raise InputError(f"{lm.key}: an adapter is on it, which training would overwrite; merge it (merge_and_unload)")
    if lm.tokenizer.eos_token_id is None:
        raise InputError(f"{lm.key}: the tokenizer has no end token, which ends every answer; set one")
    check_prompts(lm, [item.prompt for item in task.items])
    words = [_target_word(word, lm) for word in task.words]
    train, test = held_out(task)
    shown = shots_of(train, shots)
    lead = "".join(f"{item.prompt}{item.answer}\n" for item in shown)
    prompts = [lead + item.prompt for item in task.items]
    fed = feed_prompts(lm, prompts, one_position(position), chat=chat, system=system)
    lm, texts = _as_texts(lm, fed, prompts)
    of_item = {item: (text, one) for item, text, one in zip(task.items, texts, fed, strict=True)}
    train = [item for item in train if item not in shown]

    def ready(item: Item) -> Item:
        answer = item.answer.lstrip() if chat and item.answer else item.answer
        return replace(item, prompt=of_item[item][0], answer=answer)

    return PreparedTask(
        lm,
        words,
        [ready(item) for item in train],
        [ready(item) for item in test],
        tuple(of_item[item][1] for item in [*train, *test]),
        {"position": position, "chat": chat, "system": system},
    )


def shots_of(train: Sequence[Item], n: int) -> list[Item]:
    """``n`` solved training items, the classes in turn, to show before every prompt.

    Raises:
        InputError: ``n`` is negative or leaves a class without items, or one of the items has no answer.
    """
    if n < 0:
        raise InputError(f"shots: {n} is negative; pass 0 or more")
    turns = zip(*by_label(train).values(), strict=False)  # as long as all classes have items
    shown = [item for turn in turns for item in turn][:n]
    if {item.label for item in train if item not in shown} != {item.label for item in train}:
        raise InputError(f"shots: {n} leave a class without items to train on; take fewer")
    if any(item.answer is None for item in shown):
        raise InputError("shots: an item without an answer cannot be shown solved; give answers, or take 0")
    return shown


def by_label(items: Sequence[Item]) -> dict[int, list[Item]]:
    """The items of every class."""
    return {label: [item for item in items if item.label == label] for label in sorted({item.label for item in items})}


def _as_texts(lm: LanguageModel, fed: Sequence[Fed], prompts: Sequence[str]) -> tuple[LanguageModel, list[str]]:
    """Texts, and the model with a tokenizer that makes of them what is fed.

    They are the prompts themselves, unless a template or other special tokens than the tokenizer adds make another text
    of one; then they are what the tokens decode to, for a tokenizer that adds none.

    Raises:
        InputError: The tokenizer does not make these tokens of any text.
    """
    wanted = [list(one.ids) for one in fed]
    if lm.tokenizer(list(prompts))["input_ids"] == wanted:
        return lm, list(prompts)
    if lm.tokenizer.is_fast:
        bare = copy.deepcopy(lm.tokenizer)
        bare.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        texts: list[str] = bare.batch_decode(wanted, clean_up_tokenization_spaces=False)
        if bare(texts)["input_ids"] == wanted:
            return replace(lm, tokenizer=bare), texts
    raise InputError(f"{lm.key}: no text gives its tokenizer the tokens of these prompts; leave the chat template out")


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


def held_out(task: Task) -> tuple[list[Item], list[Item]]:
    """Items to train on and items to test on: about a quarter of each class, with their groups.

    Raises:
        InputError: There is one class only, or a class has one group.
    """
    if len(task.classes) < 2:
        raise InputError(f"task {task.name}: {len(task.classes)} class; give at least two")
    y = torch.tensor([item.label for item in task.items])
    train_rows, test_rows = folds_of(y, task.classes, [item.group for item in task.items], limit=HELD_OUT)[0]
    return [task.items[i] for i in train_rows.tolist()], [task.items[i] for i in test_rows.tolist()]


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


def _target_word(word: str, lm: LanguageModel) -> WordTokens:
    tokens = known_word(word, lm)
    if f" {word}" not in tokens.forms:
        raise InputError(
            f"target word {word!r}: with a leading space it is no single token of {lm.key}; name the class by another"
        )
    return tokens


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
