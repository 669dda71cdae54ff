"""Fine-tuning on anyone's task: it does what it says on held-out items, and leaves nothing half done."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build
from filelock import FileLock
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from classifier_emergence.errors import InputError
from classifier_emergence.instruments import finetune as finetuning
from classifier_emergence.instruments.fine_tuned import FineTuned
from classifier_emergence.instruments.finetune import dual_reward, sft
from classifier_emergence.instruments.grpo import begins_with_answer, grpo, in_turn
from classifier_emergence.instruments.lens import lens
from classifier_emergence.instruments.prepared_task import held_out, prepare
from classifier_emergence.models.loading import load, open_model
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.results import write_result
from classifier_emergence.tasks.classification import Item, Task
from classifier_emergence.tasks.problems import Problem
from classifier_emergence.training.adapters import Adapter
from classifier_emergence.training.evaluation import alignment
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.modules import VO

WORDS = ("multiply", "add")


def arithmetic(*, answers: bool = True) -> Task:
    pairs = [(a, b) for a in range(2, 8) for b in range(2, 6)]
    problems = [
        (group, label, Problem(word, *pair)) for group, pair in enumerate(pairs) for label, word in enumerate(WORDS)
    ]
    items = [Item(p.symbol, label, group, 0, f" {p.answer}" if answers else None) for group, label, p in problems]
    return Task("mine", WORDS, WORDS, tuple(items))


@pytest.fixture
def llama(tiny_models: Path) -> LanguageModel:
    return load(str(tiny_models / "tiny-llama"), {})


@pytest.fixture
def outspoken(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with a larger gain before the unembedding; the tiny model itself cannot be sure of any token."""
    folder = tmp_path_factory.mktemp("outspoken") / "model"
    shutil.copytree(tiny_models / "tiny-llama", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 20
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_lens_names_the_class_after_dual_reward_and_the_adapter_keeps_it(outspoken: Path, tmp_path: Path) -> None:
    llama = load(str(outspoken), {})
    weights = {name: p.clone() for name, p in llama.model.named_parameters()}
    settings: dict[str, Any] = {"steps": 120, "learning_rate": 5e-3, "layer": "L3"}
    taught = dual_reward(llama, arithmetic(), tmp_path / "adapter", **settings)
    row = taught.layers.index("L3")
    assert taught.before.alignment[row] < 0.1
    assert taught.before.top.accuracy == 0
    assert taught.after.alignment[row] > 3 * taught.before.alignment[row]
    assert taught.after.top.accuracy > taught.before.top.accuracy
    assert taught.after.top.n == taught.n_test == len(held_out(arithmetic())[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    write_result(tmp_path / "dual.json", taught.to_dict())
    assert len(taught.rows()) == 5
    assert all(torch.equal(p, weights[name]) for name, p in llama.model.named_parameters())

    again = open_model(str(outspoken), adapter=tmp_path / "adapter")
    items = held_out(arithmetic())[1]
    words = [word_tokens(word, llama.tokenizer) for word in WORDS]
    scores = alignment(again, [i.prompt for i in items], [i.label for i in items], words)
    assert np.allclose(scores.own_word.double().mean(-1).numpy(), taught.after.alignment, rtol=1e-4)


def test_a_run_that_destroys_the_model_says_so(llama: LanguageModel) -> None:
    llama.readout.norm.weight.data *= 5  # the tiny model is not sure of anything
    good = dual_reward(llama, arithmetic(), steps=30, learning_rate=1e-4)
    assert 0 < good.drift < finetuning.LARGE
    assert not any("neutral text" in warning for warning in good.warnings)
    bad = dual_reward(llama, arithmetic(), steps=4, learning_rate=1e6)
    told = bad.warnings[-1]
    assert told.startswith(f"the model says something else on neutral text (by {bad.drift:.3g} nats a token)")
    assert not any("rose" in warning for warning in good.warnings)


@pytest.mark.parametrize(
    ("rise", "groups", "told"),
    [
        ([0.9, 1.0, 1.1], [0, 1, 2], "rose by 1 nats on held-out items (95% interval 0.752 to 1.25, n = 3)"),
        ([0.9, 1.0, -1.9], [0, 1, 2], None),  # noise
        ([-0.9, -1.0, -1.1], [0, 1, 2], None),
        ([0.9, 1.0, 1.1], [7, 7, 7], None),  # one problem in three words says nothing of others
        ([], [0, 1, 2], None),  # no loss is trained
    ],
)
def test_a_loss_that_rises_by_more_than_items_vary_is_told(rise: list[float], groups: list[int], told: str) -> None:
    warnings = list(finetuning._warnings(np.array(rise), groups, 0.1))
    assert len(warnings) == bool(told)
    assert not told or told in warnings[0]


def test_a_run_that_is_ended_before_its_adapter_is_in_place_writes_its_result_again(
    llama: LanguageModel, tmp_path: Path
) -> None:
    def ended(_: object) -> None:
        raise KeyboardInterrupt

    written: list[FineTuned] = []
    settings: dict[str, Any] = {"steps": 4, "learning_rate": 1e-2, "output": tmp_path / "adapter"}
    with pytest.raises(KeyboardInterrupt):
        dual_reward(llama, arithmetic(), write=ended, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.partial"]
    again = dual_reward(llama, arithmetic(), write=written.append, **settings)
    assert written == [again]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_training_goes_on_top_of_an_adapter(outspoken: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 4, "learning_rate": 1e-2}
    first = sft(load(str(outspoken), {}), arithmetic(), tmp_path / "a", **settings)
    second = dual_reward(open_model(str(outspoken), adapter=tmp_path / "a"), arithmetic(), tmp_path / "b", **settings)
    assert np.allclose(second.before.alignment, first.after.alignment, rtol=1e-3)
    both = open_model(str(outspoken), adapter=[tmp_path / "a", tmp_path / "b"])
    assert both.key == "model+a+b"
    recipe = finetuning.Recipe("", Adapter(VO, 1, 1.0, (0,)), Schedule(1, 1, 1.0, 0, 1), 2, 0.4, 0.6)
    again, _ = finetuning._measure(prepare(both, arithmetic()), recipe)
    assert np.allclose(again.alignment, second.after.alignment, rtol=1e-3)
    assert not np.allclose(again.alignment, second.before.alignment, rtol=0.1)


def test_a_model_with_a_live_adapter_is_refused(tiny_models: Path, tmp_path: Path) -> None:
    lm = load(str(tiny_models / "tiny-llama"), {})
    get_peft_model(lm.model, LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="an adapter is on it"):
        dual_reward(lm, arithmetic(), tmp_path / "a", steps=1)


def test_plain_fine_tuning_trains_answers_everywhere(llama: LanguageModel, tmp_path: Path) -> None:
    tuned = sft(llama, arithmetic(), tmp_path / "adapter", steps=2, rank=2)
    assert tuned.settings["class_weight"] == 0.0
    assert tuned.settings["blocks"] == 4
    assert "class_loss" not in tuned.losses[-1]
    assert tuned.before.answers is not None


def test_groups_are_held_out_whole() -> None:
    train, test = held_out(arithmetic())
    assert not {item.group for item in train} & {item.group for item in test}
    assert len(train) + len(test) == 48
    assert {item.label for item in test} == {0, 1}
    assert 8 <= len(test) <= 16


def test_prompts_without_answers_need_the_lens_alone(llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no answer to train on"):
        dual_reward(llama, arithmetic(answers=False), tmp_path / "a", steps=1)
    taught = dual_reward(llama, arithmetic(answers=False), tmp_path / "a", steps=1, class_weight=1.0)
    assert taught.before.answers is None
    assert "answer_loss" not in taught.losses[-1]


def test_a_run_that_was_interrupted_leaves_no_adapter_and_goes_on(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 4, "rank": 2, "batch_size": 2}
    whole = dual_reward(llama, arithmetic(), tmp_path / "whole", **settings)
    real = finetuning._measure
    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:  # after training, before the adapter is written
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(finetuning, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dual_reward(llama, arithmetic(), tmp_path / "broken", **settings)
    assert not (tmp_path / "broken").exists()
    monkeypatch.setattr(finetuning, "_measure", real)
    resumed = dual_reward(llama, arithmetic(), tmp_path / "broken", **settings)
    assert np.allclose(resumed.after.alignment, whole.after.alignment, rtol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole"]


def test_an_output_that_exists_or_is_being_written_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="exists already"):
        sft(llama, arithmetic(), tmp_path / "there", steps=1)
    (tmp_path / "busy.partial").mkdir()
    with FileLock(tmp_path / "busy.partial" / "lock"), pytest.raises(InputError, match="another run is writing it"):
        sft(llama, arithmetic(), tmp_path / "busy", steps=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        sft(llama, arithmetic(), tmp_path / "file" / "adapter", steps=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_weight": 0.0}, "class_weight: 0.0 is not within"),
        ({"layer": "L0"}, "L0 has no block below it"),
        ({"layer": "emb"}, "emb is no block"),
        ({"layer": "L7"}, "has emb and L0 to L3"),
        ({"steps": 0}, "steps: 0 is too small"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 is not positive"),
        ({"learning_rate": 1e30, "steps": 4}, "learning_rate: training diverged"),
    ],
)
def test_bad_settings_are_refused_by_name(
    changes: dict[str, Any], message: str, llama: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        dual_reward(llama, arithmetic(), tmp_path / "a", **{"steps": 1, **changes})
    assert not (tmp_path / "a").exists()


def test_a_class_word_of_several_tokens_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    task = arithmetic()
    odd = Task(task.name, task.classes, ("multiply", "xqzxqz"), task.items)
    with pytest.raises(InputError, match="'xqzxqz': with a leading space it is no single token"):
        dual_reward(llama, odd, tmp_path / "a")


# --- Chats, and other tokens than the last ---

TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|says|>"
CHAT: dict[str, Any] = {"chat": True, "system": "Be brief."}


@pytest.fixture(params=["tiny-llama", "tiny-gemma"])
def chatty(tiny_models: Path, request: pytest.FixtureRequest) -> LanguageModel:
    """With a chat template that begins with the BOS, which the tokenizer of tiny-gemma adds as well."""
    lm = load(str(tiny_models / request.param), {})
    lm.tokenizer.chat_template = TEMPLATE
    return lm


def test_training_in_a_chat_reads_what_the_lens_reads_there(chatty: LanguageModel) -> None:
    prepared = prepare(chatty, arithmetic(), **CHAT)
    items = [*prepared.train, *prepared.test]
    assert {item.answer for item in items} == {item.answer.strip() for item in arithmetic().items if item.answer}
    for item, fed in zip(items, prepared.fed, strict=True):
        assert prepared.lm.tokenizer(item.prompt)["input_ids"] == list(fed.ids)
        assert fed.ids.count(chatty.tokenizer.bos_token_id) == 1
        assert fed.read == (len(fed.ids) - 1,)
    tuned = dual_reward(chatty, arithmetic(), steps=2, **CHAT)
    test = held_out(arithmetic())[1]
    reading = lens(chatty, [item.prompt for item in test], WORDS, null_words=0, **CHAT)
    own = np.stack([reading.alignment[item.label, :, i] for i, item in enumerate(test)])
    assert tuned.before.alignment == pytest.approx(own.mean(0), rel=1e-3)
    assert tuned.before.answers is not None
    assert (tuned.settings["chat"], tuned.settings["system"]) == (True, "Be brief.")


def test_the_lens_is_trained_and_read_at_another_token(outspoken: Path) -> None:
    lm, at = load(str(outspoken), {}), {"position": -3, "layer": "L3"}  # the sign
    test = held_out(arithmetic())[1]
    reading = lens(lm, [item.prompt for item in test], WORDS, null_words=0, position=-3)
    own = np.stack([reading.alignment[item.label, :, i] for i, item in enumerate(test)])
    for weight in (1.0, 0.5):
        taught = dual_reward(lm, arithmetic(), steps=40, learning_rate=1e-2, class_weight=weight, **at)
        assert taught.before.alignment == pytest.approx(own.mean(0), rel=1e-3)
        row = taught.layers.index("L3")
        assert taught.after.alignment[row] > 3 * taught.before.alignment[row]
    assert sft(lm, arithmetic(), steps=1, **at).before.alignment == pytest.approx(own.mean(0), rel=1e-3)
    rewarded = grpo(lm, arithmetic(), steps=40, batch_size=4, learning_rate=1e-2, class_weight=1.0, shots=0, **at)
    assert rewarded.after.alignment[row] > 3 * rewarded.before.alignment[row]


def test_words_of_a_sentencepiece_vocabulary_are_trained_on() -> None:
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁multiply", "▁add", *"0123456789*+="]
    unigram = Tokenizer(Unigram([(piece, -float(len(piece) < 3)) for piece in pieces], unk_id=0))
    unigram.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    unigram.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    unigram.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=unigram, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    lm = LanguageModel("mine", build("llama"), tokenizer)
    assert [word.forms[f" {word.word}"] for word in prepare(lm, arithmetic()).words] == [4, 5]
    tuned = dual_reward(lm, arithmetic(), steps=1, layer="L1")
    assert tuned.before.answers is not None
    assert tuned.fed[0].tokens[:2] == ("<s>", "▁")


def test_a_tokenizer_that_ends_every_text_is_kept_from_it(llama: LanguageModel) -> None:
    llama.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    tuned = sft(llama, arithmetic(), steps=1)
    assert all(fed.ids[-1] != 1 for fed in tuned.fed)
    assert all("left out" in fed.notices[0] for fed in tuned.fed)


# --- GRPO ---

QUICK: dict[str, Any] = {"steps": 2, "batch_size": 2, "group": 2, "new_tokens": 4, "rank": 2}


def even(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Something that a tiny model can be good or bad at."""
    return [float(len(text) % 2 == 0) for text in completions]


def test_grpo_trains_what_is_rewarded_and_leaves_an_adapter(llama: LanguageModel, tmp_path: Path) -> None:
    weights = {name: p.clone() for name, p in llama.model.named_parameters()}
    seen: list[tuple[str, str]] = []

    def watched(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        seen.extend(zip(prompts, answers, strict=True))
        return even(prompts, completions, answers)

    tuned = grpo(llama, arithmetic(), tmp_path / "adapter", reward=watched, class_weight=0.5, **QUICK)
    assert [step["step"] for step in tuned.losses] == [1, 2]
    assert all({"reward", "zero_variance", "kl", "class_loss"} < step.keys() for step in tuned.losses)
    assert tuned.settings["shots"] == 3
    assert tuned.n_train == len(held_out(arithmetic())[0]) - 3
    assert tuned.before.answers is not None
    assert not np.array_equal(tuned.before.alignment, tuned.after.alignment)
    assert all(torch.equal(p, weights[name]) for name, p in llama.model.named_parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    open_model(str(llama.model.name_or_path), adapter=tmp_path / "adapter")
    # Three solved items, then the item itself, none of them held out, in every prompt.
    items = {item.prompt: item for item in held_out(arithmetic())[0]}
    for prompt, answer in seen:
        *shots, own = prompt.split("\n")
        assert len(shots) == 3
        assert all(items[line[: line.index("=") + 1]].answer == line[line.index("=") + 1 :] for line in shots)
        assert items[own].answer == answer
        assert not any(line.startswith(own) for line in shots)


def test_grpo_in_a_chat_shows_solved_items_within_the_users_turn(chatty: LanguageModel) -> None:
    seen: list[str] = []

    def watched(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        seen.extend(prompts)
        return even(prompts, completions, answers)

    grpo(chatty, arithmetic(), reward=watched, shots=2, class_weight=0.5, **CHAT, **QUICK)
    for prompt in seen:
        assert prompt.startswith("<bos><|system|>Be brief.<|user|>")
        assert prompt.endswith("=<|says|>")
        assert prompt.count("\n") == 2


def test_grpo_without_an_output_keeps_nothing(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tuned = grpo(llama, arithmetic(), shots=0, reward=even, **QUICK)
    assert "class_loss" not in tuned.losses[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (" 56", " 56", 1), ("56\n7", " 56", 1), (" 56.", " 56", 1), (" 56 apples", " 56", 1), (" 567", " 56", 0),
        (" 56.5", " 56", 0), (" 5", " 56", 0), ("", " 56", 0), (" It is 56", " 56", 0), (" Europe.", " Europe", 1),
        (" European", " Europe", 0), (" (a+b)*", " (a+b)*", 1), (" -5", " -5", 1),
        (" South America", " South America", 1),
    ],
)  # fmt: skip
def test_a_completion_is_right_if_it_begins_with_the_answer(completion: str, answer: str, right: int) -> None:
    assert begins_with_answer(["p"], [completion], [answer]) == [right]


def test_classes_are_trained_in_turn_and_every_item_before_any_again() -> None:
    items = held_out(arithmetic())[0]
    drawn = in_turn(items, 2 * len(items), seed=0)
    assert [item.label for item in drawn] == [0, 1] * len(items)
    for label in (0, 1):
        own = [item for item in drawn if item.label == label]
        n = sum(item.label == label for item in items)
        assert len({item.prompt for item in own[:n]}) == n
    assert drawn != in_turn(items, 2 * len(items), seed=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: 0 is too small"),
        ({"group": 1}, "group: 1 completion"),
        ({"new_tokens": 1, "reward": None}, "new_tokens: 1, but answer"),
        ({"class_weight": 2.0}, "class_weight: 2.0"),
        ({"kl_weight": -1.0}, "kl_weight: -1.0 is negative"),
        ({"temperature": 0.0}, "temperature: 0.0 is not positive"),
        ({"shots": -1}, "shots: -1 is negative"),
        ({"shots": 40}, "shots: 40 leave a class without items"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 is not positive"),
        ({"reward": lambda *_: [1.0]}, "reward: gave 1 rewards for 4 completions"),
    ],
)
def test_bad_settings_of_grpo_are_refused_by_name(
    changes: dict[str, Any], message: str, llama: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        grpo(llama, arithmetic(), tmp_path / "a", **{**QUICK, "reward": even, **changes})
    assert not (tmp_path / "a").exists()


def test_answers_that_reward_needs_must_be_there(llama: LanguageModel) -> None:
    with pytest.raises(InputError, match="no answer to reward"):
        grpo(llama, arithmetic(answers=False), **QUICK)
    assert grpo(llama, arithmetic(answers=False), shots=0, reward=even, **QUICK).before.answers is None
