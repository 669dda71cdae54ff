"""Training: what an adapter may change, the loss against plain torch and ``Trainer``, and runs that are cut short."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments

from classifier_emergence.errors import InputError
from classifier_emergence.manifest import seal
from classifier_emergence.models.loading import load
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.readout import Readout
from classifier_emergence.reading.residuals import removing
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.tasks.arithmetic import OPERATIONS
from classifier_emergence.training import cross_entropy as cross_entropy_module
from classifier_emergence.training import supervised as training
from classifier_emergence.training.adapters import ALONE, Adapter, Start, adapted, adapted_together, parameters_of
from classifier_emergence.training.cross_entropy import cross_entropy
from classifier_emergence.training.evaluation import alignment
from classifier_emergence.training.examples import Example, Objective, collate, encode
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.modules import MLP, QK, QKVO, VO
from classifier_emergence.training.supervised import LensTrainer, Member, Trained, train, train_together

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [
    ("7 * 8 =", " 56", "multiply"),
    ("What is 12 times 5?", " 60", "multiply"),
    ("17 + 38 =", " 55", "add"),
    ("89 - 34 =", " 55", "subtract"),
    ("Find 81 divided by 9", " 9", "divide"),
    ("48 / 6 =", " 8", "divide"),
]
ONE_OF_EACH = (0, 2, 3, 5)
ADAPTER = Adapter(QKVO, rank=4, scale=2.0, layers=(1, 2))
DUAL, PLAIN, HEADED = Objective(0.4, 2), Objective(0.0), Objective(0.5, 2, classes=4)
# Six examples are three batches: checkpoints fall within epochs and, at step 6, on the end of one.
SCHEDULE = Schedule(steps=8, batch_size=2, learning_rate=1e-2, seed=3, every=2)
ONE_MODEL = pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)
objectives = pytest.mark.parametrize("objective", [DUAL, PLAIN, HEADED], ids=["dual", "plain", "head"])


def examples(lm: LanguageModel, objective: Objective = DUAL) -> list[Example]:
    def target(operation: str) -> int:
        return OPERATIONS.index(operation) if objective.classes else word_tokens(operation, lm.tokenizer).strict_id

    return [encode(lm.tokenizer, prompt, answer, target(word)) for prompt, answer, word in TEXTS]


def logits(lm: LanguageModel) -> Tensor:
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([lm.tokenizer("What is 7 times 8?")["input_ids"]])).logits


def trained_weights(wrapped: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in wrapped.named_parameters() if p.requires_grad}


def shake(wrapped: PeftModel) -> None:
    """An adapter that does something: a fresh one is zero."""
    generator = torch.Generator().manual_seed(5)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


class Watch:
    """Measures something that the adapter moves; counts its calls and breaks the run at one of them."""

    def __init__(self, lm: LanguageModel, stop: int | None = None) -> None:
        self.lm, self.stop, self.calls = lm, stop, 0

    def __call__(self) -> dict[str, Any]:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return {"spread": float(logits(self.lm).std())}


def run(
    lm: LanguageModel,
    work: Path,
    objective: Objective = DUAL,
    *,
    schedule: Schedule = SCHEDULE,
    seed: int = 0,
    watch: Watch | None = None,
    leave_out: int = 0,
) -> tuple[Trained, dict[str, Tensor]]:
    """A run from a fresh adapter, as a new process would start it."""
    with adapted(lm, ADAPTER, seed=seed, classes=objective.classes) as wrapped:
        texts = examples(lm, objective)[leave_out:]
        trained = train(lm, wrapped, texts, objective, schedule, work=work, watch=watch or Watch(lm))
        return trained, trained_weights(wrapped)


def broken(lm: LanguageModel, work: Path, objective: Objective = DUAL, *, stop: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(lm, work, objective, watch=Watch(lm, stop))


def assert_same(run: tuple[Trained, dict[str, Tensor]], other: tuple[Trained, dict[str, Tensor]]) -> None:
    assert run[0] == other[0]
    assert all(torch.equal(run[1][name], other[1][name]) for name in run[1] | other[1])


def assert_near(run: Trained, other: Trained, rel: float = 1e-5) -> None:
    assert run.parameters == other.parameters
    for entries, others in ((run.losses, other.losses), (run.watched, other.watched)):
        assert len(entries) == len(others)
        assert all(a == pytest.approx(b, rel=rel) for a, b in zip(entries, others, strict=True))


def alone(batch: list[Example], objective: Objective, lm: LanguageModel) -> dict[str, Tensor]:
    """What is read of a batch whose run trains alone, and the decoder's inputs."""
    made = collate({ALONE: batch}, {ALONE: objective}, lm.model)
    return {**made["inputs"], **made["members"][ALONE]}


