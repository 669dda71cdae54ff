"""Names of models: the registry in and out of a clone, keys, folders and hub ids."""

import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import save_file

from classifier_emergence.errors import InputError
from classifier_emergence.models.names import registry, repository_root, resolve
from classifier_emergence.models.registry import HubSource, PathSource, read_registry
from classifier_emergence.models.sources import fetch

ROOT = Path(__file__).resolve().parents[2]


def test_the_packaged_registry_is_that_of_the_parameters() -> None:
    """If not: copy the section ``registry`` of params.yaml over src/classifier_emergence/models/registry.yaml."""
    packaged = yaml.safe_load((ROOT / "src/classifier_emergence/models/registry.yaml").read_text())
    assert packaged["registry"] == yaml.safe_load((ROOT / "params.yaml").read_text())["registry"]


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


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": "abc"}, "registry.gemma-3-270m.sha256: string should match pattern '^[0-9a-f]{64}$' (found 'abc')"),
        ({"licnce": "MIT"}, "registry.gemma-3-270m.licnce: unknown parameter; did you mean 'licence'?"),
        ({"source": "whel"}, "registry.gemma-3-270m: input tag 'whel'"),
    ],
)
def test_a_mistake_in_a_registry_is_named(change: dict[str, str], said: str, tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["registry"]["gemma-3-270m"] |= change
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InputError) as raised:
        read_registry(tmp_path / "params.yaml")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[1, 2]", "models: [", "", "models: []", "registry: 3", "registry: {a: 3}"])
def test_a_registry_that_is_none_is_one_clear_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(InputError, match=r"params.yaml: ") as raised:
        read_registry(tmp_path / "params.yaml")
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=r"none.yaml: cannot be read"):
        read_registry(tmp_path / "none.yaml")


def hub(revision: str) -> HubSource:
    return HubSource(source="hub", repo="some/model", revision=revision, licence="unknown")


def test_a_hub_id_means_the_commit_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(
        "classifier_emergence.models.sources.try_to_load_from_cache",
        lambda repo, file, revision: f"/hub/snapshots/{commit}/{file}",
    )
    assert resolve("some/model", {}) == ("some/model", hub(commit))
    assert resolve(f"some/model@{'f' * 40}", {})[1] == hub("f" * 40)


def test_a_key_comes_before_a_folder_and_a_folder_before_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    here = PathSource(source="path", path="some/model")
    assert resolve("some/model", {}) == ("model", here)
    assert resolve("some", {"some": here}) == ("some", here)
    assert resolve("some", {}) == ("some", PathSource(source="path", path="some"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache, and no route to the hub; the snapshots of some/model."""

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path))
    return tmp_path / "models--some--model" / "snapshots"


def snapshot(folder: Path, *lacking: str) -> None:
    folder.mkdir(parents=True)
    for name in {"config.json", "tokenizer.json"} - {*lacking}:
        (folder / name).write_text("{}")
    if "model.safetensors" not in lacking:
        save_file({}, folder / "model.safetensors")


def test_a_hub_that_does_not_answer_is_one_clear_line(offline: Path) -> None:
    with pytest.raises(InputError, match="'some/model': neither a folder nor a registered key") as raised:
        resolve("some/model", {})
    assert "\n" not in str(raised.value)


def test_without_the_hub_the_only_complete_snapshot_is_meant(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot(offline / ("a" * 40))
    snapshot(offline / ("b" * 40), "model.safetensors")
    name, source = resolve("some/model", {})
    assert (name, source) == ("some/model", hub("a" * 40))
    assert f"using {'a' * 40}, the only complete commit in the cache" in capsys.readouterr().err
    assert fetch(name, source) == offline / ("a" * 40)
    with pytest.raises(InputError, match="the hub does not answer"):
        resolve("some/model@main", {})
    snapshot(offline / ("c" * 40))
    with pytest.raises(InputError, match="the hub does not answer"):
        resolve("some/model", {})


@pytest.mark.parametrize("name", ["./nowhere", "../a/b", "/a/b", "a/b/c", "~/x"])
def test_paths_are_no_hub_ids(name: str) -> None:
    assert resolve(name, {})[1].source == "path"


def test_a_name_that_means_nothing_has_a_hint() -> None:
    with pytest.raises(InputError, match=r"model: unknown key 'gpt2'; known here: .*hub as owner/name"):
        resolve("gpt2")
    with pytest.raises(InputError, match=r"did you mean 'gemma-3-270m'\?"):
        resolve("gemma-3-270")
