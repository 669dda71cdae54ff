"""Loading: what every model promises, what a folder must not do, and adapters that fit or do not."""

import json
from pathlib import Path

import pytest
import torch
from architectures import LAYERS, build, language_model, save_as_mxfp4
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from classifier_emergence.errors import InputError
from classifier_emergence.models.checkpoint import Checkpoint
from classifier_emergence.models.loading import describe, load, open_model
from classifier_emergence.models.registry import ModelSource, PathSource
from classifier_emergence.reading.lens import check_lens
from classifier_emergence.reading.residuals import residual_stream

WORDS = ["</s>", "one", "two", "three"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A random two-layer Llama, kept in bfloat16, and a tokenizer that has no padding token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    path = tmp_path / "tiny"
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    save_tokenizer(path, eos_token="</s>")
    return path


@pytest.fixture
def adapter(tiny_models: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of tiny-llama that does something."""
    lm = load(str(tiny_models / "tiny-llama"), {})
    config = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    get_peft_model(lm.model, config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def save_tokenizer(path: Path, **special: str) -> None:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="one"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, padding_side="right", **special).save_pretrained(path)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_a_loaded_model_is_float32_frozen_and_in_evaluation_mode(folder: Path) -> None:
    lm = load(str(folder), {})
    assert lm.key == "tiny"
    assert {parameter.dtype for parameter in lm.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert not lm.model.training
    assert lm.model.config._attn_implementation == "sdpa"


def test_a_loaded_tokenizer_pads_on_the_left(folder: Path) -> None:
    tokenizer = load(str(folder), {}).tokenizer
    assert tokenizer.pad_token == "</s>"
    assert tokenizer(["one", "one two"], padding=True)["input_ids"] == [[0, 1], [1, 2]]


def test_a_registered_model_carries_its_key(folder: Path) -> None:
    registry: dict[str, ModelSource] = {"mine": PathSource(source="path", path=str(folder))}
    assert load("mine", registry).key == "mine"


def test_loading_writes_no_progress_bar_into_a_log(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(str(folder), {})
    assert capfd.readouterr().err == ""


def test_an_unknown_name_gives_the_nearest_key(folder: Path) -> None:
    registry: dict[str, ModelSource] = {"gemma-3-270m": PathSource(source="path", path=str(folder))}
    with pytest.raises(InputError, match="did you mean 'gemma-3-270m'"):
        load("gemma-270m", registry)
    with pytest.raises(InputError, match="no such folder"):
        load("./nowhere", registry)


def test_weights_in_a_format_whose_library_is_missing_are_one_clear_line(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match=r"^tiny: transformers cannot load .*(?i:gptq|optimum)") as raised:
        load(str(folder), {})
    assert "\n" not in str(raised.value)


def test_mxfp4_weights_are_taken_apart(tmp_path: Path) -> None:
    """A GPT-OSS as it is published: experts in blocks of 32 values of four bits with a common power of two."""
    expected = save_as_mxfp4(build("gpt-oss", intermediate_size=32), tmp_path / "oss")
    language_model("gpt-oss").tokenizer.save_pretrained(tmp_path / "oss")
    lm = load(str(tmp_path / "oss"), {})
    held = lm.model.state_dict()
    assert len(expected) == 2 * LAYERS
    for name, tensor in expected.items():
        torch.testing.assert_close(held[name].float(), tensor)
    assert check_lens(lm) < 1e-3
    assert residual_stream(lm, ["7 * 8 ="]).isfinite().all()
    values_held, fixed = Checkpoint(tmp_path / "oss").sizes()
    assert (values_held, fixed) == (sum(p.numel() for p in lm.model.parameters()), 0)
    assert held["model.norm.weight"].dtype == torch.float32


def test_missing_and_misshapen_weights_are_not_filled_with_random_ones(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights that fit \(model.layers.1.mlp.up_proj.weight\)"):
        load(str(folder), {})
    edit_config(folder, intermediate_size=24)
    with pytest.raises(InputError, match="tiny: "):
        load(str(folder), {})


def test_a_truncated_weights_file_is_one_clear_line(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"^tiny: .*model.safetensors cannot be read") as raised:
        load(str(folder), {})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("config", ["", "[]", "null", "{}", '{"model_type": "nonsense"}', "{not json"])
def test_a_config_that_says_nothing_is_one_clear_line(config: str, folder: Path) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(InputError, match=r"^tiny: ") as raised:
        load(str(folder), {})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("tokenizer", ["", "[]", "{}", "null"])
def test_a_damaged_tokenizer_is_one_clear_line(tokenizer: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(tokenizer)
    with pytest.raises(InputError, match=r"^tiny: ") as raised:
        load(str(folder), {})
    assert "\n" not in str(raised.value)


def test_code_of_a_model_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    code = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "modeling_evil.Evil")
    edit_config(folder, model_type="evil", auto_map=code)
    with pytest.raises(InputError, match="tiny: transformers cannot load"):
        load(str(folder), {})
    assert not marker.exists()


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(folder: Path) -> None:
    save_tokenizer(folder)
    with pytest.raises(InputError, match="neither a padding nor an end token"):
        load(str(folder), {})


def test_an_adapter_is_on_and_the_lens_still_fits(adapter: Path, tiny_models: Path) -> None:
    base = open_model(str(tiny_models / "tiny-llama"))
    adapted = open_model(str(tiny_models / "tiny-llama"), adapter=adapter)
    assert adapted.key == "tiny-llama+adapter"
    states = [residual_stream(lm, ["7 * 8 ="]) for lm in (base, adapted)]
    assert torch.equal(states[0][0], states[1][0])
    assert not torch.allclose(states[0][1:], states[1][1:])
    assert not any(parameter.requires_grad for parameter in adapted.model.parameters())
    assert describe(adapted)["lens_log_gap"] < 1e-3


def test_pickled_and_missing_adapters_are_refused(adapter: Path, tiny_models: Path) -> None:
    name = str(tiny_models / "tiny-llama")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"no adapter_model.safetensors"):
        open_model(name, adapter=adapter)
    with pytest.raises(InputError, match=r"no adapter_config.json"):
        open_model(name, adapter=adapter / "nowhere")


@pytest.mark.parametrize("damage", ["another layer", "a layer less", "another width", "no json", "truncated"])
def test_an_adapter_that_does_not_fit_is_refused(damage: str, adapter: Path, tiny_models: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = min(tensors)
    if damage == "another layer":
        tensors[name.replace("layers.0.", "layers.9.")] = tensors[name].clone()
    elif damage == "a layer less":
        del tensors[name]
    elif damage == "another width":
        tensors[name] = torch.zeros(3, 3)
    save_file(tensors, weights, metadata={"format": "pt"})
    if damage == "no json":
        (adapter / "adapter_config.json").write_text("{")
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"^adapter ") as raised:
        open_model(str(tiny_models / "tiny-llama"), adapter=adapter)
    assert "\n" not in str(raised.value)


def test_a_description_says_what_config_and_tokenizer_say(tiny_models: Path) -> None:
    for name, tied in (("tiny-llama", False), ("tiny-gemma", True)):
        facts = describe(open_model(str(tiny_models / name)))
        config = json.loads((tiny_models / name / "config.json").read_text())
        assert facts["n_layers"] == config["num_hidden_layers"]
        assert facts["vocabulary"] == config["vocab_size"] == facts["tokenizer_vocabulary"] + 5
        assert facts["tied_embeddings"] is tied
