"""Routing in use: every family's routers as their formulas give them, information and change in known cases."""

from typing import Any

import numpy as np
import pytest
import torch
from mixtures.test_routers import FAMILIES, E, V, model_of, routers_of
from torch import Tensor, nn

from classifier_emergence.errors import InputError
from classifier_emergence.mixtures.routing import (
    Routing,
    context_dependence,
    hooked,
    information,
    routers,
    trace,
    usage,
)
from classifier_emergence.reading.model import LanguageModel

K = 2
TEXTS = [[5, 6, 7, 8], [9, 5], [3, 4, 5, 6, 7, 8, 9, 10], [11], [5, 6, 7, 8]]


def routing_of(experts: Tensor, token: list[int], text: list[int], *, weights: Tensor | None = None) -> Routing:
    """Made by hand: experts (L, T, k)."""
    position = [text[:i].count(t) for i, t in enumerate(text)]
    return Routing(
        tuple(range(len(experts))),
        experts,
        torch.full(experts.shape, 1 / experts.shape[-1]) if weights is None else weights,
        int(experts.max()) + 1,
        torch.tensor(token),
        torch.tensor(text),
        torch.tensor(position),
    )


def mixture(family: str) -> LanguageModel:
    return LanguageModel(family, model_of(family).eval(), None)


# --- Trace ---


@pytest.mark.parametrize("family", FAMILIES)
def test_traced_experts_are_those_of_the_routers_own_formula(family: str) -> None:
    lm = mixture(family)
    model, routing = lm.model, trace(lm, TEXTS, batch_tokens=9)
    assert routing.layers == tuple(i for i, _, _ in routers_of(model))
    assert routing.n_experts == E
    assert routing.experts.shape == (len(routing.layers), sum(map(len, TEXTS)), K)
    inputs: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        return lambda _, args: inputs.__setitem__(number, args[0].reshape(-1, args[0].shape[-1]))

    for number, router, _ in routers_of(model):
        router.register_forward_pre_hook(keep(number))
    for i, text in enumerate(TEXTS):
        with torch.no_grad():
            model(input_ids=torch.tensor([text]))
        here = routing.text == i
        assert routing.token[here].tolist() == text
        assert routing.position[here].tolist() == list(range(len(text)))
        for at, (number, router, _) in enumerate(routers_of(model)):
            logits = inputs[number] @ router.weight.detach().T
            if getattr(router, "bias", None) is not None:
                logits = logits + router.bias.detach()
            top = logits.topk(K, dim=-1)
            assert torch.equal(routing.experts[at, here], top.indices)
            # A softmax over all experts and then a choice, or over the chosen ones: scaled, they are the same.
            shares = routing.weights[at, here] / routing.weights[at, here].sum(-1, keepdim=True)
            torch.testing.assert_close(shares, top.values.softmax(-1))


def test_shares_put_the_weights_where_the_experts_are() -> None:
    routing = routing_of(
        torch.tensor([[[0, 2], [1, 0]]]), [1, 2], [0, 0], weights=torch.tensor([[[0.2, 0.2], [0.9, 0.1]]])
    )
    torch.testing.assert_close(routing.shares(), torch.tensor([[[0.5, 0.0, 0.5], [0.1, 0.9, 0.0]]]))


def test_last_tokens_of_texts_are_found() -> None:
    routing = trace(mixture("Mixtral"), TEXTS)
    assert routing.token[routing.last].tolist() == [text[-1] for text in TEXTS]


def test_hooks_are_taken_off_and_gradients_pass() -> None:
    lm = mixture("Mixtral")
    with hooked(lm) as seen:
        lm.model(input_ids=torch.tensor([[1, 2, 3]]))
    assert set(seen) == {0, 1}
    seen[0][0].sum().backward()
    assert routers(lm)[0].weight.grad is not None
    assert not any(router._forward_hooks for router in routers(lm).values())


