"""Names of models: the registry in and out of a clone, hub ids, adapters that fit and adapters that do not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from classifier_emergence.errors import InputError
from classifier_emergence.models.loading import load
from classifier_emergence.models.names import describe, named_source, open_model, registry, repository_root
from classifier_emergence.models.registry import HubSource, PathSource
from classifier_emergence.reading.residuals import residual_stream

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def adapter(tiny_models: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of tiny-llama that does something."""
    lm = load(str(tiny_models / "tiny-llama"), {})
    config = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    get_peft_model(lm.model, config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_the_packaged_registry_is_that_of_the_parameters() -> None:
    """If not: copy the section ``registry`` of params.yaml over src/classifier_emergence/models/registry.yaml."""
    packaged = yaml.safe_load((ROOT / "src/classifier_emergence/models/registry.yaml").read_text())
    assert packaged == yaml.safe_load((ROOT / "params.yaml").read_text())["registry"]


def test_the_registry_is_there_inside_and_outside_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "src")
    inside = registry()
    monkeypatch.chdir(tmp_path)
    assert repository_root() is None
    assert registry() == inside
    assert "smollm2-135m-instruct" in inside


def test_folders_of_a_registry_are_relative_to_its_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("params.yaml", "paper/claims.yaml", "experiments/params.py", "elsewhere/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    shutil.copy(ROOT / "params.tiny.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert repository_root() == tmp_path
    source = registry()["tiny-llama"]
    assert isinstance(source, PathSource)
    assert source.path == str(tmp_path / "models/tiny-llama")


def test_a_hub_id_means_the_commit_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repo, file, revision: f"/hub/snapshots/{commit}/{file}"
    )
    assert named_source("some/model", {}) == HubSource(
        source="hub", repo="some/model", revision=commit, licence="unknown"
    )
    other = "f" * 40
    source = named_source(f"some/model@{other}", {})
    assert isinstance(source, HubSource)
    assert source.revision == other


def test_a_hub_that_does_not_answer_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(InputError, match="'some/model': neither a folder nor a registered key") as raised:
        named_source("some/model", {})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["./nowhere", "../a/b", "/a/b", "plain", "a/b/c", "~/x"])
def test_paths_and_plain_names_are_no_hub_ids(name: str) -> None:
    assert named_source(name, {}) is None


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