def batch_loss(lm: LanguageModel, wrapped: PeftModel, batch: list[Example], objective: Objective) -> Tensor:
    arguments = TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", max_steps=1)
    trainer = LensTrainer(lm, wrapped, arguments, {ALONE: Member(batch, objective, 0)}, len(batch))
    return trainer.compute_loss(trainer.model, collate({ALONE: batch}, {ALONE: objective}, lm.model))


# --- The adapter ---


def test_a_fresh_adapter_changes_nothing(lm: LanguageModel) -> None:
    base = logits(lm)
    with adapted(lm, ADAPTER, seed=0, classes=4):
        assert torch.equal(logits(lm), base)


@pytest.mark.parametrize("classes", [None, 4])
def test_what_training_did_is_gone_afterwards(lm: LanguageModel, classes: int | None) -> None:
    base, before = logits(lm), {name: value.clone() for name, value in lm.model.state_dict().items()}

    def use() -> None:
        with adapted(lm, ADAPTER, seed=0, classes=classes) as wrapped:
            shake(wrapped.train())
            assert not torch.equal(logits(lm), base)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert torch.equal(logits(lm), base)
    after = lm.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert not lm.model.training


def test_a_trained_adapter_can_be_switched_off(lm: LanguageModel) -> None:
    base = logits(lm)
    with adapted(lm, ADAPTER, seed=0) as wrapped:
        shake(wrapped)
        with wrapped.disable_adapter():
            assert torch.equal(logits(lm), base)
        assert not torch.equal(logits(lm), base)


def test_only_the_named_maps_of_the_named_layers_are_trained(lm: LanguageModel) -> None:
    with adapted(lm, Adapter(VO, rank=4, scale=2.0, layers=(1, 3)), seed=0) as wrapped:
        trained = {".".join(name.split(".")[-6:-2]) for name in trained_weights(wrapped)}
    assert trained == {
        f"{layer}.self_attn.{name}.{ab}" for layer in (1, 3) for name in VO for ab in ("lora_A", "lora_B")
    }


def test_the_seed_sets_the_adapter(lm: LanguageModel) -> None:
    def start(seed: int) -> list[Tensor]:
        with adapted(lm, ADAPTER, seed=seed) as wrapped:
            return list(trained_weights(wrapped).values())

    assert all(map(torch.equal, start(1), start(1)))
    assert not all(map(torch.equal, start(1), start(2)))


def test_a_saved_adapter_loads_with_peft(lm: LanguageModel, tmp_path: Path) -> None:
    base = logits(lm)
    with adapted(lm, ADAPTER, seed=0) as wrapped:
        shake(wrapped)
        changed = logits(lm)
        wrapped.save_pretrained(tmp_path)
    assert torch.equal(logits(lm), base)
    loaded = PeftModel.from_pretrained(lm.model, tmp_path)
    try:
        torch.testing.assert_close(logits(lm), changed)
    finally:
        loaded.unload()


@pytest.mark.parametrize(("scale", "alpha"), [(2.0, 6), (1.1, 3.3000000000000003), (1 / 3, 1)])
def test_an_adapters_scale_is_exact(lm: LanguageModel, scale: float, alpha: float, tmp_path: Path) -> None:
    with adapted(lm, Adapter(VO, 3, scale, (1,)), seed=0) as wrapped:
        scaling = {m.scaling[ALONE] for m in wrapped.modules() if isinstance(m, LoraLayer)}
        wrapped.save_pretrained(tmp_path)
    assert scaling == {scale}
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"]
    assert (saved, type(saved)) == (alpha, type(alpha))