def test_a_dense_model_and_texts_without_tokens_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="no module named"):
        trace(lm, TEXTS)
    for texts in ([], [[1], []]):
        with pytest.raises(InputError, match="texts: none, or one without tokens"):
            trace(mixture("Mixtral"), texts)


@pytest.mark.parametrize(
    "flaw",
    [
        lambda out: out[:2],
        lambda out: (out[1], out[0], out[2]),
        lambda out: (-out[0], out[1], out[2]),
        lambda out: (out[0], out[1], out[2].float()),
    ],
)
def test_a_router_that_gives_something_else_is_refused(flaw: Any) -> None:
    lm = mixture("Mixtral")

    class Other(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, states: Tensor) -> Any:
            return flaw(self.inner(states))

    Other.__name__ = "OtherTopKRouter"
    block = lm.blocks[0].mlp
    inner = block.gate
    inner.__class__ = type("Inner", (type(inner),), {})
    block.gate = Other(inner)
    with pytest.raises(InputError, match=r"router OtherTopKRouter: gives no \(logits, weights, experts\)"):
        trace(lm, TEXTS)


def test_experts_that_differ_by_a_rounding_error_may_be_chosen_either_way() -> None:
    class Near(nn.Module):
        def forward(self, gap: float) -> tuple[Tensor, Tensor, Tensor]:
            return torch.tensor([[2.0, 2.0 + gap, -1.0]]), torch.ones(1, 1), torch.tensor([[0]])

    lm = mixture("Mixtral")
    Near.__name__ = "NearTopKRouter"
    near = lm.blocks[0].mlp.gate = Near()
    with hooked(lm) as seen:
        near(5e-7)
    assert seen[0][2].item() == 0
    with hooked(lm), pytest.raises(InputError, match="gives no"):
        near(1e-3)


# --- Usage ---


def test_load_and_entropies_are_those_of_balanced_and_of_collapsed_routing() -> None:
    balanced = torch.tensor([[0], [1], [2], [3]])
    routing = routing_of(torch.stack([balanced, torch.full((4, 1), 3)]), [1] * 4, [0] * 4)
    found = usage(routing)
    np.testing.assert_allclose(found.load, [[0.25] * 4, [0, 0, 0, 1]])
    np.testing.assert_allclose(found.load_entropy, [1, 0], atol=1e-12)
    np.testing.assert_allclose(found.token_entropy, [0, 0], atol=1e-12)


def test_an_expert_for_each_label_tells_all_and_random_experts_tell_nothing() -> None:
    labels = np.repeat(np.arange(4), 50)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.stack([torch.from_numpy(labels), torch.randint(4, (200,), generator=generator)])
    shares = torch.nn.functional.one_hot(chosen, 4).float()
    found = information(shares, labels, shuffles=99, seed=0)
    np.testing.assert_allclose(found.bits[0], 2)
    assert found.label_bits == pytest.approx(2)
    assert found.p[0] == 0.01
    assert found.share[0] > 0.95
    assert found.p[1] > 0.05
    assert abs(found.share[1]) < 0.05
    assert found.bits[1] > 0  # a finite sample always gives some: hence the shuffles
    assert found.shuffled_95[1] > found.shuffled_mean[1] > 0


def test_tokens_of_one_text_are_not_independent_witnesses() -> None:
    # Every text has its own expert, and a label at random: with 8 texts, that is no evidence.
    texts = np.repeat(np.arange(8), 40)
    labels = np.array([0, 1, 1, 0, 1, 0, 0, 1])[texts]
    shares = torch.nn.functional.one_hot(torch.from_numpy(texts), 8).float()[None]
    naive = information(shares, labels, shuffles=50, seed=0)
    grouped = information(shares, labels, shuffles=50, seed=0, groups=texts)
    assert naive.p[0] < 0.05
    assert grouped.p[0] == 1
    np.testing.assert_allclose(grouped.share, 0, atol=1e-9)


