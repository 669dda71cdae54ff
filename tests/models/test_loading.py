"""Loading: what every model promises, and what a folder must not do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from classifier_emergence.errors import InputError
from classifier_emergence.models.loading import load
from classifier_emergence.models.registry import ModelSource, PathSource

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


def test_quantised_weights_are_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(InputError, match=r"tiny: the weights are quantised \(mxfp4\)"):
        load(str(folder), {})


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
    with pytest.raises(InputError, match="tiny: transformers cannot load") as raised:
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
