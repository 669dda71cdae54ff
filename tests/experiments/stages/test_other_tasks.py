"""The stage on other tasks: what is held out, planted signals that it finds, and words that do not fit."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from classifier_emergence.errors import InputError
from classifier_emergence.reading.layers import layer_row
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.results import plain, read_result
from classifier_emergence.tasks.classification import Item, balanced, get_task
from experiments.params import load_params
from experiments.stages import other_tasks
from experiments.stages.other_tasks import (
    HELD_OUT,
    NAMES,
    TaskStudy,
    examples,
    labels,
    lens_of_task,
    probe_task,
    prompts,
    train_arms,
)

ROOT = Path(__file__).resolve().parents[3]
PARAMS = load_params(ROOT / "params.tiny.yaml")
ONE_MODEL = pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)


@pytest.fixture(params=NAMES)
def study(lm: LanguageModel, request: pytest.FixtureRequest) -> TaskStudy:
    return TaskStudy(lm, PARAMS, get_task(request.param))


@ONE_MODEL
def test_groups_and_templates_of_the_tests_are_never_trained_on(study: TaskStudy) -> None:
    groups, templates = ({getattr(item, by) for item in study.train} for by in ("group", "template"))
    parts = study.test
    assert groups.isdisjoint(item.group for item in parts["held_out_groups"])
    assert templates.isdisjoint(item.template for item in parts["held_out_templates"])
    # One thing is held out at a time, so that a failure has one reason.
    assert templates >= {item.template for item in parts["held_out_groups"]}
    assert groups >= {item.group for item in parts["held_out_templates"]}
    for items in (study.train, *parts.values()):
        assert len(set(Counter(labels(items)).values())) == 1


@ONE_MODEL
@pytest.mark.parametrize("study", NAMES[:1], indirect=True)
def test_the_held_out_answers_need_the_held_out_operands(study: TaskStudy) -> None:
    trained_on, held_out = (
        {frozenset(re.findall(r"\d\d", prompt)) for prompt in prompts(items)}
        for items in (study.train, study.test["held_out_groups"])
    )
    assert trained_on.isdisjoint(held_out)


def planted(study: TaskStudy, kind: str, n: int, width: int) -> tuple[list[Item], torch.Tensor]:
    """Items and states of noise with a signal after L1: of the class, or of each group's class apart."""
    items = balanced(study.task.items, n, seed=0)
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(study.n_layers + 1, len(items), width, generator=generator)
    keys = [(item.label, item.group if kind == "group" else 0) for item in items]
    directions = {key: 8 * torch.randn(width, generator=generator) for key in sorted(set(keys))}
    states[layer_row(1)] += torch.stack([directions[key] for key in keys])
    return items, states


@ONE_MODEL
@pytest.mark.parametrize("by", ["group", "template"])
def test_a_planted_class_is_found_where_it_stands_and_nowhere_else(study: TaskStudy, by: str) -> None:
    items, states = planted(study, "class", 60, 32)
    found = probe_task(study, items, states, [getattr(item, by) for item in items])
    assert found["selected"]["layers"] == ["L1"] * PARAMS.other_tasks.folds
    assert found["selected"]["accuracy"] == found["accuracy"][layer_row(1)] == 1
    assert all(0.2 < accuracy < 0.5 for row, accuracy in enumerate(found["accuracy"]) if row != layer_row(1))
    assert 0.2 < found["selected"]["shuffled_accuracy"] < 0.5


@ONE_MODEL
def test_what_is_only_learnt_by_heart_does_not_pass_for_a_class(study: TaskStudy) -> None:
    items, states = planted(study, "group", 200, 256)
    across, within = (
        probe_task(study, items, states, [getattr(item, by) for item in items])["accuracy"][layer_row(1)]
        for by in ("group", "template")
    )
    assert across < 0.5
    assert within > across + 0.15


