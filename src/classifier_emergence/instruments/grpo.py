"""Reinforcement learning on answers (GRPO) for anyone's task, alone or with a loss that has the lens name the class."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from peft import PeftModel

from classifier_emergence.errors import InputError
from classifier_emergence.extras import missing_extras_named
from classifier_emergence.instruments.fine_tuned import FineTuned
from classifier_emergence.instruments.finetune import (
    Outcome,
    Recipe,
    Writer,
    all_linear_maps,
    check_positive,
    classifier_block,
    fine_tune,
)
from classifier_emergence.instruments.prepared_task import by_label, prepare
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import Position
from classifier_emergence.tasks.classification import Item, Task
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.rl.rewards import Reward


def grpo(
    lm: LanguageModel,
    task: Task,
    output: str | Path | None = None,
    *,
    steps: int = 30,
    class_weight: float = 0.0,
    layer: str | int | None = None,
    shots: int = 3,
    batch_size: int = 8,
    group: int = 4,
    new_tokens: int = 8,
    temperature: float = 1.0,
    kl_weight: float = 0.04,
    rank: int = 16,
    learning_rate: float = 1e-4,
    seed: int = 0,
    position: Position = "last",
    chat: bool = False,
    system: str | None = None,
    reward: Reward | None = None,
    write: Writer = None,
) -> FineTuned:
    """Train LoRA adapters on all linear maps by reward: the model writes, and what answers rightly becomes likelier.

    The loss is ``(1 - w) * GRPO + w * CE(lens, class word)`` (see ``training.rl.trainer.PolicyObjective``). A group of
    completions that all get the same reward teaches nothing, so take prompts that the model answers rightly
    *sometimes*; solved items in front (``shots``) help with that. The result's ``losses`` have one entry a step, with
    the mean ``reward`` and the share of groups without variance, ``zero_variance``. Adapter, resuming and what is
    measured are as in ``dual_reward``; prompts are measured behind the same solved items.

    Args:
        lm: A causal language model.
        task: Its items need answers, unless ``reward`` does without them.
        output: Folder for the adapter; must not exist. None keeps nothing.
        steps: Of AdamW, each with new completions.
        class_weight: w, within [0, 1].
        layer: After which block the lens is read; default the one at 55 % depth.
        shots: Solved training items before every prompt, of the classes in turn.
        batch_size: Prompts a step.
        group: Completions of a prompt.
        new_tokens: A completion ends here if no line break came before.
        temperature: Of sampling.
        kl_weight: Of the divergence from the model at the start.
        rank: Of the adapter.
        learning_rate: Constant.
        seed: Of initial weights, order and sampling.
        position: Where the lens is trained and read; see ``dual_reward``.
        chat: Pass prompts, and what is shown solved, through the model's own chat template, as ``dual_reward`` does.
        system: What the system says in the chat.
        reward: ``reward(prompts, completions, answers)``, a number for each completion; default ``begins_with_answer``.
        write: See ``dual_reward``.

    Raises:
        InputError: A setting is out of range, a class word is no single token, an item lacks its answer, an answer
            does not fit into ``new_tokens``, a class is too small to hold any out or to take shots from, ``output``
            exists or is being written, ``reward`` fails, or training diverges.
    """
    # Late: trl takes seconds to import, which the other instruments need not wait for.
    with missing_extras_named():
        from classifier_emergence.training.rl.run import train_grpo
        from classifier_emergence.training.rl.trainer import PolicyObjective, PolicyTask, Sampling

    block = classifier_block(lm, layer)
    check_positive(new_tokens=new_tokens, batch_size=batch_size, steps=steps)
    if not temperature > 0:
        raise InputError(f"temperature: {temperature} is not positive; pass for instance 1.0")
    objective = PolicyObjective(kl_weight, class_weight, block)
    sampling = Sampling(group, temperature, new_tokens)
    schedule = Schedule(steps, batch_size, learning_rate, seed, min(20, steps))
    if reward is None and (missing := next((item for item in task.items if item.answer is None), None)):
        raise InputError(f"prompt {missing.prompt!r}: no answer to reward; give an answer column")
    prepared = prepare(lm, task, position=position, chat=chat, system=system, shots=shots)
    if reward is None:
        _check_answers(prepared.lm, [*prepared.train, *prepared.test], new_tokens)
    targets = [word.forms[f" {word.word}"] for word in prepared.words]
    items = in_turn(prepared.train, steps * batch_size, seed=seed)
    back = {i: len(fed.ids) - 1 - fed.read[0] for i, fed in zip(prepared.train, prepared.fed, strict=False)}
    tasks = [PolicyTask(item.prompt, item.answer or "", targets[item.label], back[item]) for item in items]

    def run(wrapped: PeftModel, work: Path) -> Outcome:
        done = train_grpo(
            prepared.lm, wrapped, tasks, reward or begins_with_answer, objective, sampling, schedule, work=work,
            description=f"grpo of {lm.key}",
        )  # fmt: skip
        return Outcome(done.parameters, [{k: v for k, v in step.items() if v is not None} for step in done.steps])

    settings = {
        "shots": shots,
        "group": group,
        "new_tokens": new_tokens,
        "temperature": temperature,
        "kl_weight": kl_weight,
    }
    recipe = Recipe("grpo", all_linear_maps(lm, rank, scale=2.0), schedule, block, class_weight, 0.0, settings)
    return fine_tune(lm, task, prepared, output, recipe, run, write)


def begins_with_answer(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 where a completion begins with the answer and does not go on with it (``567`` is not ``56``), else 0."""
    return [
        float(re.match(rf"\s*{re.escape(answer.strip())}(?!\w|[.,]\d)", text) is not None)
        for text, answer in zip(completions, answers, strict=True)
    ]


def in_turn(items: Sequence[Item], n: int, *, seed: int) -> list[Item]:
    """``n`` items, the classes in turn, each class's in a random order that starts again when it is used up."""
    random = np.random.default_rng(seed)
    pools = [[pool[i] for i in random.permutation(len(pool))] for pool in by_label(items).values()]
    turns = ((pools[i % len(pools)], i // len(pools)) for i in range(n))
    return [pool[turn % len(pool)] for pool, turn in turns]


def _check_answers(lm: LanguageModel, items: Sequence[Item], new_tokens: int) -> None:
    for item in items:
        both, prompt = (lm.tokenizer(text)["input_ids"] for text in (f"{item.prompt}{item.answer}", item.prompt))
        size = len(both) - len(prompt)
        if size > new_tokens:
            raise InputError(f"new_tokens: {new_tokens}, but answer {item.answer!r} takes {size}; allow more")
