"""Agreement of two losses' gradients: the gradients by a plain pass, and cosines of known expected gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from classifier_emergence.training.rl.run import all_weights_trainable
from experiments.params import load_params
from experiments.shared import interference
from experiments.shared.interference import cosines, gradient_products
from experiments.shared.reinforcement import PolicyStudy

PARAMS = load_params(Path(__file__).resolve().parents[3] / "params.tiny.yaml")


@pytest.fixture
def study(tiny_models: Path) -> PolicyStudy:
    return PolicyStudy(PARAMS, str(tiny_models / "tiny-gemma"))


def test_gradients_are_those_of_the_losses_by_their_definitions(
    study: PolicyStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems, lm = study.problems.test[:3], study.lm
    torch.manual_seed(0)
    prompts, completions, _ = study.draw(problems)
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    monkeypatch.setattr(study, "draw", lambda _: (prompts, completions, rewards))
    with all_weights_trainable(lm) as model:
        policy, own = interference._gradients(study, problems)
        last = study.layer
        trained = [[p for p in block.parameters() if p.requires_grad] for block in lm.blocks[: last + 1]]

        def flat(loss: Tensor) -> list[Tensor]:
            model.zero_grad()
            loss.backward()
            return [torch.cat([p.grad.flatten() for p in part if p.grad is not None]) for part in trained]

        losses, classes = [], []
        for i, ids in enumerate(completions):
            text = torch.tensor([prompts[i // 2] + ids])
            start = len(prompts[i // 2]) - 1
            scores = model(input_ids=text).logits[0, start:-1].log_softmax(-1)
            advantage = (rewards[i // 2] - rewards[i // 2].mean()) / (rewards[i // 2].std() + 1e-4)
            losses.append(-advantage[i % 2] * scores.gather(-1, text[0, start + 1 :, None]).mean())
        for wanted, found in zip(flat(torch.stack(losses).mean()), policy, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)
        for prompt, problem in zip(prompts, problems, strict=True):
            state = model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[last + 1][0, -1:]
            scores = lm.readout.logits(state).log_softmax(-1)
            classes.append(-scores[0, study.spaced_targets()[problem.operation]])
        for wanted, found in zip(flat(torch.stack(classes).mean()), own, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-3)


def test_measuring_leaves_the_generator_and_the_gradients_alone(study: PolicyStudy) -> None:
    with all_weights_trainable(study.lm) as model:
        torch.manual_seed(3)
        state = torch.get_rng_state()
        found = gradient_products(study, 2, 3)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert {name: part.shape for name, part in found.items()} == dict.fromkeys(found, (2, study.layer + 1))
    assert not torch.equal(found["class"][0], found["class"][1])


def products(policy: Tensor, own: Tensor, noise: float, draws: int = 40) -> dict[str, Tensor]:
    """Of one block, whose gradients are expected ones and noise."""
    generator = torch.Generator().manual_seed(0)

    def noisy(gradient: Tensor) -> Tensor:
        return gradient + noise * torch.randn(draws, len(gradient), generator=generator)

    p, q, c, d = (noisy(each).double() for each in (policy, policy, own, own))
    return {
        "policy": (p * q).sum(-1, keepdim=True), "class": (c * d).sum(-1, keepdim=True),
        "across": ((p * d) + (q * c)).sum(-1, keepdim=True) / 2,
        "policy_squared": ((p * p) + (q * q)).sum(-1, keepdim=True) / 2,
        "class_squared": ((c * c) + (d * d)).sum(-1, keepdim=True) / 2,
    }  # fmt: skip


def test_the_cosine_is_that_of_expected_gradients_whatever_the_noise() -> None:
    x, y = torch.eye(100)[0], torch.eye(100)[1]
    opposed = cosines(products(10 * x, 10 * (y - x), noise=1.0), confidence=0.95, resamples=200)
    assert opposed["cosine"]["mean"] == pytest.approx(-(0.5**0.5), abs=0.05)
    assert opposed["across"]["mean"] == pytest.approx(-(0.5**0.5) / (1 + 1) ** 0.5 / 1.5**0.5, abs=0.05)
    low, high = opposed["cosine"]["interval"]
    assert low <= opposed["cosine"]["mean"] <= high < 0
    assert opposed["policy_halves"]["mean"] == pytest.approx(0.5, abs=0.05)
    assert opposed["class_share"]["mean"] == pytest.approx(300**0.5 / (300**0.5 + 200**0.5), abs=0.02)
    assert list(opposed["by_block"]["across"]) == pytest.approx([opposed["across"]["mean"]])


def test_of_a_gradient_that_is_not_known_no_cosine_is_known() -> None:
    x = torch.eye(100)[0]
    nothing = cosines(products(0 * x, 10 * x, noise=1.0), confidence=0.95, resamples=200)
    assert nothing["cosine"]["interval"][1] - nothing["cosine"]["interval"][0] > 1
    zero = products(0 * x, 10 * x, noise=1.0) | {"policy": torch.zeros(40, 1), "policy_squared": torch.zeros(40, 1)}
    found = cosines(zero, confidence=0.95, resamples=200)
    assert found["cosine"] == {"mean": 0.0, "interval": [-1.0, 1.0], "n": 40}
    assert found["class_share"]["mean"] == 1
