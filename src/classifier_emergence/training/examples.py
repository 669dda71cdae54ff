"""Texts that an adapter is trained on, what is minimised on them, and a batch as the model takes it."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from classifier_emergence.errors import InputError
from classifier_emergence.reading.tree import joint_pass


@dataclass(frozen=True)
class Objective:
    """What is minimised: ``w * CE(lens at a layer, word) + (1 - w) * CE(answer)``, or a head in place of the lens."""

    class_weight: float
    """w, within [0, 1]."""
    layer: int | None = None
    """0-based block after which the lens reads; may be None if w is 0."""
    answer_shifted: bool = True
    """False scores the logits at a token against that same token: a flaw of the originals."""
    read: Literal["prompt", "answer"] = "prompt"
    """Where the lens reads: at the last token of the prompt, or (a flaw of the originals) of the answer."""
    classes: int | None = None
    """Train a linear head with so many classes on the state at ``layer`` instead of reading the lens."""

    def __post_init__(self) -> None:
        check_class_weight(self.class_weight, self.layer)


def check_class_weight(weight: float, layer: int | None) -> None:
    """Refuse the weight of a loss on the lens that is no share, or a lens that reads nowhere.

    Raises:
        InputError: One of the two.
    """
    if not 0 <= weight <= 1:
        raise InputError(f"class_weight: {weight} is not within [0, 1]")
    if weight and layer is None:
        raise InputError("layer: none given, but class_weight is not 0; say which layer the lens reads")


@dataclass(frozen=True)
class Example:
    """One training text: ids of prompt and answer, and the class that the lens should name at the prompt's end."""

    ids: list[int]
    prompt_length: int
    target: int
    """Token id of the class's word, or number of the class for a head."""
    read_at: int | None = None
    """Index of the token at which the lens should name it; None: the one that ``Objective.read`` says."""


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, target: int = 0) -> Example:
    """Token ids of a prompt and what should follow it, ended by the end-of-text token.

    Raises:
        InputError: The tokens of the prompt change when the answer follows, so that no position is "the prompt's last".
    """
    prompt_ids: list[int] = tokenizer(prompt)["input_ids"]
    ids: list[int] = tokenizer(prompt + answer)["input_ids"]
    if ids[: len(prompt_ids)] != prompt_ids or len(ids) == len(prompt_ids):
        raise InputError(f"prompt {prompt!r}: the tokenizer splits it in another way when {answer!r} follows")
    return Example([*ids, int(tokenizer.eos_token_id)], len(prompt_ids), target)


def order(n: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Which of ``n`` examples each step takes: every epoch is a permutation of its own, its last batch what is left."""
    batches: list[list[int]] = []
    for epoch in itertools.count():
        permutation = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        batches += [permutation[start : start + batch_size] for start in range(0, n, batch_size)]
        if len(batches) >= steps:
            return batches[:steps]
    raise AssertionError


def collate(
    batches: Mapping[str, Sequence[Example]],
    objectives: Mapping[str, Objective],
    model: PreTrainedModel,
    rank: int = 0,
    world: int = 1,
) -> dict[str, Any]:
    """Inputs of one pass for the batches of all members, and the tokens that their losses read.

    Args:
        batches: By member.
        objectives: By member.
        model: Takes the inputs.
        rank: Of this process, which takes every ``world``-th example from this one on.
        world: Number of processes among which the batches are shared.

    Returns:
        ``inputs`` of the decoder; ``rows`` of each member in them; and for each of the ``members`` ``read`` and
        ``target`` (batch,): where the lens reads and what it should say; ``answer_read`` and ``answer_token`` (answer
        tokens,): the logits at the one are scored against the other. Where something is read is counted among the
        flattened states. ``class_loss`` and ``answer_loss``: by what a sum of losses is divided for the mean over the
        batch.
    """
    whole = batches
    batches = {name: batch[rank::world] for name, batch in whole.items()}
    # The last token of a text is only predicted, so it need not pass.
    texts = [
        [example.ids[:-1] if objectives[name].answer_shifted else example.ids for example in batch]
        for name, batch in batches.items()
    ]
    inputs, paths, rows = joint_pass(texts, model)
    members = {
        name: {
            **_what_is_read(batch, objectives[name], of_batch),
            "class_loss": len(whole[name]) / world,
            "answer_loss": sum(len(example.ids) - example.prompt_length for example in whole[name]) / world,
        }
        for (name, batch), of_batch in zip(batches.items(), paths, strict=True)
    }
    return {"inputs": inputs, "rows": rows, "members": members}


def _what_is_read(batch: Sequence[Example], objective: Objective, paths: list[list[int]]) -> dict[str, Tensor]:
    back = 1 if objective.answer_shifted else 0
    answers = [
        (path[position - back], example.ids[position])
        for path, example in zip(paths, batch, strict=True)
        for position in range(example.prompt_length, len(example.ids))
    ]
    read, token = torch.tensor(answers).T
    ends = [_read_of(example, objective) for example in batch]
    return {
        "read": torch.tensor([path[end] for path, end in zip(paths, ends, strict=True)]),
        "target": torch.tensor([example.target for example in batch]),
        "answer_read": read,
        "answer_token": token,
    }


def _read_of(example: Example, objective: Objective) -> int:
    if example.read_at is not None:
        return example.read_at
    # The end-of-text token is not part of the answer that the originals read after.
    return example.prompt_length - 1 if objective.read == "prompt" else len(example.ids) - 2
