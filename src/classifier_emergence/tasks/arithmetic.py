"""The arithmetic task: operations, their words, the originals' prompts, and the prompt bank with its splits."""

from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

OPERATIONS = ("multiply", "add", "subtract", "divide")
STYLES = ("symbol", "word", "story")

SIGNS = {"multiply": "*", "add": "+", "subtract": "-", "divide": "/"}

SYNONYMS = {
    "multiply": ("multiplication", "multiplied", "multiplying", "times", "product"),
    "add": ("addition", "added", "adding", "plus", "sum"),
    "subtract": ("subtraction", "subtracted", "subtracting", "minus", "difference"),
    "divide": ("division", "divided", "dividing", "quotient"),
}
"""Other words for each operation; scored apart from the operation word itself."""

SYMBOLS = {"multiply": ("*", "×", "·"), "add": ("+",), "subtract": ("-", "−", "–"), "divide": ("/", "÷")}
"""Signs for each operation; scored apart, since prompts of the symbol style contain them."""


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


# --- The originals' prompts, in their order: with four unshuffled folds, fold k is row k of these tables. ---


def _rows(*rows: str) -> dict[str, tuple[str, ...]]:
    columns = zip(*(row.split(" | ") for row in rows), strict=True)
    return dict(zip(OPERATIONS, columns, strict=True))


REPORTED = {
    "symbol": _rows(
        "7 * 8 = | 23 + 45 = | 50 - 23 = | 48 / 6 =",
        "12 * 5 = | 17 + 38 = | 89 - 34 = | 81 / 9 =",
        "3 * 9 = | 11 + 22 = | 77 - 11 = | 36 / 4 =",
        "6 * 7 = | 5 + 9 = | 40 - 15 = | 24 / 3 =",
    ),
    "no_space": _rows(
        "7*8= | 23+45= | 50-23= | 48/6=",
        "12*5= | 17+38= | 89-34= | 81/9=",
        "45*45= | 56+78= | 100-37= | 72/8=",
        "9*11= | 12+34= | 67-19= | 56/7=",
    ),
    "word": _rows(
        "What is 7 times 8? | What is 23 plus 45? | What is 50 minus 23? | What is 48 divided by 6?",
        "Calculate 12 times 5 | Calculate 17 plus 38 | Calculate 89 minus 34 | Calculate 81 divided by 9",
        "Find 3 times 9 | Find 11 plus 22 | Find 77 minus 11 | Find 36 divided by 4",
        "Compute 6 times 7 | Compute 5 plus 9 | Compute 40 minus 15 | Compute 24 divided by 3",
    ),
}
"""Training prompts of the reported protocol: set -> operation -> four prompts."""

HELD_OUT = _rows("11 * 12 = | 13 + 14 = | 15 - 6 = | 12 / 4 =", "6 * 9 = | 25 + 17 = | 20 - 8 = | 15 / 3 =")
"""The eight held-out symbol prompts: operation -> two prompts."""

LENS = _rows("7 * 8 = | 23 + 45 = | 50 - 23 = | 48 / 6 =", "12 * 5 = | 17 + 38 = | 89 - 34 = | 81 / 9 =")
"""The eight logit-lens prompts: operation -> two prompts."""


def labelled(prompts: dict[str, tuple[str, ...]]) -> tuple[list[str], list[int]]:
    """Texts and class indices of a table above, operation by operation."""
    pairs = [(text, OPERATIONS.index(operation)) for operation, texts in prompts.items() for text in texts]
    texts, labels = zip(*pairs, strict=True)
    return list(texts), list(labels)


# --- The prompt bank. A frame keeps its topic, people and question over the four operations as far as the situation
# allows, so that neither the topic nor the frame gives the class away. ---

_SYMBOL_FRAMES = (
    "{a} {s} {b} =",
    "{a}{s}{b}=",
    "Calculate: {a} {s} {b} =",
    "Q: {a} {s} {b} =",
    "({a} {s} {b}) =",
    "The result of {a} {s} {b} =",
    "Let y = {a} {s} {b}. Then y =",
    "Homework, exercise 1: {a} {s} {b} =",
)