@ONE_MODEL
def test_the_lens_finds_a_planted_word_and_its_null_does_not(study: TaskStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    items = balanced(study.task.items, 10, seed=0)
    generator = torch.Generator().manual_seed(0)
    model = study.lm.readout
    # Words as far from each other as those of a large model; in the tiny one all lie in one direction.
    readout = replace(model, weight=0.5 * torch.randn(model.weight.shape, generator=generator))
    monkeypatch.setattr("classifier_emergence.reading.model.find_readout", lambda model: readout)
    states = torch.randn(study.n_layers + 1, len(items), readout.weight.shape[1], generator=generator)
    own = torch.tensor(labels(items))
    rows = torch.stack([readout.weight[word.ids].mean(0) for word in study.words])
    there = layer_row(2)
    states[there] = 0.1 * states[there] + rows[own]
    found = lens_of_task(study, items, states)
    least = 1 / (1 + PARAMS.other_tasks.null_words)
    assert found["largest"]["layer"] == "L2"
    assert found["largest"]["alignment"] == pytest.approx(found["alignment"]["mean"][there])
    assert found["largest"]["alignment"] > 0.5
    assert found["largest"]["p"] == found["null"]["contrast_p"][there] == pytest.approx(least)
    assert found["choice"]["accuracy"][there] == 1
    elsewhere = [row for row in range(study.n_layers + 1) if row != there]
    assert found["null"]["contrast_p"][elsewhere].mean() > 0.1
    assert np.mean([found["choice"]["accuracy"][row] for row in elsewhere]) < 0.5


@ONE_MODEL
def test_shuffled_targets_keep_their_numbers_but_not_their_prompts(study: TaskStudy) -> None:
    true, shuffled = (examples(study, study.words, 0, shuffled=flag) for flag in (False, True))
    assert Counter(e.target for e in true) == Counter(e.target for e in shuffled)
    same = sum(a.target == b.target for a, b in zip(true, shuffled, strict=True)) / len(true)
    assert 0.25 < same < 0.42
    assert [e.ids for e in true] == [e.ids for e in shuffled]


@ONE_MODEL
def test_a_word_of_several_pieces_is_refused_as_a_target(lm: LanguageModel) -> None:
    study = TaskStudy(lm, PARAMS, get_task("places"))
    words = [word_tokens(word, lm.tokenizer) for word in ("capital", "zyx wvu", "river")]
    with pytest.raises(InputError, match=r"^target word 'zyx wvu': with a leading space it is no single token"):
        examples(study, words, 0, shuffled=False)


@ONE_MODEL
def test_training_is_measured_apart_and_leaves_the_model_as_it_was(lm: LanguageModel, tmp_path: Path) -> None:
    study = TaskStudy(lm, PARAMS, get_task("comparison"))
    base = study.base_answers
    before = {name: p.clone() for name, p in lm.model.named_parameters()}
    arms, adapter = (
        {"dual_reward-0": ("dual_reward", 0), "shuffled_targets-0": ("shuffled_targets", 0)},
        tmp_path / "adapter",
    )

    def trained(work: str, *wanted: str) -> list[tuple[str, Any]]:
        names = [f"comparison-{name}" for name in wanted]
        return list(train_arms({"comparison": study}, tmp_path / work, names, "comparison", arms, adapter))

    ((_, result), (_, other)), ((name, again),) = trained("work", *arms), trained("again", "dual_reward-0")
    assert name == "comparison-dual_reward-0"
    assert plain(result) != plain(other)
    assert plain(result) == plain(again)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert set(HELD_OUT) < result.keys()
    change = result["held_out_groups"]["answers_change"]["mean"]
    assert change != 0
    assert change == pytest.approx(
        result["held_out_groups"]["answers_log_prob"]["mean"] - base["held_out_groups"].log_prob.mean().item(), abs=1e-4
    )
    for name, parameter in lm.model.named_parameters():
        assert torch.equal(parameter, before[name])


@ONE_MODEL
def test_a_stopped_study_goes_on_where_it_was(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results" / "fetch").mkdir(parents=True)
    (tmp_path / "results" / "fetch" / "m.json").write_text("{}")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # a worker would load the model itself
    monkeypatch.setattr(other_tasks, "load", lambda key, registry: lm)
    monkeypatch.setattr(other_tasks, "NAMES", ("places",))
    params = PARAMS.model_copy(update={"other_tasks": PARAMS.other_tasks.model_copy(update={"seeds": [0]})})
    other_tasks.run(params, "m")
    uncut = read_result("results/other_tasks/m.json")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as cut:
        cut.setattr(other_tasks, "arm_summary", stop)
        with pytest.raises(KeyboardInterrupt):
            other_tasks.run(params, "m")
    kept = {path.stem for path in Path("data/runs/other_tasks/m").glob("*.json")}
    assert kept == {"places-untrained", *(f"places-{arm}-0" for arm in other_tasks.ARMS)}
    Path("data/runs/other_tasks/m/places-shuffled_targets-0.json").unlink()  # as if it had been stopped there
    other_tasks.run(params, "m")
    assert read_result("results/other_tasks/m.json") == uncut
    assert uncut["places"]["dual_reward"]["held_out_groups"]["top"]["n"] == 3 * params.other_tasks.test_items
    assert len(uncut["places"]["lens"]["alignment"]["mean"]) == len(uncut["layers"])
    assert Path("data/adapters/other_tasks/m/places/adapter_model.safetensors").exists()
    assert not Path("data/runs/other_tasks/m").exists()
