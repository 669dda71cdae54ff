"""The stages on instruction tuning: what is asked, what is trained on, what is compared."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.results import read_result
from classifier_emergence.tasks.arithmetic import OPERATIONS, prompt_bank
from experiments.params import Params
from experiments.shared import conversations as shared
from experiments.shared.conversations import MEMBERS, Request, replies, requests
from experiments.shared.model import build
from experiments.shared.probing import held_out_probes
from experiments.stages import conversations, tuning
from experiments.stages.tuning import PROBED, contrasts, examples, merged, probed, reward, tune

TEACHER, KEY = "tiny-llama", "tiny-gemma"


@pytest.mark.parametrize(
    ("kind", "reply", "right"),
    [
        ("yes", "Yes, it is.", True), ("yes", "yes", True), ("yes", "No.", False), ("yes", "Yesterday", False),
        ("no", "No", True), ("no", "Not sure", False), ("no", "", False),
        ("repeat", "Norway", True), ("repeat", '"norway."', True), ("repeat", "Norway is far", False),
        ("sentence", "Norway has fjords.", True), ("sentence", "It has fjords.", False),
        ("sentence", "Norway has", False), ("sentence", "Norway.\nNorway.", False),
    ],
)  # fmt: skip
def test_a_reply_is_right_if_it_is_what_was_asked_for(kind: str, reply: str, right: bool) -> None:
    assert Request(kind, "Norway", "").answered_by(reply) == right  # type: ignore[arg-type]


def test_no_thing_of_the_tests_is_in_any_conversation() -> None:
    train, test = (requests(held_out=part) for part in (False, True))
    assert {r.thing for r in train}.isdisjoint(r.thing for r in test)
    assert {r.thing for r in (*train, *test)} == {thing for things in MEMBERS.values() for thing in things}
    assert len(train) == 4 * len(test)
    assert not any(character.isdigit() for r in (*train, *test) for character in r.text)


def test_the_control_sees_the_same_words_in_another_order(params: Params) -> None:
    lm = build(params, KEY)
    written = [{"request": "Is it so or is it not so", "reply": "it is so and it is not"}]
    (told,), (control,) = (examples(lm, written, params, seed) for seed in (None, 1))
    texts = [lm.tokenizer.decode(one.ids, skip_special_tokens=True) for one in (told, control)]
    assert texts[0] != texts[1]
    assert sorted(texts[0].split()) == sorted(texts[1].split())
    assert told.ids[told.prompt_length :][-1] == lm.tokenizer.eos_token_id


def test_a_merged_model_is_the_adapted_one_and_the_base_stays(params: Params, tmp_path: Path) -> None:
    lm = build(params, KEY)
    before = residual_stream(lm, ["7 * 8 ="])
    written = [{"request": "Is it so", "reply": "it is"}] * 4
    members = {"tuned-0": ("tuned", 0), "control-0": ("control", 0)}
    found = dict(tune(lm, tmp_path / "work", list(members), written, members, params, tmp_path / "adapters"))
    assert found["tuned-0"]["losses"][0]["loss"] > 0
    tuned = residual_stream(merged(lm, tmp_path / "adapters" / "tuned-0"), ["7 * 8 ="])
    assert not torch.allclose(tuned, before, atol=1e-4)
    assert torch.equal(residual_stream(lm, ["7 * 8 ="]), before)


def test_the_base_model_with_all_seeds_is_each_seed_alone(params: Params, tmp_path: Path) -> None:
    lm = build(params, KEY)
    together = reward(lm, tmp_path / "both", [0, 1], params)
    alone = reward(lm, tmp_path / "one", [1], params)
    assert alone[0]["symbol"]["alignment"]["mean"] == pytest.approx(
        together[1]["symbol"]["alignment"]["mean"], rel=1e-3
    )
    assert together[0]["watched"] != together[1]["watched"]


def test_probes_are_those_of_the_stage_on_probing(params: Params) -> None:
    lm = build(params, KEY)
    found = probed(lm, params)
    for style, by in PROBED.items():
        bank = prompt_bank(style, params.bank)
        y = torch.tensor([OPERATIONS.index(prompt.operation) for prompt in bank])
        groups = [getattr(prompt, by) for prompt in bank]
        states = residual_stream(lm, [prompt.text for prompt in bank])
        there = held_out_probes(states, y, groups, params.probing, seed=params.probing.seed)
        assert torch.equal(found[style]["correct"], there.correct[:, 0])
        assert found[style]["clusters"] == len(set(groups))


def test_a_model_minus_itself_is_nothing(params: Params, tmp_path: Path) -> None:
    lm = build(params, KEY)
    one = [{"probes": probed(lm, params), "rewards": reward(lm, tmp_path / "work", [0], params)}]
    found = contrasts(lm, one, one, params)
    assert [found["probes"][style]["value"] for style in PROBED] == [0, 0]
    assert (found["alignment"]["value"], found["steps_to_half"]["value"]) == (0, 0)


def test_the_stages_run_and_their_result_compares_all_models(params: Params) -> None:
    conversations.run(params, TEACHER)
    written = read_result(f"results/conversations/{TEACHER}.json")
    assert {pair["request"] for pair in written["train"]["replies"]} <= {r.text for r in requests(held_out=False)}
    tuning.run(params, KEY)
    found = read_result(f"results/tuning/{KEY}.json")
    assert set(found["models"]) == {"base", "tuned", "control"}
    assert all(len(model["reward"]["watched"]) == len(params.tuning.seeds) for model in found["models"].values())
    assert found["conversations"] == len(written["train"]["replies"])
    assert not Path("data/runs/tuning", KEY).exists()


def test_a_reply_ends_at_the_end_of_text(params: Params) -> None:
    lm = build(params, KEY)
    texts, ended = replies(lm, ["7 * 8 =", "what is"], new_tokens=3)
    assert len(texts) == len(ended) == 2
    lm.model.generation_config.eos_token_id = int(np.argmax(np.bincount(lm.tokenizer(texts[0])["input_ids"])))
    _, ended = replies(lm, ["7 * 8 ="], new_tokens=3)
    assert ended == [True]


def test_replies_stand_in_the_order_of_their_prompts(params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    def echo(lm: LanguageModel, prompts: list[str], *_: Any, **__: Any) -> tuple[torch.Tensor, int]:
        return lm.tokenizer(prompts, return_tensors="pt", padding=True)["input_ids"], 0

    monkeypatch.setattr(shared, "generated_ids", echo)
    monkeypatch.setattr(shared, "GENERATED_TOGETHER", 2)
    prompts = ["what is 7 times 8", "7 * 8 =", "what is"]
    assert replies(build(params, KEY), prompts, new_tokens=3)[0] == prompts
