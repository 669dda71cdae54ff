"""Routers from safetensors: every layout, only the bytes needed, clear refusals, projections like naive ones."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from classifier_emergence.errors import InputError
from classifier_emergence.mixtures.projection import (
    RUN,
    Directions,
    controlled,
    project_routers,
    random_routers,
    reported,
)
from classifier_emergence.mixtures.routers import RouterWeights, load_routers
from classifier_emergence.statistics import expected_max_cosine

D, E, V = 16, 4, 40
COMMON: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": E},
    "Olmoe": {"num_experts": E},
    "Qwen2Moe": {
        "num_experts": E, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "mlp_only_layers": [0],
    },
    "Qwen3Moe": {"num_experts": E, "moe_intermediate_size": 8, "head_dim": 8, "decoder_sparse_step": 2},
    "GraniteMoe": {"num_local_experts": E, "tie_word_embeddings": True},
    "GptOss": {"num_local_experts": E, "head_dim": 8},
}  # fmt: skip
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**COMMON, **FAMILIES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "router.bias" in name or "gate" in name or "router" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)  # gains, and what is initialised to zero
    return model.to(dtype)


def routers_of(model: Any) -> list[tuple[int, Any, Tensor]]:
    """(block, router module, norm gain) straight from the modules."""
    found = []
    for i, block in enumerate(model.model.layers):
        mlp = getattr(block, "mlp", None) or block.block_sparse_moe
        router = getattr(mlp, "router", None) or getattr(mlp, "gate", None)
        if router is not None:
            found.append((i, router, block.post_attention_layernorm.weight))
    return found


def openai(**changes: Tensor | None) -> dict[str, Tensor]:
    """OpenAI's own names of GPT-OSS, with experts as MXFP4 junk."""
    torch.manual_seed(1)
    tensors = {
        "embedding.weight": torch.randn(V, D),
        "unembedding.weight": torch.randn(V, D),
        "norm.scale": torch.rand(D),
    }
    for n in range(2):
        block = f"block.{n}."
        tensors[block + "attn.norm.scale"] = torch.rand(D)
        tensors[block + "mlp.norm.scale"] = torch.rand(D) + 0.5
        tensors[block + "mlp.gate.weight"] = torch.randn(E, D)
        tensors[block + "mlp.gate.bias"] = torch.randn(E)
        tensors[block + "mlp.mlp1_weight.blocks"] = torch.randint(0, 255, (E, 32, 16), dtype=torch.uint8)
        tensors[block + "mlp.mlp1_weight.scales"] = torch.randint(0, 255, (E, 32), dtype=torch.uint8)
    tensors |= {name: tensor for name, tensor in changes.items() if tensor is not None}
    return {name: tensor for name, tensor in tensors.items() if changes.get(name, tensor) is not None}