def test_information_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(3, 60, 5, generator=generator).double()
    shares /= shares.sum(-1, keepdim=True)
    labels = torch.randint(3, (60,), generator=generator)
    joint = torch.stack([(shares * (labels == x)[:, None]).sum(1) / 60 for x in range(3)], dim=1)
    ratio = joint / (joint.sum(1, keepdim=True) * joint.sum(2, keepdim=True))
    expected = (joint * ratio.log2()).sum((1, 2))
    np.testing.assert_allclose(information(shares, labels, shuffles=1, seed=0).bits, expected)


def test_labels_that_cannot_be_told_apart_are_refused() -> None:
    shares = torch.ones(1, 4, 1)
    for labels, groups, said in (([1, 1, 1, 1], None, "labels: all are equal"), ([1, 2], None, "labels: shape"),
                                 ([1, 2, 1, 2], [0, 0, 1, 1], "groups: members of one group")):  # fmt: skip
        with pytest.raises(InputError, match=said):
            information(shares, labels, shuffles=1, seed=0, groups=groups)


# --- Context ---


def dependence(routing: Routing, repeated: Routing | None = None) -> Any:
    return context_dependence(routing, repeated or routing, pairs_per_token=20, confidence=0.95, resamples=200, seed=0)


def many_texts(rule: str) -> Routing:
    """40 texts of 10 tokens; layer 0 routes by the rule."""
    random = np.random.default_rng(0)
    token, text = random.integers(12, size=400), np.repeat(np.arange(40), 10)
    by = {"token": token, "context": random.integers(6, size=400)}[rule]
    experts = torch.from_numpy(np.stack([by % 6, (by + 1) % 6], -1))[None]
    return routing_of(experts, token.tolist(), text.tolist())


def test_routing_by_token_never_changes_and_routing_by_context_changes_as_between_tokens() -> None:
    by_token, by_context = dependence(many_texts("token")), dependence(many_texts("context"))
    assert by_token.change[0] == 0
    assert by_token.other_tokens[0] > 0.5
    assert by_token.tokens == 12
    low, high = by_context.interval[0]
    assert low <= by_context.change[0] <= high
    assert low < by_context.other_tokens[0] < high
    assert by_context.overall == by_context.change.mean()
    assert by_context.overall_interval == (low, high)  # of one layer
    assert by_context.repeated[0] == 0


def test_half_of_two_experts_changed_counts_one_half() -> None:
    experts = torch.tensor([[[0, 1], [2, 3], [0, 1], [3, 4], [0, 1]]])
    found = dependence(routing_of(experts, [9, 7, 8, 7, 6], [0, 0, 1, 1, 1]))
    assert found.change[0] == 0.5
    assert (found.tokens, found.pairs) == (1, 1)


def test_real_routers_are_functions_of_the_context() -> None:
    lm = mixture("Olmoe")
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, V, (12,), generator=generator).tolist() for _ in range(20)]
    found = dependence(trace(lm, texts), trace(lm, texts, batch_tokens=1))
    np.testing.assert_allclose(found.repeated, 0, atol=0.01)
    assert (found.change < found.other_tokens).all()
    assert found.interval.shape == (2, 2)


def test_texts_that_do_not_fit_are_refused() -> None:
    routing = many_texts("token")
    with pytest.raises(InputError, match="repeated: is of other texts"):
        dependence(routing, trace(mixture("Mixtral"), TEXTS))
    alone = routing_of(torch.zeros(1, 4, 1, dtype=torch.int64), [1, 2, 3, 4], [0, 0, 1, 1])
    alike = routing_of(torch.zeros(1, 4, 1, dtype=torch.int64), [1, 2, 1, 2], [0, 0, 1, 1])
    for texts in (alone, alike):  # after the same beginning a token is in no other context
        with pytest.raises(InputError, match="no token occurs in two"):
            dependence(texts)
    same = routing_of(torch.zeros(1, 4, 1, dtype=torch.int64), [1, 2, 3, 2], [0, 0, 1, 1])
    with pytest.raises(InputError, match="one kind of token only"):
        dependence(same)
