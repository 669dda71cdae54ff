"""Paths of experts: what they tell is found where it is, and nowhere else."""

import pytest
import torch
from torch import Tensor

from classifier_emergence.mixtures.paths import path_features, told_bits
from classifier_emergence.mixtures.routing import Routing

N, LAYERS, EXPERTS = 160, 3, 4
LABELS = torch.arange(N) % 4


def bits_of(first: Tensor, token: Tensor) -> dict[str, Tensor]:
    """Of prompts of one token each, that go to these experts first (LAYERS, N)."""
    experts = torch.stack([first, (first + 1) % EXPERTS], dim=-1)
    routing = Routing(
        (0, 1, 2), experts, torch.full(experts.shape, 0.5), EXPERTS, token, torch.arange(N), torch.zeros_like(token)
    )
    groups = [i // 2 for i in range(N)]
    return told_bits(path_features(routing), LABELS, groups, folds=4, shuffles=19, seed=0)


def drawn(seed: int) -> Tensor:
    return torch.randint(EXPERTS, (LAYERS, N), generator=torch.Generator().manual_seed(seed))


def test_a_path_tells_what_no_layer_of_it_tells() -> None:
    first = drawn(0)
    first[1] = (first[0] + LABELS) % EXPERTS  # together they have the label, each by itself is even
    told = bits_of(first, torch.zeros(N, dtype=torch.int64))
    assert told["path"][0].mean() > 1.2
    assert told["layer"][0].mean() < 0.15
    assert (told["both"] - told["token"])[0].mean() > 1.2


def test_one_layer_that_knows_leaves_nothing_to_the_path() -> None:
    first = drawn(1)
    first[2] = LABELS
    told = bits_of(first, torch.zeros(N, dtype=torch.int64))
    assert told["layer"][0].mean() > 1.8
    assert (told["path"] - told["layer"])[0].mean() < 0.05


def test_what_the_token_tells_is_not_told_by_the_path_beyond_it() -> None:
    token = LABELS + 4 * (torch.arange(N) % 3)
    told = bits_of(LABELS.expand(LAYERS, N), token)
    assert told["token"][0].mean() > 1.4
    assert (told["both"] - told["token"])[0].mean() < 0.25 * told["path"][0].mean()  # what a penalised fit leaves


@pytest.mark.parametrize("seed", [2, 3])
def test_chance_tells_nothing(seed: int) -> None:
    told = bits_of(drawn(seed), torch.arange(N) % 7)
    for bits in told.values():
        assert bits.shape == (20, N)
        assert bits.mean(-1).max() < 0.15
        assert bits[1:].mean() == pytest.approx(0, abs=0.05)