_WORD_FRAMES = {
    "multiply": (
        "What is {a} times {b}?",
        "Calculate {a} times {b}",
        "Find {a} times {b}",
        "Compute {a} multiplied by {b}",
        "The product of {a} and {b} is",
        "If you multiply {a} by {b}, you get",
        "How much is {a} multiplied by {b}?",
        "Tell me the result of multiplying {a} by {b}.",
    ),
    "add": (
        "What is {a} plus {b}?",
        "Calculate {a} plus {b}",
        "Find {a} plus {b}",
        "Compute {a} added to {b}",
        "The sum of {a} and {b} is",
        "If you add {a} to {b}, you get",
        "How much is {a} added to {b}?",
        "Tell me the result of adding {a} to {b}.",
    ),
    "subtract": (
        "What is {a} minus {b}?",
        "Calculate {a} minus {b}",
        "Find {a} minus {b}",
        "Compute {b} subtracted from {a}",
        "The difference of {a} and {b} is",
        "If you subtract {b} from {a}, you get",
        "How much is {b} subtracted from {a}?",
        "Tell me the result of subtracting {b} from {a}.",
    ),
    "divide": (
        "What is {a} divided by {b}?",
        "Calculate {a} divided by {b}",
        "Find {a} divided by {b}",
        "Compute {a} over {b}",
        "The quotient of {a} and {b} is",
        "If you divide {a} by {b}, you get",
        "How much is {a} over {b}?",
        "Tell me the result of dividing {a} by {b}.",
    ),
}

_STORY_FRAMES = {
    "multiply": (
        "Anna has {a} boxes and every box holds {b} pens. How many pens does Anna have?",
        "A hall has {a} rows with {b} seats in every row. How many seats does the hall have?",
        "A farmer fills {a} trays with {b} eggs in every tray. How many eggs does the farmer have?",
        "Carla reads for {a} days, {b} pages every day. How many pages does Carla read?",
        "Buses leave the city, {a} of them with {b} passengers in every bus. How many passengers leave?",
        "Every one of {a} players puts {b} coins into a pot. How many coins are in the pot?",
        "A gardener ties {a} ropes of {b} metres into one. How many metres long is the rope?",
        "A ticket costs {a} euros and Dan buys {b} tickets. How many euros does Dan pay?",
    ),
    "add": (
        "Anna has {a} pens and Ben gives her {b} pens. How many pens does Anna have?",
        "A hall has {a} seats and workers bring in {b} seats. How many seats does the hall have?",
        "A farmer has {a} eggs and collects {b} eggs today. How many eggs does the farmer have?",
        "Carla reads {a} pages on Monday and {b} pages on Tuesday. How many pages does Carla read?",
        "Buses leave the city, one with {a} and one with {b} passengers. How many passengers leave?",
        "A pot holds {a} coins and a player puts {b} coins into it. How many coins are in the pot?",
        "A gardener ties a rope of {a} metres to one of {b} metres. How many metres long is the rope?",
        "A ticket costs {a} euros, a drink {b} euros, and Dan buys both. How many euros does Dan pay?",
    ),
    "subtract": (
        "Anna had {a} pens and Ben took {b} pens. How many pens does Anna have?",
        "A hall had {a} seats and workers carried away {b} seats. How many seats does the hall have?",
        "A farmer had {a} eggs and broke {b} eggs today. How many eggs does the farmer have?",
        "Carla skips {b} pages of a book of {a} pages. How many pages does Carla read?",
        "A bus arrives with {a} passengers and {b} passengers get off. How many passengers leave?",
        "A pot held {a} coins and a player took {b} coins out of it. How many coins are in the pot?",
        "A gardener cuts {b} metres off a rope of {a} metres. How many metres long is the rope?",
        "A ticket costs {a} euros and Dan has a voucher of {b} euros. How many euros does Dan pay?",
    ),
    "divide": (
        "Anna lays {a} pens in {b} equal rows. How many pens does a row have?",
        "A hall has {a} seats in {b} equal rows. How many seats does a row have?",
        "A farmer fills {b} trays evenly with {a} eggs. How many eggs does a tray have?",
        "Carla reads {a} pages in {b} days, evenly. How many pages a day does Carla read?",
        "Buses leave the city, {b} equally full ones with {a} passengers. How many passengers are in a bus?",
        "A pot holds {a} coins and {b} players empty it evenly. How many coins are in a hand?",
        "A gardener cuts a rope of {a} metres into {b} equal ropes. How many metres long is a rope?",
        "Tickets for {b} friends cost {a} euros and all pay alike. How many euros does a friend pay?",
    ),
}

N_TEMPLATES = len(_SYMBOL_FRAMES)


def frames(style: str, operation: str) -> tuple[str, ...]:
    """The templates of a style for an operation, with fields ``{a}`` and ``{b}``."""
    if style == "symbol":
        return tuple(frame.replace("{s}", SIGNS[operation]) for frame in _SYMBOL_FRAMES)
    return {"word": _WORD_FRAMES, "story": _STORY_FRAMES}[style][operation]


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
