from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from classifier_emergence.errors import InputError
from classifier_emergence.reading.jacobian_lens import jacobian
from classifier_emergence.reading.lens_maps import LensMaps
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import first_tensor, removing

TEXT = "The old bridge was closed last winter because the river rose."
SKIP = 2


def ids_of(lm: LanguageModel) -> list[int]:
    return list(lm.tokenizer(TEXT)["input_ids"])[:9]


def by_jacrev(lm: LanguageModel, ids: list[int], layer: int) -> Tensor:
    """The definition, entry by entry: (length, d, length, d) of the last block's states by those after a block."""

    def last(states: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handles = [
            lm.blocks[layer].register_forward_hook(lambda *_: states[None]),
            lm.blocks[-1].register_forward_hook(lambda *call: kept.append(first_tensor(call[-1]))),
        ]
        with removing(handles):
            lm.model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False)
        return kept[-1][0]

    kept: list[Tensor] = []
    with removing([lm.blocks[layer].register_forward_hook(lambda *call: kept.append(first_tensor(call[-1])))]):
        lm.model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jacrev(last)(kept[0][0].detach())


@pytest.mark.parametrize("layer", [0, 2])
def test_equals_the_definition(lm: LanguageModel, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("classifier_emergence.reading.jacobian_lens.TOGETHER", 7)  # leaves an incomplete last pass
    ids = ids_of(lm)
    whole = by_jacrev(lm, ids, layer)
    valid = range(SKIP, len(ids) - 1)
    expected = torch.stack([sum(whole[later, :, t] for later in valid if later >= t) for t in valid]).mean(0)
    torch.testing.assert_close(jacobian(lm, ids, skip=SKIP)[layer + 1], expected, atol=1e-5, rtol=1e-4)


def test_directions_read_a_part_of_it(lm: LanguageModel, seeded) -> None:
    ids, directions = ids_of(lm), seeded(3, 48)
    whole, part = jacobian(lm, ids, skip=1), jacobian(lm, ids, skip=1, directions=directions)
    torch.testing.assert_close(part, directions @ whole, atol=1e-4, rtol=1e-4)


def test_the_last_layer_is_its_own_output(lm: LanguageModel) -> None:
    assert torch.equal(jacobian(lm, ids_of(lm), skip=1)[-1], torch.eye(48))


def test_a_text_without_a_position_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="text of 3 tokens: none is left between the first 2 and the last"):
        jacobian(lm, [1, 2, 3], skip=2)


def test_parity_with_transformer_lens(lm: LanguageModel, tiny_models: Path) -> None:
    """Its maps of the same text: the same valid positions, the same sum over targets and mean over sources."""
    theirs = pytest.importorskip("transformer_lens.tools.analysis.jacobian_lens")
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(tiny_models / lm.key), device="cpu", dtype=torch.float32)
    bridge.eval()
    ids = bridge.to_tokens(TEXT)[0].tolist()
    fitted = theirs.JacobianLens.fit(bridge, [TEXT], corpus="test", skip_first_positions=SKIP, show_progress=False)
    ours = jacobian(lm, ids, skip=SKIP)
    for layer in fitted.source_layers:
        torch.testing.assert_close(ours[layer + 1], fitted.jacobians[layer], atol=1e-5, rtol=1e-4)


def test_maps_are_applied_row_by_row_and_survive_a_file(seeded, tmp_path) -> None:
    maps, states = LensMaps(seeded(3, 4, 4), seeded(3, 4, seed=1)), seeded(3, 5, 4, seed=2)
    maps.save(tmp_path / "maps.safetensors")
    again = LensMaps.load(tmp_path / "maps.safetensors")
    for row in range(3):
        torch.testing.assert_close(again(states)[row], states[row] @ maps.weight[row].T + maps.bias[row])


def test_permuted_maps_keep_their_numbers(seeded) -> None:
    maps = LensMaps.linear(seeded(3, 4, 4))
    outputs, layers = maps.permuted(0), maps.permuted(0, layers=True)
    for mixed in (outputs, layers):
        assert not torch.equal(mixed.weight, maps.weight)
        assert torch.equal(mixed.weight.flatten().sort().values, maps.weight.flatten().sort().values)
    assert torch.equal(outputs.weight[1].norm(dim=1).sort().values, maps.weight[1].norm(dim=1).sort().values)
