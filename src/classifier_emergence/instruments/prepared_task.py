"""A task made ready for a model: what it is fed, the tokens of the class words, and the part that is held out."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers.processors import TemplateProcessing

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.base import check_prompts, feed_prompts, known_word, one_position
from classifier_emergence.instruments.probe import folds_of
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import Fed, Position
from classifier_emergence.reading.vocabulary import WordTokens
from classifier_emergence.tasks.classification import Item, Task

HELD_OUT = 4
"""One item in so many is held out."""


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
    check_prompts([item.prompt for item in task.items])
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


def _target_word(word: str, lm: LanguageModel) -> WordTokens:
    tokens = known_word(word, lm)
    if f" {word}" not in tokens.forms:
        raise InputError(
            f"target word {word!r}: with a leading space it is no single token of {lm.key}; name the class by another"
        )
    return tokens
