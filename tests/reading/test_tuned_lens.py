import pytest
import torch

from classifier_emergence.reading.lens_maps import LensMaps
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import feed, read_states
from classifier_emergence.reading.tuned_lens import Tuning, divergence, tuned_maps
from classifier_emergence.tasks.problems import NEUTRAL

TUNING = Tuning(steps=20, positions=16, learning_rate=0.003, every=5, top=8, tail=100_000)


@pytest.fixture
def states(lm: LanguageModel) -> torch.Tensor:
    return read_states(lm, feed(lm.tokenizer, NEUTRAL, position="all"))


def test_divergence_is_that_of_the_whole_vocabulary(lm: LanguageModel, states) -> None:
    found = divergence(states, states[-1], lm.readout)
    expected, said = (lm.readout.logits(states[row]).log_softmax(-1) for row in (-1, 1))
    torch.testing.assert_close(found[1], (expected.exp() * (expected - said)).sum(-1), atol=1e-4, rtol=1e-4)
    assert found[-1].abs().max() < 1e-5


def test_training_brings_lenses_nearer_to_the_model(lm: LanguageModel, states) -> None:
    n = states.shape[1]
    train, validation, test = states[:, : n // 2], states[:, n // 2 : 3 * n // 4], states[:, 3 * n // 4 :]
    start = tuned_maps(train, validation, lm.readout, Tuning(1, 4, 1e-9, 1, 8, 100_000), seed=0)
    maps = tuned_maps(train, validation, lm.readout, TUNING, seed=0)
    plain, squares, tuned = (
        divergence(mapped, test[-1], lm.readout).mean(-1) for mapped in (test, start(test), maps(test))
    )
    assert torch.equal(maps.weight[-1], torch.eye(test.shape[-1]))
    assert (tuned[:-1] < plain[:-1]).all()
    assert tuned[:-1].mean() < squares[:-1].mean()


def test_a_sampled_tail_stands_for_the_rest(lm: LanguageModel, states) -> None:
    few = tuned_maps(states, states, lm.readout, Tuning(10, 16, 0.003, 5, 8, 64), seed=0)
    assert divergence(few(states), states[-1], lm.readout).mean() < divergence(states, states[-1], lm.readout).mean()


def test_maps_repeat(lm: LanguageModel, states) -> None:
    a, b = (tuned_maps(states, states, lm.readout, TUNING, seed=3) for _ in range(2))
    assert torch.equal(a.weight, b.weight)
    assert isinstance(a, LensMaps)
