"""Requests to a model that follows instructions, what it replies, and whether that is what was asked for.

Nothing here counts, so that what a model learns from it is to follow, not to calculate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.training.evaluation import GENERATED_TOGETHER, generated_ids

MEMBERS = {
    "an animal": ("horse", "eagle", "salmon", "rabbit", "tiger", "goose", "spider", "whale", "donkey", "beetle",
                  "sheep", "lizard", "hawk", "beaver", "otter"),
    "a fruit": ("apple", "cherry", "mango", "banana", "peach", "lemon", "grape", "melon", "plum", "pear", "apricot",
                "fig", "papaya", "quince", "strawberry"),
    "a tool": ("hammer", "chisel", "wrench", "shovel", "drill", "pliers", "rake", "axe", "ladder", "saw", "screwdriver",
               "spade", "crowbar", "clamp", "anvil"),
    "a colour": ("green", "purple", "yellow", "brown", "silver", "scarlet", "white", "violet", "grey", "blue", "red",
                 "black", "pink", "turquoise", "beige"),
    "a country": ("Norway", "Brazil", "Kenya", "Japan", "Poland", "Canada", "Egypt", "Chile", "India", "Spain",
                  "Greece", "Peru", "Austria", "Vietnam", "Morocco"),
    "a musical instrument": ("violin", "trumpet", "piano", "flute", "drum", "cello", "harp", "guitar", "oboe", "organ",
                             "clarinet", "trombone", "banjo", "accordion", "saxophone"),
}  # fmt: skip
"""Kinds of things, and things of each kind."""
HELD_OUT = 5  # every fifth thing of a kind is asked about in tests alone


@dataclass(frozen=True)
class Request:
    """What is asked, about what thing."""

    kind: Literal["yes", "no", "repeat", "sentence"]
    """``yes`` and ``no`` are questions with that answer."""
    thing: str
    text: str

    def answered_by(self, reply: str) -> bool:
        """Whether a reply is right: the true answer, the thing and nothing else, or one sentence about it."""
        said = reply.strip().lower()
        if self.kind in ("yes", "no"):
            return said.startswith(self.kind) and not said[len(self.kind) :][:1].isalpha()
        if self.kind == "repeat":
            return said.strip("\"'. ") == self.thing.lower()
        return self.thing.lower() in said and said.endswith((".", "!")) and "\n" not in said


def requests(*, held_out: bool) -> list[Request]:
    """Four requests about each thing: the held-out things, or all others."""
    kinds, asked = list(MEMBERS), []
    for k, kind in enumerate(kinds):
        other = kinds[(k + 1) % len(kinds)]
        for i, thing in enumerate(MEMBERS[kind]):
            if (i % HELD_OUT == HELD_OUT - 1) == held_out:
                asked += [
                    Request("yes", thing, f'Is "{thing}" {kind}? Answer yes or no.'),
                    Request("no", thing, f'Is "{thing}" {other}? Answer yes or no.'),
                    Request("repeat", thing, f"Repeat this word and say nothing else: {thing}"),
                    Request("sentence", thing, f"Write one short sentence about this: {thing}"),
                ]
    return asked


def replies(lm: LanguageModel, prompts: Sequence[str], *, new_tokens: int) -> tuple[list[str], list[bool]]:
    """What the model writes greedily after each prompt, up to its end of text; and whether it came to that."""
    order = sorted(range(len(prompts)), key=prompts.__getitem__)  # like requests together: their replies end alike
    texts, ended = [""] * len(prompts), [False] * len(prompts)
    for start in range(0, len(order), GENERATED_TOGETHER):
        rows = order[start : start + GENERATED_TOGETHER]
        ids, width = generated_ids(lm, [prompts[row] for row in rows], new_tokens, do_sample=False)
        written = lm.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
        ends = torch.isin(ids[:, width:], torch.tensor(ends_of(lm)).to(ids)).any(1).tolist()
        for row, text, end in zip(rows, written, ends, strict=True):
            texts[row], ended[row] = text.strip(), end
    return texts, ended


def ends_of(lm: LanguageModel) -> list[int]:
    """Tokens at which the model stops writing."""
    ends = lm.model.generation_config.eos_token_id if lm.model.generation_config else None
    known = ends if isinstance(ends, list) else [ends]
    return sorted({int(i) for i in (*known, lm.tokenizer.eos_token_id) if i is not None})
