"""GRPO: what equals TRL's trainer, what the loss on the lens adds, flaws by definition, runs that are cut short."""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from classifier_emergence.errors import InputError
from classifier_emergence.reading.layers import layer_row
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.training.adapters import Adapter, adapted
from classifier_emergence.training.flaws import HeldInDtype, round_to_dtype_
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.modules import QKVO
from classifier_emergence.training.rl import run as grpo
from classifier_emergence.training.rl.rewards import exact, parse_answer, parse_reported
from classifier_emergence.training.rl.rollouts import Draws, draw_completions, line_ends, sequence_log_probs
from classifier_emergence.training.rl.run import GrpoRun, all_weights_trainable, train_grpo
from classifier_emergence.training.rl.trainer import GrpoWithLens, PolicyObjective, PolicyTask, Sampling, arguments

ADAPTER = Adapter(QKVO, rank=4, scale=2.0, layers=(0, 1, 2, 3))
SAMPLING = Sampling(group=3, temperature=1.0, new_tokens=5)
SCHEDULE = Schedule(steps=4, batch_size=3, learning_rate=1e-3, seed=3, every=2)
PLAIN, LENS = PolicyObjective(0.1), PolicyObjective(0.1, 0.4, 2)
KINDS = pytest.mark.parametrize("kind", ["whole", "adapter"])
ONE_MODEL = pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)
PROMPTS = [
    ("7 * 8 =", "multiply"),
    ("What is 12 times 5?", "multiply"),
    ("17 + 38 =", "add"),
    ("If you subtract 4 from 9, you get", "subtract"),
    ("Find 81 divided by 9", "divide"),
    ("48 / 6 =", "divide"),
]


@pytest.fixture(autouse=True)
def _nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise AssertionError("telemetry")

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", refuse)


@pytest.fixture(autouse=True)
def _completions_end_early(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tiny models hardly ever break a line: let a fifth of the vocabulary end completions."""
    if "line_ends" not in request.node.name:
        monkeypatch.setattr(grpo, "line_ends", lambda tokenizer: list(range(5, len(tokenizer), 5)))


def tasks(lm: LanguageModel, schedule: Schedule = SCHEDULE) -> list[PolicyTask]:
    n = schedule.steps * schedule.batch_size
    chosen = [PROMPTS[i % len(PROMPTS)] for i in range(n)]
    return [
        PolicyTask(prompt, str(i), word_tokens(word, lm.tokenizer).strict_id, back=i % 2)
        for i, (prompt, word) in enumerate(chosen)
    ]


def reward(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """Something that a tiny model can be good or bad at."""
    return [float(len(text) % 2) for text in completions]


def constant(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
    return [1.0] * len(prompts)


@contextmanager
def trainable(lm: LanguageModel, kind: str) -> Iterator[PreTrainedModel | PeftModel]:
    with all_weights_trainable(lm) if kind == "whole" else adapted(lm, ADAPTER, seed=0) as model:
        if kind == "adapter":
            shake(model)
        yield model


def shake(model: Any) -> None:
    """An adapter that does something: a fresh one is zero."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run(
    lm: LanguageModel,
    work: Path,
    kind: str = "whole",
    objective: PolicyObjective = LENS,
    *,
    schedule: Schedule = SCHEDULE,
    reward: Any = reward,
    watch: Any = None,
) -> tuple[GrpoRun, dict[str, Tensor]]:
    with trainable(lm, kind) as model:
        found = train_grpo(
            lm, model, tasks(lm, schedule), reward, objective, SAMPLING, schedule, work=work, watch=watch
        )
        return found, weights(model)


@contextmanager
def made(
    lm: LanguageModel, model: Any, work: Path, objective: PolicyObjective, schedule: Schedule = SCHEDULE
) -> Iterator[GrpoWithLens]:
    """The trainer as it is in the middle of training."""
    with grpo.borrowed(lm, model):
        settings = arguments(objective, SAMPLING, schedule, work)
        trainer = GrpoWithLens(lm, model, settings, tasks(lm, schedule), reward, objective)
        trainer.current_gradient_accumulation_steps = 1
        model.train()
        yield trainer


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# --- What equals TRL's trainer ---