@pytest.mark.parametrize(
    ("modules", "layers", "message"),
    [
        (("w_pack",), (1,), "modules: w_pack"),
        (("v_proj", "w_pack"), (1,), "modules: w_pack"),  # peft trains the half that it finds
        (VO, (1, 99), "layers:.*99"),
        (VO, (-1,), "layers:.*-1"),
        (VO, (), "layers:"),  # peft takes none for all
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    lm: LanguageModel, modules: tuple[str, ...], layers: tuple[int, ...], message: str
) -> None:
    before = list(lm.model.state_dict())
    with (
        pytest.raises(InputError, match=message),
        adapted(lm, Adapter(modules, 4, 2.0, layers), seed=0, classes=4),
    ):
        pass
    assert list(lm.model.state_dict()) == before


# --- The loss ---


def made_up(
    seeded: Callable[..., Tensor], vocabulary: int, *, size: float = 1.0, bias: bool = False, divisor: float = 1.0
) -> Readout:
    weight = size * seeded(vocabulary, 8, seed=1)
    return Readout(nn.Identity(), weight, seeded(vocabulary, seed=2) if bias else None, divisor, None)


def assert_is_torchs(readout: Readout, normed: Tensor, target: Tensor, upstream: Tensor) -> None:
    """Value and gradient against float64."""
    ours, theirs = normed.clone().requires_grad_(), normed.double().requires_grad_()
    loss = cross_entropy(ours, readout, target)
    exact = theirs @ readout.weight.double().T + (0 if readout.bias is None else readout.bias.double())
    exact = exact / readout.divisor
    if readout.softcap is not None:
        exact = readout.softcap * (exact / readout.softcap).tanh()
    reference = functional.cross_entropy(exact, target, reduction="none")
    torch.testing.assert_close(loss.double(), reference, atol=1e-5, rtol=1e-5)
    loss.backward(upstream)
    reference.backward(upstream.double())
    torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-4)


