"""The arithmetic task: operations, their words, the originals' prompts, and the prompt bank."""

from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from classifier_emergence.tasks.prompts import PROMPTS

SIGNS: dict[str, str] = PROMPTS["signs"]
OPERATIONS = tuple(SIGNS)
STYLES: tuple[str, ...] = tuple(PROMPTS["frames"])
N_TEMPLATES = len(PROMPTS["frames"]["symbol"])


def _tuples(table: dict[str, list[str]]) -> dict[str, tuple[str, ...]]:
    return {operation: tuple(texts) for operation, texts in table.items()}


SYNONYMS = _tuples(PROMPTS["synonyms"])
"""Other words for each operation; scored apart from the operation word itself."""

SYMBOLS = _tuples(PROMPTS["symbols"])
"""Signs for each operation; scored apart, since prompts of the symbol style contain them."""

REPORTED = {name: _tuples(table) for name, table in PROMPTS["reported"].items()}
"""The originals' training prompts, in their order: set -> operation -> four prompts, one in each unshuffled fold."""

HELD_OUT = _tuples(PROMPTS["held_out"])
"""The originals' eight held-out symbol prompts: operation -> two prompts."""

LENS = _tuples(PROMPTS["lens"])
"""The originals' eight logit-lens prompts: operation -> two prompts."""


class Bank(BaseModel):
    """The prompt bank of the controlled protocol (see ``prompt_bank``)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seed: int = Field(ge=0)
    pairs: int = Field(ge=8, multiple_of=8)  # as many prompts for each of the eight templates
    smallest: int = Field(ge=2)
    largest: int = Field(ge=3)

    @model_validator(mode="after")
    def _enough_pairs(self) -> "Bank":
        available = (self.largest - self.smallest + 1) ** 2
        if self.pairs > available:
            raise ValueError(f"pairs is {self.pairs}, but {self.smallest}..{self.largest} gives {available} pairs")
        return self


@dataclass(frozen=True)
class Prompt:
    """One prompt with what a sound split must know about it."""

    text: str
    operation: str
    template: int
    """Index of the surface frame within its style; the same frame serves all operations."""
    pair: tuple[int, int]
    """Operands (a, b)."""


def labelled(prompts: dict[str, tuple[str, ...]]) -> tuple[list[str], list[int]]:
    """Texts and class indices of a table such as ``LENS``, operation by operation."""
    pairs = [(text, OPERATIONS.index(operation)) for operation, texts in prompts.items() for text in texts]
    texts, labels = zip(*pairs, strict=True)
    return list(texts), list(labels)


def frames(style: str, operation: str) -> tuple[str, ...]:
    """The templates of a style for an operation, with fields ``{a}`` and ``{b}``."""
    table = PROMPTS["frames"][style]
    if style == "symbol":  # one frame for all operations
        return tuple(frame.replace("{s}", SIGNS[operation]) for frame in table)
    return tuple(frame[operation] for frame in table)


def prompt_bank(style: str, bank: Bank) -> list[Prompt]:
    """``4 * bank.pairs`` prompts of one style.

    Operand pairs are drawn without replacement from all (b*q, b) with b and q in ``smallest..largest``, so that every
    operation is exact and non-negative on every pair. Every pair occurs with every operation: operands carry no
    information about the class. Every operation and every (operation, template) cell occurs equally often.
    """
    factors = range(bank.smallest, bank.largest + 1)
    available = np.array([(b * q, b) for b in factors for q in factors])
    chosen = np.random.default_rng(bank.seed).permutation(len(available))[: bank.pairs]
    prompts = []
    for i, (a, b) in enumerate(available[chosen].tolist()):
        for o, operation in enumerate(OPERATIONS):
            template = (i + o) % N_TEMPLATES  # shifted, so that a pair meets a frame once
            text = frames(style, operation)[template].format(a=a, b=b)
            prompts.append(Prompt(text, operation, template, (a, b)))
    return prompts
