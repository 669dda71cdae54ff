from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import feed, read_states
from classifier_emergence.reading.readout import Readout
from classifier_emergence.reading.tuned_lens import Tuning, divergence, tuned_maps
from classifier_emergence.tasks.problems import NEUTRAL

UNTRAINED = Tuning(steps=1, positions=4, learning_rate=1e-9, every=1, top=8, tail=1000)
TUNING = Tuning(steps=60, positions=64, learning_rate=0.003, every=10, top=8, tail=100)
D = 16


@pytest.fixture
def readout(seeded: Callable[..., Tensor]) -> Readout:
    """Of a vocabulary of 300 tokens whose distributions are sharp."""
    return Readout(nn.Identity(), seeded(300, D), None, 1.0, None)


@pytest.fixture
def states(seeded: Callable[..., Tensor]) -> Tensor:
    """Rows that are a turned last state with noise, one with more than the other, far from unit scale."""
    last, turn = seeded(900, D, seed=1), torch.linalg.qr(seeded(D, D, seed=2))[0]
    noise = seeded(2, 900, D, seed=3)
    return torch.stack([30 * (last.tanh() + 0.5 * noise[0]) @ turn, 5 * last.tanh() + noise[1] + 2, last])


def means(maps: Callable[[Tensor], Tensor], states: Tensor, readout: Readout) -> Tensor:
    return divergence(maps(states), states[-1], readout).mean(-1)


def test_divergence_is_that_of_the_whole_vocabulary(lm: LanguageModel) -> None:
    states = read_states(lm, feed(lm.tokenizer, NEUTRAL[:3], position="all"))
    found = divergence(states, states[-1], lm.readout)
    expected, said = (lm.readout.logits(states[row]).log_softmax(-1) for row in (-1, 1))
    torch.testing.assert_close(found[1], (expected.exp() * (expected - said)).sum(-1), atol=1e-4, rtol=1e-4)
    assert found[-1].abs().max() < 1e-5


def test_training_brings_lenses_nearer_to_the_model(states: Tensor, readout: Readout) -> None:
    train, validation, test = states[:, :500], states[:, 500:700], states[:, 700:]
    maps = tuned_maps(train, validation, readout, TUNING, seed=0)
    plain = means(lambda x: x, test, readout)
    squares = means(tuned_maps(train, validation, readout, UNTRAINED, seed=0), test, readout)
    tuned = means(maps, test, readout)
    assert torch.equal(maps.weight[-1], torch.eye(D))
    assert tuned[0] < squares[0]
    assert (tuned <= squares).all()
    assert (squares[:-1] < plain[:-1]).all()


def test_maps_that_training_spoils_are_not_kept(states: Tensor, readout: Readout) -> None:
    wild = Tuning(steps=4, positions=8, learning_rate=10.0, every=1, top=8, tail=1000)
    squares, spoilt = (tuned_maps(states, states, readout, tuning, seed=0) for tuning in (UNTRAINED, wild))
    torch.testing.assert_close(spoilt.weight, squares.weight, atol=1e-5, rtol=1e-4)


def test_maps_repeat(states: Tensor, readout: Readout) -> None:
    a, b = (tuned_maps(states, states, readout, TUNING, seed=3) for _ in range(2))
    assert torch.equal(a.weight, b.weight)