@given(
    rows=st.integers(1, 5),
    vocabulary=st.integers(1, 40),
    block=st.integers(1, 17),
    bias=st.booleans(),
    divisor=st.sampled_from([1.0, 8.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_cross_entropy_is_torchs_for_any_blocks(
    rows: int, vocabulary: int, block: int, bias: bool, divisor: float, seed: int
) -> None:
    def seeded(*shape: int, seed: int = seed) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    target = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy_module, "BLOCK_TOKENS", block)
        readout = made_up(seeded, vocabulary, bias=bias, divisor=divisor)
        assert_is_torchs(readout, seeded(rows, 8, seed=seed + 1), target, seeded(rows, seed=seed + 2))


@pytest.mark.parametrize("sign", [1, -1])
def test_cross_entropy_survives_extreme_logits(seeded, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy_module, "BLOCK_TOKENS", 7)
    # Logits from -1e4 to 1e4, so that the running maximum rises in every block, or in none.
    readout = Readout(nn.Identity(), sign * torch.linspace(-1e4, 1e4, 40)[:, None], None, 1.0, None)
    assert_is_torchs(readout, torch.ones(3, 1), torch.tensor([0, 20, 39]), seeded(3))


def test_cross_entropy_keeps_a_softcap(seeded) -> None:
    readout = replace(made_up(seeded, 40, size=20.0), softcap=30.0)
    assert_is_torchs(readout, seeded(3, 8), torch.tensor([0, 20, 39]), seeded(3, seed=3))


SHORT, LONG = Example([10, 11, 30, 2], 2, 8), Example([10, 11, 12, 20, 21, 2], 3, 7)


@pytest.mark.parametrize(("shifted", "read"), [(True, [12, 20, 21, 11, 30]), (False, [20, 21, 2, 30, 2])])
def test_answers_are_scored_from_the_position_before_unless_unshifted(
    lm: LanguageModel, shifted: bool, read: list[int], as_tree: bool
) -> None:
    batch = alone([LONG, SHORT], Objective(0.4, 1, answer_shifted=shifted), lm)
    assert batch["input_ids"].flatten()[batch["answer_read"]].tolist() == read
    assert batch["answer_token"].tolist() == [20, 21, 2, 30, 2]
    # What is only predicted does not pass, and what both texts begin with passes once.
    assert (2 in batch["input_ids"]) != shifted
    assert ((batch["input_ids"] == 10).sum() == 1) == as_tree


def test_the_lens_reads_the_last_token_of_prompt_or_answer(lm: LanguageModel, as_tree: bool) -> None:
    prompt = alone([LONG, SHORT], Objective(0.4, 1), lm)
    answer = alone([LONG, SHORT], Objective(0.4, 1, read="answer"), lm)
    assert prompt["input_ids"].flatten()[prompt["read"]].tolist() == [12, 11]
    assert answer["input_ids"].flatten()[answer["read"]].tolist() == [21, 30]
    assert prompt["target"].tolist() == answer["target"].tolist() == [7, 8]


@pytest.mark.parametrize(
    "objective",
    [PLAIN, Objective(1.0, 2), Objective(1.0, 2, read="answer"), Objective(1.0, 2, classes=4)],
    ids=["answer", "lens", "late lens", "head"],
)
def test_passing_together_cannot_change_the_loss(lm: LanguageModel, objective: Objective, as_tree: bool) -> None:
    batch = examples(lm, objective)[:2]
    assert len(batch[0].ids) != len(batch[1].ids)
    # A batch's loss is the mean over its answers' tokens or over its classes.
    sizes = [1 if objective.class_weight else len(example.ids) - example.prompt_length for example in batch]
    with adapted(lm, ADAPTER, seed=0, classes=objective.classes) as wrapped:
        shake(wrapped)
        alone = [batch_loss(lm, wrapped, [example], objective) for example in batch]
        mean = sum(size * loss for size, loss in zip(sizes, alone, strict=True)) / sum(sizes)
        torch.testing.assert_close(batch_loss(lm, wrapped, batch, objective), mean)


@pytest.mark.parametrize("read", ["prompt", "answer"])
@pytest.mark.parametrize("shifted", [True, False])
def test_the_loss_is_what_the_definition_says(lm: LanguageModel, read: Any, shifted: bool) -> None:
    example = examples(lm)[1]
    objective = Objective(0.4, 2, answer_shifted=shifted, read=read)
    start, ids = example.prompt_length, torch.tensor([example.ids])
    with adapted(lm, ADAPTER, seed=0) as wrapped:
        shake(wrapped)
        loss = batch_loss(lm, wrapped, [example], objective)
        loss.backward()
        gradients = [p.grad.clone() for p in wrapped.parameters() if p.requires_grad]
        wrapped.zero_grad()
        output = wrapped(input_ids=ids, output_hidden_states=True)
        position = start - 1 if read == "prompt" else len(example.ids) - 2
        lens = lm.readout.logits(output.hidden_states[3][0, position][None])
        answer = output.logits[0, start - 1 : -1] if shifted else output.logits[0, start:]
        plain = 0.4 * functional.cross_entropy(lens, torch.tensor([example.target]))
        plain = plain + 0.6 * functional.cross_entropy(answer, ids[0, start:])
        torch.testing.assert_close(loss, plain)
        plain.backward()
        for gradient, parameter in zip(gradients, (p for p in wrapped.parameters() if p.requires_grad), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-4)


def test_plain_fine_tuning_is_that_of_the_trainer(lm: LanguageModel, tmp_path: Path) -> None:
    def labelled(batch: list[Example]) -> dict[str, Tensor]:
        width = max(len(e.ids) for e in batch)

        def rows(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in values])

        labels = [[-100] * e.prompt_length + e.ids[e.prompt_length :] for e in batch]
        mask = [[1] * len(e.ids) for e in batch]
        ids = rows([e.ids for e in batch], 0)
        return {"input_ids": ids, "attention_mask": rows(mask, 0), "labels": rows(labels, -100)}

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        max_steps=SCHEDULE.steps,
        per_device_train_batch_size=SCHEDULE.batch_size,
        learning_rate=SCHEDULE.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        seed=SCHEDULE.seed,
        data_seed=SCHEDULE.seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    with adapted(lm, ADAPTER, seed=0) as wrapped:
        trainer = Trainer(wrapped, arguments, labelled, examples(lm))
        trainer.train()
        theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        their_weights = trained_weights(wrapped)
    ours, weights = run(lm, tmp_path / "ours", PLAIN, schedule=replace(SCHEDULE, every=1))
    assert [entry["step"] for entry in ours.losses] == list(range(1, SCHEDULE.steps + 1))
    assert [entry["loss"] for entry in ours.losses] == pytest.approx(theirs, abs=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, their_weights[name], atol=1e-4, rtol=1e-3)


@ONE_MODEL
@objectives
def test_the_parts_of_the_loss_add_up(lm: LanguageModel, objective: Objective, tmp_path: Path) -> None:
    w = objective.class_weight
    for entry in run(lm, tmp_path, objective)[0].losses:
        assert ("class_loss" in entry) == (w > 0)
        assert entry["loss"] == pytest.approx(w * entry.get("class_loss", 0) + (1 - w) * entry["answer_loss"], abs=1e-5)


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_weight_that_is_no_share_is_refused(weight: float) -> None:
    with pytest.raises(InputError, match="class_weight"):
        Objective(weight, 2)


def test_a_lens_without_a_layer_is_refused() -> None:
    with pytest.raises(InputError, match="layer"):
        Objective(0.4)


@pytest.mark.parametrize(
    ("objective", "message"),
    [(Objective(0.4, 4), "layer: 4"), (Objective(0.4, -1), "layer: -1"), (HEADED, "classes: 4")],
)
def test_an_objective_that_does_not_fit_the_model_is_refused(
    lm: LanguageModel, objective: Objective, message: str, tmp_path: Path
) -> None:
    with adapted(lm, ADAPTER, seed=0) as wrapped, pytest.raises(InputError, match=message):
        train(lm, wrapped, examples(lm), objective, SCHEDULE, work=tmp_path)


def test_a_prompt_that_its_answer_runs_into_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="'What is 12 tim': the tokenizer splits it"):
        encode(lm.tokenizer, "What is 12 tim", "es", 0)


