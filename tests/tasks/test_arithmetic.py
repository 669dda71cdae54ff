import re
from collections import Counter

import numpy as np
import pytest

from classifier_emergence.tasks.arithmetic import (
    HELD_OUT,
    LENS,
    N_TEMPLATES,
    OPERATIONS,
    REPORTED,
    STYLES,
    SYNONYMS,
    frames,
    labelled,
    prompt_bank,
)
from classifier_emergence.tasks.splits import rotations
from experiments.params import load_params

BANK = load_params().bank


@pytest.mark.parametrize("style", STYLES)
def test_the_bank_is_balanced_and_its_operands_say_nothing(style: str) -> None:
    bank = prompt_bank(style, BANK)
    assert len(bank) >= 400
    assert N_TEMPLATES >= 6
    cells = Counter((prompt.operation, prompt.template) for prompt in bank)
    assert len(cells) == len(OPERATIONS) * N_TEMPLATES
    assert len(set(cells.values())) == 1
    by_operation = {op: sorted(p.pair for p in bank if p.operation == op) for op in OPERATIONS}
    assert all(pairs == by_operation["multiply"] for pairs in by_operation.values())
    assert len({prompt.text for prompt in bank}) == len(bank)


@pytest.mark.parametrize("style", STYLES)
def test_every_operation_is_exact_and_not_negative_on_every_pair(style: str) -> None:
    assert all(a % b == 0 and a - b >= 0 for a, b in (prompt.pair for prompt in prompt_bank(style, BANK)))


def test_the_bank_follows_its_seed() -> None:
    assert prompt_bank("word", BANK) == prompt_bank("word", BANK)
    assert prompt_bank("word", BANK) != prompt_bank("word", BANK.model_copy(update={"seed": 1}))


def test_symbol_prompts_end_in_the_equals_sign() -> None:
    tables = [REPORTED["symbol"], REPORTED["no_space"], HELD_OUT, LENS]
    texts = [text for table in tables for text in labelled(table)[0]]
    texts += [prompt.text for prompt in prompt_bank("symbol", BANK)]
    assert all(text.endswith("=") for text in texts)


def test_stories_contain_no_operation_word() -> None:
    banned = {*OPERATIONS, *(word for words in SYNONYMS.values() for word in words)}
    banned |= {
        "total",
        "more",
        "less",
        "fewer",
        "altogether",
        "share",
        "split",
        "per",
        "left",
        "remain",
        "twice",
    }
    for operation in OPERATIONS:
        for frame in frames("story", operation):
            assert not banned & set(re.findall(r"[a-z]+", frame.lower())), frame
            assert not set("+*/=×÷−-") & set(frame), frame


def test_word_prompts_contain_no_sign() -> None:
    assert not [p.text for p in prompt_bank("word", BANK) if set("+*/=×÷−-") & set(p.text)]


def test_the_reported_prompts_are_those_of_the_sources() -> None:
    texts, labels = labelled(REPORTED["word"])
    assert len(texts) == 16
    assert texts[0] == "What is 7 times 8?"
    assert texts[-1] == "Compute 24 divided by 3"
    assert labels == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert labelled(HELD_OUT)[0] == [
        "11 * 12 =", "6 * 9 =", "13 + 14 =", "25 + 17 =", "15 - 6 =", "20 - 8 =", "12 / 4 =", "15 / 3 =",
    ]  # fmt: skip


@pytest.mark.parametrize("group", ["pair", "template"])
@pytest.mark.parametrize("folds", [3, 4])
def test_held_out_means_held_out(group: str, folds: int) -> None:
    bank = prompt_bank("story", BANK)
    groups = [getattr(prompt, group) for prompt in bank]
    tested = []
    for split in rotations(groups, folds, seed=0):
        parts = [{groups[i] for i in part} for part in (split.train, split.validation, split.test)]
        assert sum(len(part) for part in parts) == len(set(groups))
        assert len(split.train) + len(split.validation) + len(split.test) == len(bank)
        assert all(len(part) for part in parts)
        tested.extend(split.test)
    assert np.array_equal(np.sort(tested), np.arange(len(bank)))
