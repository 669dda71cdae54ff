"""V and O by architecture: what they are called, which rows are V's, and that training them works."""

from pathlib import Path

import pytest
import torch
from architectures import CONFIGS, LAYERS, WIDTH, build, language_model

from classifier_emergence.errors import InputError
from classifier_emergence.reading.readout import decoder_blocks
from classifier_emergence.training.adapters import Adapter, adapted
from classifier_emergence.training.examples import Objective, encode
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.modules import MLP, QKVO, VO, targets
from classifier_emergence.training.supervised import train

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about kernels that are not installed
REFUSED = {"mamba", "recurrent-gemma"}
"""Without attention, in all blocks or in those below the layer."""
FUSED = {"gpt2", "gpt-neox", "bloom", "falcon", "falcon-one-key", "falcon-alibi", "mpt", "phi3", "deepseek-v3"}


@pytest.mark.parametrize("name", [*CONFIGS, "llama in bfloat16", "gpt2 in bfloat16"])
def test_three_steps_of_dual_reward_lower_the_class_loss_or_are_refused_by_name(name: str, tmp_path: Path) -> None:
    name, _, dtype = name.partition(" in ")
    lm = language_model(name)
    if dtype:
        lm.model.to(torch.bfloat16)
    examples = [
        encode(lm.tokenizer, f"{a} {sign} {b} =", f" {a}", target=lm.tokenizer.convert_tokens_to_ids(word))
        for a, b in ((7, 8), (12, 5))
        for sign, word in (("*", "multiply"), ("+", "add"))
    ]
    adapter = Adapter(VO, 4, 2.0, (0, 1))
    if name in REFUSED:
        with (
            pytest.raises(InputError, match=r"^modules: o_proj, v_proj: not found .* linear maps are \w+"),
            adapted(lm, adapter, seed=0),
        ):
            pass
        return
    with adapted(lm, adapter, seed=0) as wrapped:
        done = train(lm, wrapped, examples, Objective(0.4, 2), Schedule(3, 4, 0.02, 0, 1), work=tmp_path)
        rows = {path: (p != 0).any(1) for path, p in wrapped.named_parameters() if "lora_B" in path}
    first, _, last = (entry["class_loss"] for entry in done.losses)
    assert last < first
    for end, mask in targets(lm.model, lm.blocks, VO, (0, 1)).kept.items():
        trained = [moved for path, moved in rows.items() if f"{end}.lora_B" in path]
        assert trained
        assert all(torch.equal(moved, mask) for moved in trained)


@pytest.mark.parametrize("name", [*sorted(FUSED), "qwen3-next", "llama"])
def test_the_rows_that_are_trained_are_those_of_v(name: str) -> None:
    model = build(name)
    blocks = decoder_blocks(model)[:1]
    found, (out,) = targets(model, blocks, ["v_proj"], [0]), targets(model, blocks, ["o_proj"], [0]).names
    parts = dict(blocks[0].named_modules())
    value, output = (next(m for path, m in parts.items() if path.endswith(end)) for end in (*found.names, out))
    weight = value.weight.T if found.transposed else value.weight
    rows = found.kept.get(found.names[0], torch.ones(len(weight), dtype=torch.bool))
    assert rows.sum() == {"falcon": 16, "falcon-one-key": 8, "phi3": 16, "llama": 16}.get(name, WIDTH)
    seen: list[torch.Tensor] = []
    output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for values in (1, 0):  # without V attention has nothing to add
        weight.data[rows] *= values
        if value.bias is not None:
            value.bias.data[rows] *= values
        model.get_decoder()(input_ids=torch.arange(8)[None], use_cache=False)
    assert seen[0].abs().max() > 1e-4
    assert not seen[1].any()


def test_all_linear_maps_of_a_family_without_a_gate_are_found_and_experts_refused() -> None:
    every = (*QKVO, *MLP)
    for name, maps in (("gpt2", 4), ("opt", 6), ("phi3", 4), ("llama", 7)):
        model = build(name)
        found = targets(model, decoder_blocks(model), every, range(LAYERS))
        assert len(found.names) == maps
        assert not found.kept  # all rows of every fused map
    model = build("mixtral")
    with pytest.raises(InputError, match=r"modules: down_proj, gate_proj, up_proj: .* of MixtralForCausalLM, .*v_proj"):
        targets(model, decoder_blocks(model), every, range(LAYERS))