# --- Whole runs ---


@pytest.fixture
def outspoken(lm: LanguageModel) -> LanguageModel:
    """A copy with a larger gain before the unembedding; the tiny models themselves cannot be sure of any token."""
    louder = replace(lm, model=copy.deepcopy(lm.model))
    norm = louder.readout.norm
    offset = 1.0 if lm.key == "tiny-gemma" else 0.0  # Gemma stores the gain less one
    norm.weight.data = 15 * (norm.weight.data + offset) - offset
    return louder


def test_dual_reward_makes_the_lens_say_the_word(outspoken: LanguageModel, tmp_path: Path) -> None:
    lm = outspoken
    words = [word_tokens(operation, lm.tokenizer) for operation in OPERATIONS]
    prompts, own = [TEXTS[i][0] for i in ONE_OF_EACH], range(len(OPERATIONS))

    def at_layer() -> Tensor:
        return alignment(lm, prompts, own, words, rows=[3]).own_word[0]

    assert (at_layer() < 0.1).all()
    with adapted(lm, Adapter(VO, rank=16, scale=2.0, layers=(0, 1, 2)), seed=0) as wrapped:
        schedule = Schedule(steps=100, batch_size=4, learning_rate=1e-2, seed=0, every=100)
        train(lm, wrapped, [examples(lm)[i] for i in ONE_OF_EACH], DUAL, schedule, work=tmp_path)
        assert at_layer().mean() > 0.2
    assert (at_layer() < 0.1).all()


@ONE_MODEL
def test_a_head_alone_learns_the_classes(lm: LanguageModel, tmp_path: Path) -> None:
    schedule = replace(SCHEDULE, steps=60, batch_size=4, every=20)
    losses = run(lm, tmp_path, Objective(1.0, 2, classes=4), schedule=schedule)[0].losses
    assert losses[-1]["class_loss"] < 0.1


def test_a_fresh_head_guesses_evenly(lm: LanguageModel) -> None:
    objective = Objective(1.0, 2, classes=4)
    with adapted(lm, ADAPTER, seed=0, classes=4) as wrapped:
        loss = batch_loss(lm, wrapped, examples(lm, objective), objective)
    assert loss.item() == pytest.approx(math.log(4))


@ONE_MODEL
@objectives
def test_every_watched_step_occurs_once(lm: LanguageModel, objective: Objective, tmp_path: Path) -> None:
    trained, _ = run(lm, tmp_path, objective)
    assert [entry["step"] for entry in trained.watched] == [0, 2, 4, 6, 8]
    assert [entry["step"] for entry in trained.losses] == [2, 4, 6, 8]


@ONE_MODEL
@objectives
def test_a_killed_run_ends_as_an_unbroken_one(lm: LanguageModel, objective: Objective, tmp_path: Path) -> None:
    whole = run(lm, tmp_path / "whole", objective)
    broken(lm, tmp_path / "broken", objective, stop=2)  # at step 4
    again = Watch(lm)
    assert_same(run(lm, tmp_path / "broken", objective, watch=again), whole)
    assert again.calls == 4  # not at step 2