def write(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 2} | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_sparse(file: Path, shapes: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """A safetensors file of zeros that takes no room; where each tensor starts."""
    header: dict[str, object] = {}
    starts, at = {}, 0
    for name, (dtype, shape) in shapes.items():
        size = torch.Size(shape).numel() * {"BF16": 2, "U8": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        starts[name], at = at, at + size
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded)
    os.truncate(file, 8 + len(encoded) + at)
    return {name: 8 + len(encoded) + start for name, start in starts.items()}


def unembedding_of(weights: RouterWeights) -> Tensor:
    return weights.checkpoint.read(weights.unembedding)


# Layouts


@pytest.mark.parametrize("shards", ["1GB", "3KB"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saves_gives_the_models_own_routers(family: str, shards: str, tmp_path: Path) -> None:
    model = model_of(family)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors").exists() == (shards == "1GB")
    weights = load_routers(tmp_path)
    expected = routers_of(model)
    assert weights.layers == tuple(i for i, _, _ in expected)
    assert len(weights.layers) == (1 if "Qwen" in family else 2)
    for at, (_, router, gain) in enumerate(expected):
        assert torch.equal(weights.weight[at], router.weight)
        assert torch.equal(weights.gain[at], gain)
        if weights.bias is not None:
            assert torch.equal(weights.bias[at], router.bias)
    assert (weights.bias is not None) == (family == "GptOss")
    assert torch.equal(weights.final_gain, model.model.norm.weight)
    assert weights.bytes_read == sum(
        t.nbytes for t in (weights.weight, weights.gain, weights.final_gain, weights.bias) if t is not None
    )
    assert weights.total_bytes == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert torch.equal(unembedding_of(weights), model.get_output_embeddings().weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_modules_in_memory_are_read_too(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write(tmp_path, state, **model.config.to_dict())
    assert torch.equal(load_routers(tmp_path).weight[-1], routers_of(model)[-1][1].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_openais_own_files_are_read_in_their_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in openai().items()}
    weights = load_routers(write(tmp_path, tensors))
    for n in range(2):
        assert torch.equal(weights.weight[n], tensors[f"block.{n}.mlp.gate.weight"])
        assert weights.bias is not None
        assert torch.equal(weights.bias[n], tensors[f"block.{n}.mlp.gate.bias"])
        assert torch.equal(weights.gain[n], tensors[f"block.{n}.mlp.norm.scale"])
    assert torch.equal(weights.final_gain, tensors["norm.scale"])
    assert torch.equal(unembedding_of(weights), tensors["unembedding.weight"])
    wanted = [n for n in tensors if "mlp.gate" in n or "mlp.norm" in n or n in ("norm.scale", "unembedding.weight")]
    assert weights.bytes_read == sum(tensors[n].nbytes for n in wanted)


def test_a_projection_reads_the_unembedding_once_and_wanted_rows_and_those_of_the_mean_again(tmp_path: Path) -> None:
    weights = load_routers(write(tmp_path, openai()))
    before = weights.bytes_read
    sets = [reported(weights), controlled(weights), controlled(random_routers(weights, 3, seed=0))]
    project_routers(weights, sets, words=[[1, 2], [2]], keep=[5, 30], block_rows=7)
    assert weights.bytes_read - before == (V + 2 + V) * D * 4  # a vocabulary so small is all in its mean


# Refusals


@pytest.mark.parametrize(
    ("changes", "config", "said"),
    [
        ({f"block.{n}.mlp.gate.weight": None for n in range(2)}, {}, "no routers .*this is dense"),
        ({"block.1.mlp.gate.weight": None}, {}, "no router in layer 1"),
        ({"unembedding.weight": torch.ones(V, D + 1)}, {}, r"router \[4, 16\] .*unembedding.weight \[40, 17\] differ"),
        ({"block.1.mlp.gate.weight": torch.ones(E + 1, D)}, {}, r"block.1.mlp.gate.weight is \[5, 16\], not \[4, 16\]"),
        ({"block.0.mlp.gate.weight": torch.full((E, D), torch.nan)}, {}, "block.0.mlp.gate.weight holds NaN"),
        ({"norm.scale": None}, {}, "no tensor norm.scale"),
        ({"norm.scale": torch.ones(D, dtype=torch.uint8)}, {}, "norm.scale is U8"),
        ({"block.0.mlp.gate.bias": None}, {}, "no tensor block.0.mlp.gate.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_one_clear_line(
    changes: dict[str, Tensor | None], config: dict[str, object], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said) as raised:
        load_routers(write(tmp_path, openai(**changes), **config))
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def sharded(folder: Path) -> Path:
    model_of("Mixtral").save_pretrained(folder, max_shard_size="3KB")
    return folder


def lose_shard(folder: Path) -> None:
    next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()


def lie_in_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.layers.1.block_sparse_moe.gate.weight"
    content["weight_map"][name] = next(f for f in content["weight_map"].values() if f != content["weight_map"][name])
    index.write_text(json.dumps(content))


def empty_header(folder: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[-1]
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def lie_in_header(folder: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[-1]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"] = [10**6, 10**6]
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data[8 + length :])


def truncate(folder: Path) -> None:
    file = sorted(folder.glob("model-*.safetensors"))[-1]
    os.truncate(file, file.stat().st_size - 1)


def pickle_only(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").mkdir()  # opening it would fail otherwise


def rename_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_next"}))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lose_shard, "model-00001-of-.* is missing"),
        (lie_in_index, "the index places .*layers.1.block_sparse_moe.gate.weight in .*, which lacks it"),
        (truncate, "safetensors cannot be read .*not what its header says.*download it again"),
        (empty_header, "safetensors cannot be read .*safetensors header is too big"),
        (lie_in_header, "safetensors cannot be read .*do not fit its shape"),
        (pickle_only, r"only pickled weights \(pytorch_model.bin\), which are never read"),
        (rename_family, "model_type qwen3_next is not known"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "no model.safetensors nor an index"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "holds no weight_map"),
    ],
)
def test_a_broken_folder_is_one_clear_line(break_it: Any, said: str, tmp_path: Path) -> None:
    break_it(sharded(tmp_path))
    with pytest.raises(InputError, match=said) as raised:
        load_routers(tmp_path)
    assert "\n" not in str(raised.value)


def test_words_and_sizes_are_checked(tmp_path: Path) -> None:
    weights = load_routers(write(tmp_path, openai()))
    sets = [reported(weights)]
    for words in ([[]], [[V]], [[-1]]):
        with pytest.raises(InputError, match="words, keep: "):
            project_routers(weights, sets, words=words)
    with pytest.raises(InputError, match="words, keep: "):
        project_routers(weights, sets, keep=[V])
    with pytest.raises(InputError, match="top, block_rows"):
        project_routers(weights, sets, top=0)
    with pytest.raises(InputError, match="experts: 1"):
        random_routers(weights, 1, seed=0)


# Projection


@pytest.mark.parametrize("block_rows", [1, 7, 40, 4096])
def test_projection_equals_the_full_computation(block_rows: int, tmp_path: Path) -> None:
    weights = load_routers(write(tmp_path, openai()))
    words = [[3], [5, 39, 7], [0]]
    sets = [reported(weights), controlled(weights)]
    found, _ = project_routers(weights, sets, top=10, words=words, block_rows=block_rows)
    rows, unembedding = weights.weight.double(), unembedding_of(weights).double()
    folded = (rows - rows.mean(1, keepdim=True)) * weights.gain[:, None].double()
    centred = (unembedding - unembedding.mean(0)) * weights.final_gain
    for got, row, tokens in ((found[0], rows, unembedding), (found[1], folded, centred)):
        full = torch.nn.functional.cosine_similarity(row[:, :, None], tokens.double(), dim=-1)
        top = full.topk(10, dim=-1)
        assert torch.equal(got.top_ids, top.indices)
        torch.testing.assert_close(got.top_scores.double(), top.values, atol=1e-6, rtol=0)
        torch.testing.assert_close(got.mean, full.mean(-1), atol=1e-7, rtol=0)
        std = full.std(-1, correction=0)
        torch.testing.assert_close(got.std, std, atol=1e-6, rtol=0)
        torch.testing.assert_close(got.z, (top.values[..., 0] - full.mean(-1)) / std, atol=1e-5, rtol=1e-5)
        for column, ids in enumerate(words):
            best = full[..., ids].amax(-1)
            torch.testing.assert_close(got.score[..., column].double(), best, atol=1e-6, rtol=0)
            assert torch.equal(got.rank[..., column], 1 + (full > best[..., None]).sum(-1))


@pytest.mark.parametrize("block_rows", [1, 7, 4096])
def test_rows_of_top_tokens_and_of_those_asked_for_are_kept(block_rows: int, tmp_path: Path) -> None:
    weights = load_routers(write(tmp_path, openai()))
    found, kept = project_routers(
        weights, [controlled(weights)], top=3, words=[[4, 9]], keep=[0, 38], block_rows=block_rows
    )
    assert set(kept.ids.tolist()) == {*found[0].top_ids.flatten().tolist(), 4, 9, 0, 38}
    assert kept.ids.equal(kept.ids.sort().values)
    full = unembedding_of(weights)
    torch.testing.assert_close(kept.mean, full.mean(0))
    ids = torch.tensor([[38, 4], [9, 0]])
    expected = normalize((full - full.mean(0)) * weights.final_gain, dim=-1)[ids]
    torch.testing.assert_close(kept.of(ids), expected)
    lost = next(i for i in range(V) if i not in kept.ids.tolist())
    with pytest.raises(InputError, match=f"ids: {lost} was not kept"):
        kept.of(torch.tensor([lost]))


def test_what_all_experts_share_does_not_count(tmp_path: Path) -> None:
    shift = torch.randn(D, generator=torch.Generator().manual_seed(3))
    names = [f"block.{n}.mlp.gate.weight" for n in range(2)]
    moved = openai() | {name: openai()[name] + 5 * shift for name in names}
    here, there = load_routers(write(tmp_path / "a", openai())), load_routers(write(tmp_path / "b", moved))
    torch.testing.assert_close(controlled(here).rows, controlled(there).rows)
    # It indeed changes nobody's choice: a softmax over the experts gives the same weights.
    states = torch.randn(50, D, generator=torch.Generator().manual_seed(4))
    before, after = (states @ weights.weight[0].T for weights in (here, there))
    torch.testing.assert_close(before.softmax(-1), after.softmax(-1), atol=1e-5, rtol=1e-4)


def test_a_planted_word_is_found_and_random_rows_stay_within_chance(tmp_path: Path) -> None:
    torch.manual_seed(2)
    width, vocabulary = 256, 3000
    head, final, gain = torch.randn(vocabulary, width), torch.rand(width) + 0.5, torch.rand(width) + 0.5
    tensors = openai() | {"unembedding.weight": head, "norm.scale": final}
    for n in range(2):
        router = torch.randn(E, width)
        router[2] = final * head[77 + n] / gain  # what the router must hold so that expert 2 reads token 77 + n
        tensors |= {f"block.{n}.mlp.gate.weight": router, f"block.{n}.mlp.norm.scale": gain.clone()}
    weights = load_routers(write(tmp_path, tensors))
    plain_null, folded_null = (each(random_routers(weights, 8, seed=0)) for each in (reported, controlled))
    sets = [controlled(weights), reported(weights), folded_null, plain_null]
    (planted, stored, *nulls), _ = project_routers(weights, sets, words=[[77], [78]], block_rows=1024)
    for n in range(2):
        assert planted.top_ids[n, 2, 0] == 77 + n
        assert planted.rank[n, 2, n] == 1
        assert planted.top_scores[n, 2, 0] > 0.8
    assert stored.top_scores[0, 2, 0] < 0.95  # the gains matter
    assert planted.z[0, 2] > 10 > planted.z[0, 0]
    for chance in nulls:
        assert chance.top_ids.shape == (2, 8, 10)
        # Not the largest: with four rows a layer, the other layer's planted word is a good part of their covariance.
        assert chance.top_scores[..., 0].median() < 1.3 * expected_max_cosine(vocabulary, width)
    again = random_routers(weights, 8, seed=0).weight
    assert torch.equal(reported(random_routers(weights, 8, seed=0)).rows, again)
    assert not torch.equal(again, random_routers(weights, 8, seed=1).weight)


def test_any_leading_shape_of_directions_is_kept(tmp_path: Path) -> None:
    weights = load_routers(write(tmp_path, openai()))
    (found,), _ = project_routers(weights, [Directions(torch.randn(3, D), gains=True)], top=2, words=[[1]])
    assert (found.top_ids.shape, found.mean.shape, found.rank.shape) == ((3, 2), (3,), (3, 1))


# Size

_AT_SIZE = """
import resource, sys, torch
from dataclasses import replace
from pathlib import Path
from classifier_emergence.mixtures.projection import controlled, project_routers
from classifier_emergence.mixtures.routers import load_routers
torch.set_num_threads(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
weights = load_routers(Path(sys.argv[1]))
assert weights.weight.shape == (24, 32, 2880), weights.weight.shape
# The first of 24 layers: the products of all take a minute of one core.
some = replace(weights, layers=weights.layers[:1], weight=weights.weight[:1], gain=weights.gain[:1])
(found,), _ = project_routers(some, [controlled(some)], words=[[200000]])
assert found.top_ids[0, 3, 0] == 200000 and found.rank[0, 3, 0] == 1, found.top_ids[0, 3]
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(weights.bytes_read, weights.total_bytes, growth * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files, and ru_maxrss in KiB")
def test_gpt_oss_20b_takes_a_tenth_of_its_bytes_and_little_memory(tmp_path: Path) -> None:
    width, vocabulary, layers, experts = 2880, 201088, 24, 32
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "num_hidden_layers": layers}))
    small: dict[str, tuple[str, tuple[int, ...]]] = {"model.norm.weight": ("BF16", (width,))}
    junk: dict[str, tuple[str, tuple[int, ...]]] = {}
    for n in range(layers):
        block = f"model.layers.{n}."
        small[block + "post_attention_layernorm.weight"] = ("BF16", (width,))
        small[block + "mlp.router.weight"] = ("BF16", (experts, width))
        small[block + "mlp.router.bias"] = ("BF16", (experts,))
        for name, rows in (("gate_up_proj", 2 * width), ("down_proj", width)):
            junk[f"{block}mlp.experts.{name}_blocks"] = ("U8", (experts, rows, 90, 16))
            junk[f"{block}mlp.experts.{name}_scales"] = ("U8", (experts, rows, 90))
    head = {"lm_head.weight": ("BF16", (vocabulary, width)), "model.embed_tokens.weight": ("BF16", (vocabulary, width))}
    files = {"model-1.safetensors": small, "model-2.safetensors": head, "model-3.safetensors": junk}
    starts = {}
    for file, shapes in files.items():
        starts |= {name: (tmp_path / file, at) for name, at in write_sparse(tmp_path / file, shapes).items()}
    weight_map = {name: file.name for name, (file, _) in starts.items()}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def put(name: str, row: int, values: Tensor) -> None:
        file, at = starts[name]
        with file.open("r+b") as stream:
            stream.seek(at + row * width * 2)
            stream.write(values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())

    word = torch.randn(width, generator=torch.Generator().manual_seed(0))
    for name, row, values in (
        ("model.norm.weight", 0, torch.ones(width)),
        ("model.layers.0.post_attention_layernorm.weight", 0, torch.ones(width)),
        ("model.layers.0.mlp.router.weight", 3, word),
        ("lm_head.weight", 200000, word),
    ):
        put(name, row, values)
    done = subprocess.run(
        [sys.executable, "-c", _AT_SIZE, str(tmp_path)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    read, total, growth = map(int, done.stdout.split())
    assert total > 12e9
    assert sum(file.stat().st_blocks for file in tmp_path.iterdir()) * 512 < 2**22  # nothing large was written
    routers = sum(torch.Size(shape).numel() * 2 for _, shape in small.values())
    assert read == routers + (vocabulary + 1 + 16 * RUN) * width * 2
    assert read < total / 10
    assert growth < 1.5e9, growth