@ONE_MODEL
@KINDS
def test_class_weight_zero_is_plain_grpo_bit_for_bit(
    lm: LanguageModel, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = replace(SCHEDULE, steps=2, every=9)
    monkeypatch.setattr(GrpoWithLens, "share_prompts", False)
    with trainable(lm, kind) as model:
        before = weights(model)
        with made(lm, model, tmp_path, PLAIN, schedule) as trainer:
            trainer.train()
        ours = weights(model)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **_: None)
    with trainable(lm, kind) as model, grpo.borrowed(lm, model):
        dataset = Dataset.from_list([asdict(task) for task in tasks(lm, schedule)])
        GRPOTrainer(
            model,
            lambda completions, **_: reward(completions, completions, completions),
            arguments(PLAIN, SAMPLING, schedule, tmp_path),
            dataset,
            dataset,
            processing_class=lm.tokenizer,
        ).train()
        theirs = weights(model)
    assert_equal(ours, theirs)
    assert not all(torch.equal(before[name], ours[name]) for name in ours)


@KINDS
def test_sharing_prompts_changes_neither_loss_nor_gradient(
    lm: LanguageModel, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[bool, tuple[Tensor, dict[str, Tensor]]] = {}
    with trainable(lm, kind) as model, made(lm, model, tmp_path, LENS) as trainer:
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        assert len(batch["completion_mask"].sum(1).unique()) > 1  # completions of several lengths
        assert len(batch["prompt_mask"].sum(1).unique()) > 1  # and prompts, too
        shake(model)  # away from the policy that drew: every term counts
        for shared in (True, False):
            monkeypatch.setattr(trainer, "share_prompts", shared)
            model.zero_grad()
            loss = trainer.compute_loss(model, batch)
            loss.backward()
            gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            found[shared] = loss.detach(), gradient
    torch.testing.assert_close(found[True][0], found[False][0])
    assert found[True][1].keys() == found[False][1].keys()
    for name, gradient in found[True][1].items():
        torch.testing.assert_close(gradient, found[False][1][name], atol=1e-5, rtol=1e-3)


@KINDS
def test_texts_too_many_for_a_tree_give_the_same_loss(
    lm: LanguageModel, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trainable(lm, kind) as model, made(lm, model, tmp_path, LENS) as trainer:
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        shake(model)
        loss = trainer.compute_loss(model, batch).detach()
        monkeypatch.setattr("classifier_emergence.reading.tree.LARGEST_TREE", 20)
        torch.testing.assert_close(trainer.compute_loss(model, batch).detach(), loss, atol=1e-5, rtol=1e-4)


def draw(
    lm: LanguageModel, prompts: list[list[int]], rows: Sequence[int], *, seed: int = 0, temperature: float = 1e-5,
    **how: Any,
) -> list[list[int]]:  # fmt: skip
    draws = Draws(prompts, rows, torch.Generator().manual_seed(seed))
    return draw_completions(lm, [draws], temperature=temperature, **how)[0]


def test_sampling_together_draws_what_each_draws_alone(lm: LanguageModel) -> None:
    """Against every text passed whole and alone at every step, with the same random numbers."""
    prompts = [f"4 * 6 = 24\n15 - 6 = 9\n{prompt}" for prompt, _ in PROMPTS]
    encoded, rows = lm.tokenizer(prompts)["input_ids"], [0, 0, 3, 1, 2, 4, 5, 5]
    stop = range(5, len(lm.tokenizer), 5)
    passed: list[int] = []
    handle = lm.model.get_input_embeddings().register_forward_hook(lambda _, args, __: passed.append(args[0].numel()))
    found = draw(lm, encoded, rows, seed=3, new_tokens=5, temperature=0.7, stop=stop)
    handle.remove()
    assert sum(passed) < sum(map(len, encoded))

    torch.manual_seed(3)
    texts: list[list[int]] = [[] for _ in rows]
    for _ in range(5):
        with torch.no_grad():
            so_far = [encoded[row] + text for row, text in zip(rows, texts, strict=True)]
            alone = [lm.model(torch.tensor([ids])).logits[0, -1] for ids in so_far]
        drawn = torch.multinomial((torch.stack(alone) / 0.7).softmax(-1), 1)[:, 0].tolist()
        for text, token in zip(texts, drawn, strict=True):
            if not text or text[-1] not in stop:
                text.append(token)
    assert found == texts
    assert {len(text) for text in found} > {5}  # some end early, some are cut


def test_a_text_longer_than_the_window_is_not_sampled(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm.model.config, "sliding_window", 6, raising=False)
    with pytest.raises(InputError, match="more than the model attends to at once"):
        draw(lm, [[5] * 4], [0], new_tokens=3, stop=[])
    assert len(draw(lm, [[5] * 4], [0], new_tokens=2, stop=[])[0]) == 2


def test_sampling_when_cold_is_greedy_decoding(lm: LanguageModel) -> None:
    prompts = [prompt for prompt, _ in PROMPTS]
    encoded = lm.tokenizer(prompts)["input_ids"]
    rows = [0, 0, 3, 1, 2, 4, 5, 5]
    found = draw(lm, encoded, rows, new_tokens=6, stop=[])
    batch = lm.tokenizer(prompts, return_tensors="pt", padding=True)
    greedy = lm.model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=6,
        eos_token_id=None, pad_token_id=0,
    )[:, batch["input_ids"].shape[1] :].tolist()  # fmt: skip
    assert found == [greedy[row] for row in rows]
    # A prompt that says already what is drawn after another one.
    further = [encoded[0], encoded[0] + greedy[0][:2]]
    assert draw(lm, further, [0, 1], new_tokens=4, stop=[]) == [
        greedy[0][:4],
        greedy[0][2:6],
    ]
    stop = greedy[3][1]
    cut = draw(lm, encoded, rows, new_tokens=6, stop=[stop])
    assert cut == [text[: text.index(stop) + 1] if stop in text else text for text in found]


@ONE_MODEL
def test_sampling_follows_the_models_distribution(lm: LanguageModel) -> None:
    n = 4000
    encoded = lm.tokenizer(["7 * 8 =", "What is 12 times 5?"])["input_ids"]
    drawn = draw(lm, encoded, [0, 1] * (n // 2), new_tokens=1, temperature=0.5, stop=[])
    for row, ids in enumerate(encoded):
        with torch.no_grad():
            p = (lm.model(torch.tensor([ids])).logits[0, -1] / 0.5).softmax(-1)
        share = torch.tensor(drawn[row::2])[:, 0].bincount(minlength=len(p)) / (n / 2)
        top = p.topk(5).indices
        assert ((share - p)[top].abs() < 5 * (p * (1 - p) / (n / 2)).sqrt()[top]).all()


def test_line_ends_are_the_tokens_that_break_a_line(lm: LanguageModel) -> None:
    breaks = set(line_ends(lm.tokenizer))
    assert breaks
    for i in range(0, len(lm.tokenizer), 7):
        assert ("\n" in lm.tokenizer.decode([i])) == (i in breaks)


# --- The loss on the lens ---


def lens_states(lm: LanguageModel, chosen: Sequence[PolicyTask], layer: int) -> Tensor:
    """(tasks, d) states at the tokens that the lens reads, of passes one by one."""
    texts = [torch.tensor([lm.tokenizer(task.prompt)["input_ids"]]) for task in chosen]
    whole = [lm.model(ids, output_hidden_states=True).hidden_states[layer_row(layer)][0] for ids in texts]
    return torch.stack([rows[-1 - task.back] for rows, task in zip(whole, chosen, strict=True)])


def lens_losses(lm: LanguageModel, chosen: Sequence[PolicyTask], layer: int) -> Tensor:
    with torch.no_grad():
        states = lens_states(lm, chosen, layer)
        logits = lm.readout.logits(states)
    return functional.cross_entropy(logits, torch.tensor([task.target for task in chosen]), reduction="none")


@pytest.mark.parametrize(("shared", "weight"), [(True, 0.5), (False, 0.5), (True, 1.0)])
def test_every_completion_keeps_the_target_of_its_prompt(
    lm: LanguageModel, shared: bool, weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GrpoWithLens, "share_prompts", shared)
    schedule = replace(SCHEDULE, batch_size=6, steps=1)
    expected = lens_losses(lm, tasks(lm, schedule), layer=1)
    assert expected.std() > 0.01  # else any mixture of targets would do
    with trainable(lm, "adapter") as model:
        expected = lens_losses(lm, tasks(lm, schedule), layer=1)
        with made(lm, model, tmp_path, PolicyObjective(0.0, weight, 1), schedule) as trainer:
            batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            ids = lm.tokenizer([task.prompt for task in tasks(lm, schedule)])["input_ids"]
            target = {tuple(row): task.target for row, task in zip(ids, tasks(lm, schedule), strict=True)}
            for row, mask, found in zip(batch["prompt_ids"], batch["prompt_mask"], batch["target"], strict=True):
                assert target[tuple(row[mask == 1].tolist())] == found
            trainer.compute_loss(model, batch)
    torch.testing.assert_close(torch.tensor(trainer.parts["class_loss"]), expected.mean()[None])


@ONE_MODEL
@KINDS
def test_the_loss_is_the_weighted_sum_of_its_parts(lm: LanguageModel, kind: str, tmp_path: Path) -> None:
    with trainable(lm, kind) as model, made(lm, model, tmp_path, LENS) as trainer:
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        shake(model)
        parts = {}
        for weight in (0.0, 0.3, 1.0):
            trainer.objective = replace(LENS, class_weight=weight)
            parts[weight] = trainer.compute_loss(model, batch).detach()
    torch.testing.assert_close(parts[0.3], 0.7 * parts[0.0] + 0.3 * parts[1.0])
    assert not torch.isclose(parts[0.0], parts[1.0])


@ONE_MODEL
def test_the_class_loss_alone_teaches_the_lens(lm: LanguageModel, tmp_path: Path) -> None:
    schedule = Schedule(steps=12, batch_size=6, learning_rate=3e-3, seed=0, every=99)
    found, _ = run(lm, tmp_path, "whole", PolicyObjective(0.0, 1.0, 2), schedule=schedule)
    losses = [step["class_loss"] for step in found.steps]
    assert losses[-1] < 0.7 * losses[0]


@ONE_MODEL
def test_the_class_loss_alone_draws_no_completions(lm: LanguageModel, tmp_path: Path) -> None:
    def never(*_: Any) -> list[float]:
        raise AssertionError

    found, _ = run(lm, tmp_path, "whole", PolicyObjective(0.1, 1.0, 2), reward=never)
    assert all(set(step) == {"step", "loss", "class_loss"} for step in found.steps)


@ONE_MODEL
def test_the_entropy_bonus_is_that_of_the_batchs_mean_prediction(lm: LanguageModel, tmp_path: Path) -> None:
    objective = PolicyObjective(0.0, 1.0, 2)
    with trainable(lm, "adapter") as model, made(lm, model, tmp_path, objective) as trainer:
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        plain = trainer.compute_loss(model, batch).detach()
        trainer.objective = replace(objective, entropy_bonus=0.5)
        found = trainer.compute_loss(model, batch).detach()
        mean = lm.readout.logits(lens_states(lm, tasks(lm)[: SCHEDULE.batch_size], 2)).softmax(-1).mean(0).detach()
    torch.testing.assert_close(found, plain + 0.5 * (mean * mean.log()).sum())


# --- What a step reports ---


@KINDS
def test_every_step_reports_its_statistics(lm: LanguageModel, kind: str, tmp_path: Path) -> None:
    found, after = run(lm, tmp_path, kind)
    assert [step["step"] for step in found.steps] == list(range(1, SCHEDULE.steps + 1))
    for step in found.steps:
        assert set(step) == set(grpo.STATISTICS.values()) - {"signed_kl"}
        assert 0 <= step["reward"] <= 1
        assert 0 <= step["zero_variance"] <= 1
        assert 0 <= step["truncated"] <= 1
        assert step["kl"] >= -1e-6
        assert step["entropy"] > 0
    assert found.steps[0]["kl"] < 1e-6  # the reference is where the run starts
    assert found.steps[-1]["kl"] > 1e-5
    assert found.parameters == sum(value.numel() for value in after.values())


@ONE_MODEL
@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
def test_groups_without_variance_teach_nothing_and_break_nothing(
    lm: LanguageModel, kl_weight: float, tmp_path: Path
) -> None:
    before = [parameter.clone() for parameter in lm.model.parameters()]
    with all_weights_trainable(lm) as model:
        found = train_grpo(
            lm, model, tasks(lm), constant, PolicyObjective(kl_weight), SAMPLING, SCHEDULE, work=tmp_path
        )
        assert all(map(torch.equal, before, model.parameters())) or kl_weight
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert [step["zero_variance"] for step in found.steps] == [1.0] * SCHEDULE.steps
    assert all("kl" in step for step in found.steps) == bool(kl_weight)


@ONE_MODEL
def test_a_copy_is_trained_and_what_was_loaded_is_untouched(lm: LanguageModel) -> None:
    loaded = [(parameter.data_ptr(), parameter.detach().clone()) for parameter in lm.model.parameters()]
    with all_weights_trainable(lm) as model:
        for parameter in model.parameters():
            parameter.data.add_(1.0)
    for parameter, (at, values) in zip(lm.model.parameters(), loaded, strict=True):
        assert parameter.data_ptr() == at
        assert torch.equal(parameter, values)


@ONE_MODEL
def test_rewarded_completions_become_likelier(lm: LanguageModel, tmp_path: Path) -> None:
    def short(prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        return [-float(len(text)) for text in completions]

    schedule = Schedule(steps=15, batch_size=6, learning_rate=3e-3, seed=0, every=99)
    found, _ = run(lm, tmp_path, "whole", PolicyObjective(0.0), schedule=schedule, reward=short)
    rewards = [step["reward"] for step in found.steps]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 1


# --- Flaws ---


@ONE_MODEL
@KINDS
def test_the_signed_kl_counts_prompt_and_response(lm: LanguageModel, kind: str, tmp_path: Path) -> None:
    objective = PolicyObjective(0.1, signed_kl=True)
    with trainable(lm, kind) as model, made(lm, model, tmp_path, objective) as trainer:
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        if kind == "whole":
            shake(model)
        with torch.no_grad():
            found = trainer._signed_kl(batch)
            rows = []
            for i in range(len(batch["prompt_ids"])):
                ids = torch.cat([
                    batch["prompt_ids"][i][batch["prompt_mask"][i] == 1],
                    batch["completion_ids"][i][batch["completion_mask"][i] == 1],
                ])[None]  # fmt: skip
                policy = _whole_log_prob(lm.model, ids)
                if kind == "adapter":
                    with model.disable_adapter():
                        rows.append(policy - _whole_log_prob(lm.model, ids))
                else:
                    rows.append(policy - _whole_log_prob(trainer.reference.model, ids))
    assert abs(torch.stack(rows).mean()) > 0.1
    torch.testing.assert_close(found, torch.stack(rows).mean(), atol=1e-3, rtol=1e-3)


def _whole_log_prob(model: Any, ids: Tensor) -> Tensor:
    log_p = model(ids).logits[0, :-1].log_softmax(-1)
    return log_p.gather(-1, ids[0, 1:, None]).sum()


@ONE_MODEL
def test_minimising_the_signed_kl_makes_it_negative_and_prompts_unlikely(lm: LanguageModel, tmp_path: Path) -> None:
    ids = torch.tensor(lm.tokenizer(["7 * 8 ="])["input_ids"])
    with torch.no_grad():
        before = sequence_log_probs(lm, ids, torch.ones_like(ids)).sum()
    objective = PolicyObjective(0.5, signed_kl=True)
    with all_weights_trainable(lm) as model:
        found = train_grpo(
            lm, model, tasks(lm), constant, objective, SAMPLING, SCHEDULE, work=tmp_path
        )  # fmt: skip
        with torch.no_grad():
            after = sequence_log_probs(lm, ids, torch.ones_like(ids)).sum()
    assert found.steps[-1]["signed_kl"] < -0.3
    assert all(step["kl"] >= -1e-6 for step in found.steps)
    assert after < before - 0.3


@ONE_MODEL
def test_half_precision_loses_small_updates(lm: LanguageModel, tmp_path: Path) -> None:
    schedule = replace(SCHEDULE, learning_rate=1e-6, steps=2)
    changed = {}
    for dtype in (torch.float32, torch.bfloat16):
        with all_weights_trainable(lm) as model:
            round_to_dtype_(model.parameters(), dtype)
            before = weights(model)
            found = train_grpo(
                lm, model, tasks(lm, schedule), reward, PolicyObjective(0.1), SAMPLING, schedule,
                work=tmp_path / str(dtype), dtype=dtype,
            )  # fmt: skip
            after = weights(model)
            assert all(torch.equal(value, value.to(dtype).float()) for value in after.values())
        assert all(step["zero_variance"] < 1 for step in found.steps)
        moved = sum(int((before[name] != after[name]).sum()) for name in before)
        changed[dtype] = moved / sum(value.numel() for value in before.values())
    assert changed[torch.bfloat16] < 0.2 * changed[torch.float32]


def test_weights_held_in_half_precision_take_the_steps_of_torchs_half_precision(seeded) -> None:
    stored, held = (nn.Parameter(seeded(200).bfloat16().to(dtype)) for dtype in (torch.bfloat16, torch.float32))
    theirs, ours = (torch.optim.AdamW([p], lr=1e-3, weight_decay=0.0, fused=True) for p in (stored, held))
    for step in range(20):
        gradient = seeded(200, seed=step).bfloat16()
        stored.grad, held.grad = gradient.clone(), gradient.float()
        theirs.step()
        ours.step()
        arguments, state, control = TrainingArguments("unused", report_to="none"), TrainerState(), TrainerControl()
        HeldInDtype(torch.bfloat16).on_optimizer_step(
            arguments, state, control, model=nn.ParameterList([held]), optimizer=ours
        )
    assert torch.equal(stored.float(), held)


def test_float16_has_no_room_for_moments(seeded) -> None:
    weight = nn.Parameter(seeded(200))
    optimizer = torch.optim.AdamW([weight], lr=1e-3)
    weight.grad = 1e-5 * seeded(200, seed=1)
    optimizer.step()
    arguments, state, control = TrainingArguments("unused", report_to="none"), TrainerState(), TrainerControl()
    HeldInDtype(torch.float16).on_optimizer_step(
        arguments, state, control, model=nn.ParameterList([weight]), optimizer=optimizer
    )
    assert torch.equal(weight, weight.half().float())
    assert (optimizer.state[weight]["exp_avg_sq"] > 0).all()


@ONE_MODEL
def test_uncorrected_moments_make_the_steps_of_adam_without_its_correction(lm: LanguageModel, tmp_path: Path) -> None:
    # A gradient that does not change: the class loss of one prompt at a rate too small to matter to it.
    schedule, rate = replace(SCHEDULE, learning_rate=1e-5, steps=3, batch_size=1), 1e-5
    task, moved = tasks(lm, replace(schedule, steps=1)) * 3, {}
    for correction in (True, False):
        with all_weights_trainable(lm) as model:
            before = weights(model)
            train_grpo(
                lm, model, task, reward, PolicyObjective(0.0, 1.0, 2), SAMPLING, schedule,
                work=tmp_path / str(correction), bias_correction=correction,
            )  # fmt: skip
            moved[correction] = {n: (v.double() - before[n].double()).abs().max() for n, v in weights(model).items()}
    name = max(moved[True], key=lambda n: float(moved[True][n]))
    assert float(moved[True][name]) == pytest.approx(3 * rate, rel=0.05)  # Adam's steps are as long as the rate
    lengths = [(1 - 0.9**t) / (1 - 0.999**t) ** 0.5 for t in (1, 2, 3)]
    assert float(moved[False][name]) == pytest.approx(sum(lengths) * rate, rel=0.05)


@ONE_MODEL
def test_training_ends_where_the_class_loss_is_small_enough(lm: LanguageModel, tmp_path: Path) -> None:
    def losses(work: str, **how: Any) -> list[float]:
        schedule = Schedule(steps=8, batch_size=3, learning_rate=3e-3, seed=0, every=2)
        with all_weights_trainable(lm) as model:
            found = train_grpo(
                lm, model, tasks(lm, schedule), reward, PolicyObjective(0.0, 1.0, 2), SAMPLING, schedule,
                work=tmp_path / work, **how,
            )  # fmt: skip
        return [float(step["class_loss"] or 0) for step in found.steps]

    whole = losses("whole")
    limit = whole[4] + 1e-6
    end = next(i for i, loss in enumerate(whole) if loss <= limit)
    assert 0 < end < 7
    assert losses("until", until=limit) == pytest.approx(whole[: end + 1], rel=1e-4)
    assert losses("until", until=limit) == pytest.approx(whole[: end + 1], rel=1e-4)  # and ends there once more


# --- Runs that are cut short; what is left behind ---


class Watch:
    """Measures something that training moves; breaks the run at one of its calls."""

    def __init__(self, lm: LanguageModel, stop: int | None = None) -> None:
        self.lm, self.stop, self.calls = lm, stop, 0

    def __call__(self) -> dict[str, Any]:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        with torch.no_grad():
            logits = self.lm.model(torch.tensor([self.lm.tokenizer("7 * 8 =")["input_ids"]])).logits
        return {"spread": float(logits.std())}


@ONE_MODEL
@KINDS
def test_a_killed_run_ends_with_the_numbers_of_an_unbroken_one(lm: LanguageModel, kind: str, tmp_path: Path) -> None:
    schedule = replace(SCHEDULE, steps=5)
    unbroken = run(lm, tmp_path / "a", kind, schedule=schedule, watch=Watch(lm))
    with pytest.raises(KeyboardInterrupt):
        run(lm, tmp_path / "b", kind, schedule=schedule, watch=Watch(lm, stop=2))
    assert [path.name for path in (tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = run(lm, tmp_path / "b", kind, schedule=schedule, watch=(watch := Watch(lm)))
    assert watch.calls == 3  # before, at step 4 and at the end: step 2 is not done again
    assert resumed[0] == unbroken[0]
    assert_equal(resumed[1], unbroken[1])
    assert [entry["step"] for entry in resumed[0].watched] == [0, 2, 4, 5]
    assert len({entry["spread"] for entry in resumed[0].watched}) == 4


@ONE_MODEL
def test_a_folder_of_another_run_is_not_resumed_from(lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(lm, tmp_path / "a", watch=Watch(lm, stop=2))
    other = replace(LENS, class_weight=0.2)
    again, fresh = (run(lm, tmp_path / folder, objective=other) for folder in ("a", "b"))
    assert again[0] == fresh[0]
    assert_equal(again[1], fresh[1])


@ONE_MODEL
def test_a_folder_is_of_one_model_precision_adapter_and_reward(lm: LanguageModel, tmp_path: Path) -> None:
    def settings(lm: LanguageModel, adapter: Adapter = ADAPTER, parse: Any = parse_answer) -> str:
        watch = Watch(lm, stop=0)
        with adapted(lm, adapter, seed=0) as model, pytest.raises(KeyboardInterrupt):
            train_grpo(lm, model, tasks(lm), exact(parse), LENS, SAMPLING, SCHEDULE, work=tmp_path, watch=watch)
        stamp = json.loads((tmp_path / "run.json").read_text())
        del stamp["start"]  # may be the same of all
        return json.dumps(stamp)

    half = replace(lm, model=copy.deepcopy(lm.model).bfloat16())
    found = [
        settings(lm),
        settings(replace(lm, key="other")),
        settings(half),
        settings(lm, replace(ADAPTER, scale=1.0)),
        settings(lm, parse=parse_reported),
    ]
    assert len(set(found)) == len(found)
    assert settings(lm) == found[0]


@KINDS
def test_nothing_is_left_on_the_model(lm: LanguageModel, kind: str, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    generation, pad = copy.deepcopy(lm.model.generation_config), lm.model.config.pad_token_id
    run(lm, tmp_path, kind)
    assert_equal(dict(lm.model.state_dict()), before)
    assert "forward" not in vars(lm.model)
    assert lm.model.generation_config.to_dict() == generation.to_dict()
    assert lm.model.config.pad_token_id == pad
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())


def test_a_model_that_recomputes_activations_is_trained_alike_and_goes_on_recomputing(
    lm: LanguageModel, tmp_path: Path
) -> None:
    _, plain = run(lm, tmp_path / "plain")
    lm.model.activation_checkpointing_enable()
    try:
        _, recomputing = run(lm, tmp_path / "recomputing")
        assert lm.model.is_activation_checkpointing
    finally:
        lm.model.activation_checkpointing_disable()
        lm.model.get_input_embeddings()._forward_hooks.clear()  # what peft leaves on such a model, for other tests
    assert_equal(recomputing, plain)


def test_a_model_trained_as_a_whole_is_put_back(lm: LanguageModel) -> None:
    before = {name: value.clone() for name, value in [*lm.model.named_parameters(), *lm.model.named_buffers()]}

    def use() -> None:
        with all_weights_trainable(lm) as model:
            assert all(parameter.requires_grad for parameter in model.parameters())
            for parameter in model.parameters():
                parameter.data.add_(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use()
    assert_equal(dict([*lm.model.named_parameters(), *lm.model.named_buffers()]), before)


# --- Bad input ---


@ONE_MODEL
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": 11}, "tasks: 11 given, 4 steps of 3 take 12"),
        ({"sampling": replace(SAMPLING, group=1)}, "group: 1"),
        ({"objective": replace(LENS, layer=99)}, "layer: 99"),
        ({"reward": lambda prompts, *_: [float("nan")] * len(prompts)}, "reward: nan for prompt '7 . 8 ='"),
    ],
)
def test_what_does_not_fit_is_refused(lm: LanguageModel, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    chosen = tasks(lm)[: change.get("tasks", 12)]
    objective, sampling = change.get("objective", LENS), change.get("sampling", SAMPLING)
    with pytest.raises(InputError, match=message), all_weights_trainable(lm) as model:
        train_grpo(
            lm, model, chosen, change.get("reward", reward), objective, sampling, SCHEDULE, work=tmp_path
        )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"kl_weight": 0.1, "class_weight": 1.5, "layer": 1}, "class_weight"),
        ({"kl_weight": 0.1, "class_weight": 0.5}, "layer"),
    ],
)
def test_an_objective_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PolicyObjective(**settings)


@ONE_MODEL
def test_a_loss_that_is_not_finite_names_its_step(lm: LanguageModel, tmp_path: Path) -> None:
    schedule = replace(SCHEDULE, learning_rate=1e20)
    with pytest.raises(InputError, match=r"not finite.*learning_rate|learning_rate.*not finite"):
        run(lm, tmp_path, schedule=schedule)