# --- Runs that train together ---

TOGETHER = {
    "dual": (Adapter(VO, 4, 2.0, (0, 1, 2)), DUAL),
    "mlp": (Adapter((*QKVO, *MLP), 2, 4.0, (0, 1, 2, 3)), PLAIN),
    "shallow": (Adapter(VO, 4, 2.0, (0, 1)), Objective(0.8, 1)),
    "head": (Adapter(QK, 8, 2.0, (0, 1, 2)), HEADED),
    "flawed": (Adapter(VO, 4, 2.0, (0, 1, 2)), Objective(0.4, 2, answer_shifted=False, read="answer")),
    "class_only": (Adapter(VO, 4, 2.0, (0, 1, 2)), Objective(1.0, 2)),
}


def run_together(
    lm: LanguageModel, work: Path, names: Sequence[str], *, stop: int | None = None
) -> dict[str, tuple[Trained, dict[str, Tensor]]]:
    chosen = {name: TOGETHER[name] for name in names}
    starts = {name: Start(place, i, objective.classes) for i, (name, (place, objective)) in enumerate(chosen.items())}
    watch = Watch(lm, stop)
    with adapted_together(lm, starts) as wrapped:
        members = {
            name: Member(examples(lm, objective)[i % 2 :], objective, 10 + i, watch)
            for i, (name, (_, objective)) in enumerate(chosen.items())
        }
        trained = train_together(lm, wrapped, members, SCHEDULE, work=work)
        return {name: (trained[name], clean(wrapped, name)) for name in chosen}


def clean(wrapped: PeftModel, name: str) -> dict[str, Tensor]:
    part = re.compile(rf"(lora_[AB]|classifier_head)\.{name}\.")
    return {part.sub(r"\1.", full): p.detach().clone() for full, p in parameters_of(wrapped, name).items()}


def test_runs_that_train_together_are_those_that_train_alone(lm: LanguageModel, tmp_path: Path) -> None:
    together = run_together(lm, tmp_path / "together", list(TOGETHER))
    for i, (name, (place, objective)) in enumerate(TOGETHER.items()):
        with adapted(lm, place, seed=i, classes=objective.classes) as wrapped:
            texts, schedule = examples(lm, objective)[i % 2 :], replace(SCHEDULE, seed=10 + i)
            alone = train(lm, wrapped, texts, objective, schedule, work=tmp_path / name, watch=Watch(lm))
            assert_near(together[name][0], alone, rel=1e-3)
            for full, values in clean(wrapped, ALONE).items():
                torch.testing.assert_close(together[name][1][full], values, rtol=1e-2, atol=1e-3)


@ONE_MODEL
def test_losses_on_the_lens_alone_stop_at_its_layer(lm: LanguageModel, tmp_path: Path) -> None:
    ran: list[int] = []
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(lm.blocks)]
    with removing(hooks), adapted(lm, TOGETHER["class_only"][0], seed=0) as wrapped:
        batch_loss(lm, wrapped, examples(lm), Objective(1.0, 2)).backward()
    assert ran == [0, 1, 2]


@ONE_MODEL
def test_killed_runs_that_train_together_end_as_unbroken_ones(lm: LanguageModel, tmp_path: Path) -> None:
    names = ["dual", "head", "mlp"]
    whole = run_together(lm, tmp_path / "whole", names)
    with pytest.raises(KeyboardInterrupt):
        run_together(lm, tmp_path / "broken", names, stop=7)  # at step 4
    again = run_together(lm, tmp_path / "broken", names)
    for name in names:
        assert_same(again[name], whole[name])


@ONE_MODEL
def test_further_training_starts_from_the_adapter_as_it_is(lm: LanguageModel, tmp_path: Path) -> None:
    def both(stop: int | None = None) -> tuple[Trained, Trained]:
        with adapted(lm, ADAPTER, seed=0) as wrapped:
            runs = [
                train(lm, wrapped, examples(lm), objective, SCHEDULE, work=tmp_path / name, watch=watch)
                for name, objective, watch in [("first", DUAL, Watch(lm)), ("then", PLAIN, Watch(lm, stop))]
            ]
        return runs[0], runs[1]

    with pytest.raises(KeyboardInterrupt):
        both(stop=2)
    first, then = both()  # reads the first and resumes the other
    assert then.watched[0]["spread"] == first.watched[-1]["spread"]
    shutil.rmtree(tmp_path)
    assert (first, then) == both()


