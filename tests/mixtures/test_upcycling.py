"""Upcycling: what is joined computes what it should, only what should be trained is, and routers learn from experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from classifier_emergence.errors import InputError
from classifier_emergence.mixtures import upcycling
from classifier_emergence.mixtures.routers import load_routers
from classifier_emergence.mixtures.routing import hooked, routers, trace
from classifier_emergence.mixtures.upcycling import (
    Joint,
    join_experts,
    load_balancing,
    merge_adapter,
    save_routers,
    self_generated,
    text_losses,
    train_expert,
    train_jointly,
    trained_tensors,
)
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.training.adapters import Adapter, adapted
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.modules import MLP, VO

ONE_MODEL = pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)
SCHEDULE = Schedule(steps=6, batch_size=4, learning_rate=1e-2, seed=0, every=2)
JOINT = Joint(router_learning_rate=5e-2, balance=0.01)


def save_adapter(
    lm: LanguageModel,
    folder: Path,
    *,
    seed: int,
    size: float,
    modules: tuple[str, ...] = MLP,
    blocks: tuple[int, ...] = (0, 1, 2, 3),
) -> Path:
    """An adapter with random B; size 0 changes nothing."""
    with adapted(lm, Adapter(modules, 4, 2.0, blocks), seed=seed) as wrapped:
        shake(wrapped, size, seed)
        wrapped.save_pretrained(str(folder))
    return folder


def shake(wrapped: PeftModel, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def experts(lm: LanguageModel, tmp_path: Path) -> list[Path]:
    """Three experts that differ much."""
    return [save_adapter(lm, tmp_path / f"expert-{n}", seed=n, size=0.3) for n in range(3)]


@pytest.fixture
def texts(lm: LanguageModel) -> list[list[int]]:
    prompts = ["7 * 8 = 56", "What is 12 plus 5? 17", "If you divide 81 by 9, you get 9", "23 + 45 =", "6 * 7 = 42"]
    return [lm.tokenizer(prompt)["input_ids"] for prompt in prompts]


def logits(lm: LanguageModel, texts: list[list[int]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([lm.model(input_ids=torch.tensor([text])).logits[0] for text in texts])


def changed(lm: LanguageModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in lm.model.state_dict().items() if not torch.equal(tensor, before[name])}


def state(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """What joint training goes through from here on, step by step."""
    seen: list[list[list[int]]] = []
    plain = upcycling._losses
    monkeypatch.setattr(upcycling, "_losses", lambda *args: (seen.append(args[1]), plain(*args))[1])
    return seen


# --- Joining ---


@ONE_MODEL
def test_experts_that_are_the_base_models_own_compute_what_it_computes(
    lm: LanguageModel, texts: list[list[int]], tmp_path: Path
) -> None:
    same = [save_adapter(lm, tmp_path / f"same-{n}", seed=n, size=0.0) for n in range(3)]
    joined = join_experts(lm, same, top_k=2, seed=0)
    assert type(joined.model).__name__ == "MixtralForCausalLM"
    assert not any(parameter.requires_grad for parameter in joined.model.parameters())
    torch.testing.assert_close(logits(joined, texts), logits(lm, texts), atol=1e-4, rtol=1e-4)


@ONE_MODEL
def test_a_single_expert_computes_what_the_merged_model_does(
    lm: LanguageModel, experts: list[Path], texts: list[list[int]]
) -> None:
    before = state(lm)
    twin, joined = merge_adapter(lm, experts[1]), join_experts(lm, experts[1:2], top_k=1, seed=0)
    assert not changed(lm, before)
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    torch.testing.assert_close(logits(joined, texts), logits(twin, texts), atol=1e-4, rtol=1e-4)
    assert (logits(twin, texts) - logits(lm, texts)).abs().max() > 0.1
    with adapted(lm, Adapter(MLP, 4, 2.0, (0, 1, 2, 3)), seed=1) as wrapped:
        shake(wrapped, 0.3, 1)
        torch.testing.assert_close(logits(lm, texts), logits(twin, texts), atol=1e-4, rtol=1e-4)


@ONE_MODEL
def test_every_expert_has_its_place(lm: LanguageModel, experts: list[Path], texts: list[list[int]]) -> None:
    joined = join_experts(lm, experts, top_k=1, seed=0)
    for expert, folder in enumerate(experts):
        for router in routers(joined).values():
            # A row that the others oppose wins at every state of one sign; force the choice instead.
            router.register_forward_hook(
                lambda _, __, out, e=expert: (out[0], torch.ones_like(out[1]), torch.full_like(out[2], e))
            )
        torch.testing.assert_close(
            logits(joined, texts), logits(merge_adapter(lm, folder), texts), atol=1e-4, rtol=1e-4
        )
        for router in routers(joined).values():
            router._forward_hooks.clear()


@ONE_MODEL
def test_blocks_that_no_adapter_changes_stay_dense(lm: LanguageModel, texts: list[list[int]], tmp_path: Path) -> None:
    some = [
        save_adapter(lm, tmp_path / f"{n}", seed=n, size=0.3, blocks=blocks) for n, blocks in enumerate([(1,), (1, 3)])
    ]
    before = state(lm)
    joined = join_experts(lm, some, top_k=2, seed=0)
    assert list(routers(joined)) == [1, 3]
    assert not changed(lm, before)
    train_jointly(joined, [texts], SCHEDULE, JOINT)
    assert not changed(lm, before)  # nothing of a dense block is shared with the base model
    assert load_routers(save_routers(joined, tmp_path / "saved")).layers == (1, 3)
    alone = join_experts(lm, some[:1], top_k=1, seed=0)
    assert list(routers(alone)) == [1]
    torch.testing.assert_close(logits(alone, texts), logits(merge_adapter(lm, some[0]), texts), atol=1e-4, rtol=1e-4)


@ONE_MODEL
def test_what_cannot_be_joined_is_refused(lm: LanguageModel, experts: list[Path], tmp_path: Path) -> None:
    before = state(lm)
    with pytest.raises(InputError, match="top_k: 4 of 3 experts"):
        join_experts(lm, experts, top_k=4, seed=0)
    with pytest.raises(InputError, match=r"it changes .*o_proj; give an adapter of"):
        join_experts(lm, [save_adapter(lm, tmp_path / "vo", seed=0, size=0.1, modules=VO)], top_k=1, seed=0)
    assert not changed(lm, before)


@pytest.mark.parametrize("lm", ["tiny-gemma"], indirect=True)
def test_a_base_that_is_no_llama_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="only Llama without biases"):
        join_experts(lm, [Path("nowhere")], top_k=1, seed=0)


# --- Balance ---


def test_balance_is_one_if_even_and_the_number_of_experts_if_one_gets_all() -> None:
    even = 20 * torch.eye(4).repeat(5, 1)
    assert load_balancing(even, 1).item() == pytest.approx(1, abs=1e-4)
    assert load_balancing(torch.tensor([[20.0, 0, 0, 0]] * 7), 1).item() == pytest.approx(4, abs=1e-4)
    assert load_balancing(torch.zeros(6, 4), 4).item() == pytest.approx(1)


def test_balance_is_that_of_transformers_for_one_layer() -> None:
    scores = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    theirs = load_balancing_loss_func((scores,), 5, 2)
    torch.testing.assert_close(load_balancing(scores, 2), theirs / 2)  # they count a token once for each of its two


# --- Experts ---


@ONE_MODEL
def test_an_expert_learns_its_text_and_leaves_the_base_model_as_it_was(
    lm: LanguageModel, texts: list[list[int]], tmp_path: Path
) -> None:
    before, untrained = state(lm), text_losses(lm, texts)
    place = Adapter(MLP, 4, 2.0, (1, 3))
    schedule = Schedule(steps=40, batch_size=5, learning_rate=1e-2, seed=0, every=16)
    curves = [train_expert(lm, [texts], place, schedule, tmp_path / name) for name in ("a", "b")]
    assert curves[0] == curves[1]
    assert [entry["step"] for entry in curves[0]] == [16, 32, 40]
    assert not changed(lm, before)
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    expert = merge_adapter(lm, tmp_path / "a")
    maps = {f"model.layers.{block}.mlp.{name}.weight" for block in place.layers for name in MLP}
    assert changed(expert, before) == maps
    assert text_losses(expert, texts).mean() < untrained.mean() - 0.1


# --- Joint training ---


@ONE_MODEL
def test_joint_training_changes_routers_and_gains_alone_and_repeats(
    lm: LanguageModel, experts: list[Path], texts: list[list[int]]
) -> None:
    models = [join_experts(lm, experts, top_k=2, seed=0) for _ in range(2)]
    before = state(models[0])
    untrained = text_losses(models[0], texts).mean()
    curves = [train_jointly(model, [texts], SCHEDULE, JOINT) for model in models]
    assert curves[0] == curves[1]
    assert [entry["step"] for entry in curves[0]] == [2, 4, 6]
    assert text_losses(models[0], texts).mean() < untrained
    touched = changed(models[0], before)
    assert touched == set(trained_tensors(models[0]))
    assert {name.partition("layers.")[2][2:] for name in touched} == {
        "mlp.gate.weight", "input_layernorm.weight", "post_attention_layernorm.weight",
    }  # fmt: skip
    assert not any(parameter.requires_grad for parameter in models[0].model.parameters())
    # What is kept gives the model back.
    again = join_experts(lm, experts, top_k=2, seed=1)
    again.model.load_state_dict(trained_tensors(models[0]), strict=False)
    torch.testing.assert_close(logits(again, texts), logits(models[0], texts))


@ONE_MODEL
def test_the_dense_twin_trains_its_gains_on_the_same_batches(
    lm: LanguageModel, experts: list[Path], texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = batches(monkeypatch)
    twin = merge_adapter(lm, experts[0])
    before = state(twin)
    curve = train_jointly(twin, [texts], SCHEDULE, JOINT)
    assert all("layernorm" in name for name in changed(twin, before))
    assert curve[0]["balance"] is None
    train_jointly(join_experts(lm, experts, top_k=2, seed=0), [texts], SCHEDULE, JOINT)
    assert seen[:6] == seen[6:]
    assert sorted(map(str, seen[0])) != sorted(map(str, seen[1]))


@ONE_MODEL
def test_every_batch_holds_as_many_texts_of_every_domain(
    lm: LanguageModel, experts: list[Path], texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = batches(monkeypatch)
    twin = merge_adapter(lm, experts[0])
    train_jointly(twin, [texts[:3], texts[3:]], SCHEDULE, JOINT)
    assert all([row in texts[:3] for row in rows] == [True, True, False, False] for rows in seen)
    assert all(sum(rows.count(text) for rows in seen[:3]) == 2 for text in texts[:3])  # each as often as the others
    with pytest.raises(InputError, match="batch_size: 4 for 3 domains; choose a multiple"):
        train_jointly(twin, [texts, texts, texts], SCHEDULE, JOINT)


@ONE_MODEL
def test_equal_experts_give_a_router_no_gradient_and_different_ones_do(
    lm: LanguageModel, experts: list[Path], texts: list[list[int]]
) -> None:
    sizes = []
    for paths in ([experts[0]] * 3, experts):
        model = join_experts(lm, paths, top_k=2, seed=0)
        weight = next(iter(routers(model).values())).weight
        weight.requires_grad_(True)
        with hooked(model):
            model.model(input_ids=torch.tensor([texts[1]]), labels=torch.tensor([texts[1]])).loss.backward()
        sizes.append(float(weight.grad.norm()))
    assert sizes[0] < 1e-3 * sizes[1]


@ONE_MODEL
def test_balance_alone_spreads_collapsed_routing(
    lm: LanguageModel, experts: list[Path], texts: list[list[int]]
) -> None:
    model = join_experts(lm, experts, top_k=1, seed=0)
    inputs: list[Tensor] = []
    handles = [r.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for r in routers(model).values()]
    logits(model, texts[:1])
    for router, handle, states in zip(routers(model).values(), handles, inputs, strict=True):
        handle.remove()
        mean = states.flatten(0, -2).mean(0)
        router.weight[0] = 3 * mean / mean.norm()

    def first_load() -> float:
        return float(trace(model, texts).shares().mean(1)[:, 0].mean())

    assert first_load() > 0.7
    # With one expert a token its weight is always 1: the language-modelling loss moves no router.
    schedule = Schedule(steps=30, batch_size=5, learning_rate=1e-6, seed=0, every=15)
    curve = train_jointly(model, [texts], schedule, Joint(router_learning_rate=3e-2, balance=1.0))
    assert first_load() < 0.6
    assert curve[1]["balance"] < curve[0]["balance"]


@ONE_MODEL
def test_a_diverging_rate_is_one_line_and_leaves_nothing_trainable(
    lm: LanguageModel, experts: list[Path], texts: list[list[int]]
) -> None:
    model = merge_adapter(lm, experts[0])
    schedule = Schedule(steps=20, batch_size=4, learning_rate=1e30, seed=0, every=2)
    with pytest.raises(InputError, match=r"^learning_rate: training diverged at step") as raised:
        train_jointly(model, [texts], schedule, JOINT)
    assert "\n" not in str(raised.value)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


# --- Texts ---


def test_losses_of_texts_are_the_models_own(lm: LanguageModel, texts: list[list[int]]) -> None:
    found = text_losses(lm, texts)
    for text, loss in zip(texts, found, strict=True):
        ids = torch.tensor([text])
        with torch.no_grad():
            expected = lm.model(input_ids=ids, labels=ids).loss
        torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)


def test_generated_texts_repeat_and_leave_the_global_generator_alone(lm: LanguageModel) -> None:
    openings = ["What is", "The product of", "If"]
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    found = self_generated(lm, openings, 7, new_tokens=6, seed=0)
    assert torch.equal(torch.rand(1), expected)
    assert len(found) == 7
    assert all(text.startswith(openings[i % 3]) for i, text in enumerate(found))
    assert len(set(found)) > 3
    assert found == self_generated(lm, openings, 7, new_tokens=6, seed=0)
    assert found != self_generated(lm, openings, 7, new_tokens=6, seed=1)
    with pytest.raises(InputError, match="openings: none"):
        self_generated(lm, [], 1, new_tokens=1, seed=0)


@ONE_MODEL
def test_saved_routers_are_read_back(lm: LanguageModel, experts: list[Path], tmp_path: Path) -> None:
    model = join_experts(lm, experts, top_k=2, seed=0)
    weights = load_routers(save_routers(model, tmp_path / "routers"))
    blocks: Any = model.blocks
    assert weights.layers == (0, 1, 2, 3)
    for row, block in zip(range(4), blocks, strict=True):
        assert torch.equal(weights.weight[row], block.mlp.gate.weight)
        assert torch.equal(weights.gain[row], block.post_attention_layernorm.weight)
    assert torch.equal(weights.final_gain, model.readout.norm.weight)
    assert weights.vocabulary == len(model.readout.weight)
