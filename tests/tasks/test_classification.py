"""Tasks: what their prompts give away and what they must not."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classifier_emergence.errors import InputError
from classifier_emergence.tasks.arithmetic import prompt_bank
from classifier_emergence.tasks.classification import TASKS, Item, Task, balanced, get_task
from classifier_emergence.tasks.splits import rotations
from experiments.params import load_params

SHIPPED = {name: get_task(name) for name in TASKS}
tasks = pytest.mark.parametrize("task", SHIPPED.values(), ids=SHIPPED)
FRAMES = [re.escape(item.prompt).replace("Paris", "(.+)") for item in SHIPPED["places"].items[:8]]
quick = settings(deadline=None, max_examples=50)


def subject(task: Task, item: Item) -> str:
    """What an item is about: its operands in their order, or its name."""
    if task.name == "arithmetic":
        found = re.search(r"(\d+) ?[-+*/] ?(\d+)", item.prompt)
        assert found is not None
        return f"{found[1]} {found[2]}"
    if task.name == "comparison":
        return " ".join(re.findall(r"\d+", item.prompt)[:2])
    found = re.fullmatch(FRAMES[item.template], item.prompt)
    assert found is not None
    return found[1]


@tasks
def test_a_task_is_large_balanced_and_without_repeats(task: Task) -> None:
    assert task.name in TASKS
    assert len(task.items) >= 400
    assert len({item.prompt for item in task.items}) == len(task.items)
    assert len({item.template for item in task.items}) >= 6
    cells = Counter((item.label, item.template) for item in task.items)
    assert {label for label, _ in cells} == set(range(len(task.classes)))
    assert len(set(cells.values())) == 1
    assert len(cells) == len(task.classes) * len({item.template for item in task.items})


@tasks
def test_a_group_says_nothing_about_the_class(task: Task) -> None:
    by_group = defaultdict(Counter)
    for item in task.items:
        by_group[item.group][item.label] += 1
    for counts in by_group.values():
        assert set(counts) == set(range(len(task.classes)))
        assert len(set(counts.values())) == 1


@tasks
def test_what_an_item_is_about_stays_in_its_group(task: Task) -> None:
    groups = defaultdict(set)
    for item in task.items:
        groups[subject(task, item)].add(item.group)
    assert all(len(found) == 1 for found in groups.values())
    if task.name != "places":  # the other order of a pair, too
        pairs = {frozenset(pair.split()): found for pair, found in groups.items()}
        assert all(groups[pair] == pairs[frozenset(pair.split())] for pair in groups)


@tasks
def test_no_split_by_group_sees_a_subject_twice(task: Task) -> None:
    about = [subject(task, item) for item in task.items]
    for split in rotations([item.group for item in task.items], 4, seed=0):
        parts = [{about[i] for i in part} for part in (split.train, split.validation, split.test)]
        assert sum(map(len, parts)) == len(set(about))


@tasks
def test_no_prompt_holds_a_class_word(task: Task) -> None:
    assert len(set(task.words)) == len(task.classes)
    assert not [i.prompt for i in task.items if any(word in i.prompt.lower() for word in (*task.words, *task.classes))]


@tasks
def test_prompts_of_a_template_end_alike_whatever_the_class(task: Task) -> None:
    endings = defaultdict(set)
    for item in task.items:
        endings[item.template].add(item.prompt.rpartition(subject(task, item).split()[-1])[2])
    if task.name != "arithmetic":
        assert all(len(found) == 1 for found in endings.values())
    assert all(item.prompt == item.prompt.rstrip() for item in task.items)
    assert len({item.prompt[-1] for item in task.items if item.template == 0}) == 1


@tasks
def test_answers_have_their_leading_space_and_are_no_class_word(task: Task) -> None:
    for item in task.items:
        assert item.answer is not None
        assert re.fullmatch(r" \S.*", item.answer)
        assert item.answer.strip() not in task.words


def test_arithmetic_is_the_bank_of_the_paper_with_right_answers() -> None:
    items = SHIPPED["arithmetic"].items
    assert [item.prompt for item in items] == [prompt.text for prompt in prompt_bank("symbol", load_params().bank)]
    for item in items:
        problem = re.search(r"\d+ ?[-+*/] ?\d+", item.prompt)
        assert problem is not None
        assert eval(problem[0]) == int(str(item.answer))


def test_comparison_is_labelled_and_answered_right() -> None:
    task = SHIPPED["comparison"]
    for item in task.items:
        a, b = map(int, subject(task, item).split())
        assert task.classes[item.label] == ("larger" if a > b else "smaller" if a < b else "equal")
        assert item.answer == f" {max(a, b)}"


def test_larger_and_smaller_have_the_same_characters() -> None:
    by_cell = {(item.group, item.template, item.label): item.prompt for item in SHIPPED["comparison"].items}
    for (group, template, label), prompt in by_cell.items():
        if label == 0:
            assert sorted(prompt) == sorted(by_cell[group, template, 1])


def test_one_number_says_little_about_a_comparison() -> None:
    task = SHIPPED["comparison"]
    items = [item for item in task.items if item.label < 2 and item.template == 0]
    first = np.array([int(subject(task, item).split()[0]) for item in items])
    larger = np.array([item.label == 0 for item in items])
    best = max(np.mean((first > threshold) == larger) for threshold in range(100))
    assert best < 0.65


def test_places_have_one_continent_a_country_and_as_many_of_each_kind() -> None:
    task = SHIPPED["places"]
    of: dict[str, Item] = {}
    for item in task.items:
        other = of.setdefault(subject(task, item), item)
        assert (item.group, item.label, item.answer) == (other.group, other.label, other.answer)
    assert Counter(item.label for item in of.values()) == dict.fromkeys(range(3), len(of) // 3)
    expected = {
        "Paris": ("capital", " Europe"),
        "Kenya": ("country", " Africa"),
        "Ganges": ("river", " Asia"),
        "Kuala Lumpur": ("capital", " Asia"),
        "Essequibo": ("river", " South America"),
    }
    assert {name: (task.classes[of[name].label], of[name].answer) for name in expected} == expected
    assert of["Paris"].group == of["France"].group == of["Loire"].group


@pytest.mark.parametrize(
    ("name", "hint"), [("comparson", "did you mean 'comparison'?"), ("x\n\x1b", "choose one of arithmetic, ")]
)
def test_an_unknown_task_is_refused_in_one_line(name: str, hint: str) -> None:
    with pytest.raises(InputError, match=re.escape(hint)) as caught:
        get_task(name)
    assert str(caught.value).isprintable()


@quick
@given(st.sampled_from(TASKS), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_balanced_draw_is_balanced_in_every_leading_part(name: str, n: int, seed: int) -> None:
    task = SHIPPED[name]
    drawn = balanced(task.items, n, seed=seed)
    assert drawn == balanced(task.items, n, seed=seed)
    assert len(set(drawn)) == len(drawn) == n * len(task.classes)
    assert set(drawn) <= set(task.items)
    templates = len({item.template for item in task.items})
    for rounds in range(1, n + 1):
        leading = drawn[: rounds * len(task.classes)]
        assert Counter(item.label for item in leading) == dict.fromkeys(range(len(task.classes)), rounds)
        cells = Counter((item.label, item.template) for item in leading)
        assert max(cells.values()) <= -(-rounds // templates)


def test_another_seed_draws_others() -> None:
    items = SHIPPED["places"].items
    assert set(balanced(items, 20, seed=0)) != set(balanced(items, 20, seed=1))


def test_a_draw_of_more_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match=r"^n: 121 items of every class, but class 0 has 120; "):
        balanced(SHIPPED["arithmetic"].items, 121, seed=0)
