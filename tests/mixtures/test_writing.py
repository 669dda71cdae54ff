"""What experts write: what is added to the stream is what the block adds, and experts add up to it."""

import pytest
import torch
from mixtures.test_routers import FAMILIES, model_of
from mixtures.test_routing import TEXTS, mixture
from torch import Tensor

from classifier_emergence.mixtures.routing import routers, trace
from classifier_emergence.mixtures.writing import written
from classifier_emergence.reading.model import LanguageModel


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_the_mlp_gives(family: str) -> None:
    lm = mixture(family)
    blocks = sorted(routers(lm))
    found = written(lm, TEXTS, blocks)
    outputs: dict[int, Tensor] = {}
    for number in blocks:
        block = lm.blocks[number]
        mlp = getattr(block, "mlp", None) or block.block_sparse_moe
        mlp.register_forward_hook(
            lambda _, __, out, number=number: outputs.__setitem__(number, out[0] if isinstance(out, tuple) else out)
        )
    for i, text in enumerate(TEXTS):
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([text]))
        for at, number in enumerate(blocks):
            expected = outputs[number].reshape(len(text), -1)[-1]
            torch.testing.assert_close(found.total[at, i], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"Qwen2Moe", "GraniteMoe"}))  # which add a shared one, or scale
def test_experts_add_up_to_what_the_mixture_writes(family: str) -> None:
    lm = mixture(family)
    blocks = sorted(routers(lm))
    routing = trace(lm, TEXTS[:1])
    found = written(lm, TEXTS[:1], blocks)
    assert found.experts is not None
    last = int(routing.last[0])
    for at in range(len(blocks)):
        parts = [
            w * found.experts[at, e] for e, w in zip(routing.experts[at, last], routing.weights[at, last], strict=True)
        ]
        torch.testing.assert_close(torch.stack(parts).sum(0), found.total[at, 0], atol=1e-5, rtol=1e-4)


def test_a_dense_model_has_no_experts() -> None:
    lm = LanguageModel("Qwen2Moe", model_of("Qwen2Moe").eval(), None)
    assert written(lm, TEXTS, [0]).experts is None  # its first block is dense