@ONE_MODEL
def test_a_half_written_checkpoint_is_passed_over(lm: LanguageModel, tmp_path: Path) -> None:
    whole = run(lm, tmp_path / "whole")
    broken(lm, tmp_path / "broken", stop=3)  # at step 6
    state = tmp_path / "broken" / "checkpoint-4" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    again = Watch(lm)
    assert_same(run(lm, tmp_path / "broken", watch=again), whole)
    assert again.calls == 4  # from step 2


@ONE_MODEL
def test_a_finished_run_is_only_read(lm: LanguageModel, tmp_path: Path) -> None:
    whole = run(lm, tmp_path)
    again = Watch(lm)
    assert_same(run(lm, tmp_path, watch=again), whole)
    assert again.calls == 1


@ONE_MODEL
@pytest.mark.parametrize(
    "changes",
    [
        {"objective": Objective(0.5, 2)},
        {"schedule": replace(SCHEDULE, learning_rate=1e-3)},
        {"seed": 1},
        {"leave_out": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_runs_checkpoints_are_not_resumed(lm: LanguageModel, changes: dict[str, Any], tmp_path: Path) -> None:
    run(lm, tmp_path / "used")
    assert_same(run(lm, tmp_path / "used", **changes), run(lm, tmp_path / "new", **changes))


@ONE_MODEL
def test_another_models_checkpoints_are_not_resumed(lm: LanguageModel, tmp_path: Path) -> None:
    half = copy.deepcopy(lm.model).bfloat16()  # its adapter starts as that of the other
    for other in (lm, replace(lm, key="other"), replace(lm, model=half)):
        broken(other, tmp_path, stop=1)
        assert not list(tmp_path.glob("checkpoint-*"))
        broken(other, tmp_path, stop=2)
        assert list(tmp_path.glob("checkpoint-*"))


@ONE_MODEL
def test_an_absurd_learning_rate_is_named(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"learning_rate: training diverged at step 2 .*1e\+30"):
        run(lm, tmp_path, schedule=replace(SCHEDULE, learning_rate=1e30))
    assert not list(tmp_path.glob("checkpoint-*"))


@ONE_MODEL
def test_a_loss_far_above_a_guess_is_called_divergence(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "EXPLODED", 0.1)  # a tiny model cannot be ten times as wrong as a guess
    with pytest.raises(InputError, match="learning_rate: training diverged at step 1 "):
        run(lm, tmp_path)


# --- Other processes. Their order of sets is another, and their arrays may be aligned otherwise in memory, by which
# some matrix products round: so they agree within rounding. ---


def elsewhere(tiny_models: Path, *works: Path) -> list[Trained]:
    """``run`` with its defaults in every folder, by a new process."""
    command = [
        sys.executable,
        "-m",
        "tests.training.test_supervised",
        str(tiny_models / "tiny-llama"),
        *map(str, works),
    ]
    env = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return [Trained(**found) for found in json.loads(done.stdout)]


@ONE_MODEL
def test_a_new_process_repeats_a_run_and_resumes_one(lm: LanguageModel, tiny_models: Path, tmp_path: Path) -> None:
    whole = run(lm, tmp_path / "whole")[0]
    broken(lm, tmp_path / "broken", stop=3)
    # A mark on what was logged before the break shows that it was read, not run again.
    state = tmp_path / "broken" / "checkpoint-4" / "trainer_state.json"
    marked = json.loads(state.read_text())
    marked["log_history"][0][f"{ALONE}/loss"] = -1.0
    state.write_text(json.dumps(marked))
    seal(state.parent)
    repeated, resumed = elsewhere(tiny_models, tmp_path / "there", tmp_path / "broken")
    assert_near(repeated, whole)
    assert resumed.losses[0]["loss"] == -1.0
    assert_near(replace(resumed, losses=resumed.losses[1:]), replace(whole, losses=whole.losses[1:]))


if __name__ == "__main__":
    model = load(sys.argv[1], {})
    sys.stdout.write(json.dumps([vars(run(model, Path(work))[0]) for work in sys.argv[2:]]))
