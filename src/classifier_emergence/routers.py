"""Routers of a mixture-of-experts checkpoint, read from safetensors without the model: is an expert's row a word?

A router scores experts by ``R norm_l(h) + b``, an unembedding tokens by ``W_U norm_f(h)``; both read the residual
stream through an RMS norm with a gain. Families and names of tensors, as published and as transformers 5 saves them:
Mixtral ``block_sparse_moe.gate``, OLMoE, Qwen2-MoE and Qwen3-MoE ``mlp.gate`` (``mlp.shared_expert_gate`` is no
router), Granite-MoE ``block_sparse_moe.router.layer``, GPT-OSS ``mlp.router``, and OpenAI's own files of GPT-OSS.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from classifier_emergence.errors import InputError

BLOCK_ROWS = 4096

# Families whose norm is g * x / rms(x) in front of the router; others share names, but store 1 + g or norm elsewhere.
_FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe", "gpt_oss")
_ROUTER = re.compile(
    r"model\.layers\.(\d+)\.(?:block_sparse_moe\.(?:gate|router|router\.layer)|mlp\.(?:gate|router))\.weight"
)
_OPENAI_ROUTER = re.compile(r"block\.(\d+)\.mlp\.gate\.weight")
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


class Checkpoint:
    """Tensors of a folder's safetensors by name; counts what is read. Pickles are never opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_read = 0
        """Bytes of tensor data read so far, without headers (8 bytes and a few hundred a tensor)."""
        self._files = _files(folder)
        names = set(self._files.values())
        if missing := sorted(name for name in names if not (folder / name).is_file()):
            raise InputError(f"{folder}: {missing[0]} is missing; complete the download")
        self.total_bytes = sum((folder / name).stat().st_size for name in names)
        """Size of all weight files."""
        for file in sorted(names):
            with _open(self.folder / file) as handle:  # also finds truncation
                held = set(handle.keys())
            if lost := sorted(name for name, its in self._files.items() if its == file and name not in held):
                raise InputError(f"{folder}: the index places {lost[0]} in {file}, which lacks it; download both again")

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; reads no data."""
        with _open(self.folder / self._file(name)) as handle:
            return tuple(handle.get_slice(name).get_shape())

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """Rows of a tensor in its stored dtype: float32, float16 or bfloat16."""
        # Opened for each read: pages of the mapped file count as memory for as long as it is open.
        with _open(self.folder / self._file(name)) as handle:
            part = handle.get_slice(name)
            if part.get_dtype() not in _BYTES:
                raise InputError(f"{self.folder}: {name} is {part.get_dtype()}; give weights in {', '.join(_BYTES)}")
            tensor: Tensor = part[rows].clone()
        self.bytes_read += tensor.nbytes
        return tensor

    def _file(self, name: str) -> str:
        if name not in self._files:
            raise InputError(f"{self.folder}: no tensor {name}; give a complete checkpoint")
        return self._files[name]


@dataclass(frozen=True)
class RouterWeights:
    """Routers of L layers with E experts each, and what is needed to compare them with the vocabulary."""

    layers: tuple[int, ...]
    """Numbers of the blocks that have a router, ascending; dense blocks are absent."""
    weight: Tensor
    """R, (L, E, d) in the stored dtype."""
    bias: Tensor | None
    """(L, E); None where the family has none."""
    gain: Tensor
    """(L, d) gain of the norm in front of each router."""
    final_gain: Tensor
    """(d,) gain of the final norm."""
    unembedding: str
    """Name of the tensor W_U (V, d) in ``checkpoint``; it is read in blocks when projected."""
    checkpoint: Checkpoint = field(repr=False)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read so far, projections included."""
        return self.checkpoint.bytes_read

    @property
    def total_bytes(self) -> int:
        """Size of all weight files of the checkpoint."""
        return self.checkpoint.total_bytes

    @property
    def vocabulary(self) -> int:
        """Rows of W_U, with those that pad it beyond the tokenizer's tokens."""
        return self.checkpoint.shape(self.unembedding)[0]


@dataclass(frozen=True)
class RouterProjection:
    """Cosines of every router row (layer, expert) with the whole vocabulary."""

    top_ids: Tensor
    """(L, E, k): tokens with the highest scores."""
    top_scores: Tensor
    """(L, E, k) float32."""
    mean: Tensor
    """(L, E) float64 mean over the vocabulary; a z-score is ``(score - mean) / std``."""
    std: Tensor
    """(L, E) float64 standard deviation over the vocabulary (divided by V)."""
    score: Tensor
    """(L, E, words): best score among a word's token ids."""
    rank: Tensor
    """(L, E, words): rank of that score over the vocabulary, 1 + number of strictly higher; 1 is the top."""


def load_routers(folder: Path) -> RouterWeights:
    """Read the routers and norm gains of a Hugging Face folder, or of OpenAI's own GPT-OSS folder.

    Raises:
        InputError: Files are missing, truncated, pickled or disagree; the model is dense or of another family; or
            shapes do not fit. One line that names the folder and what to do.
    """
    config = _json(folder, "config.json")
    checkpoint = Checkpoint(folder)
    names = set(checkpoint.names)
    openai = any(_OPENAI_ROUTER.fullmatch(name) for name in names)
    pattern = _OPENAI_ROUTER if openai else _ROUTER
    routers = {int(match[1]): name for name in names if (match := pattern.fullmatch(name))}
    family = config.get("model_type")
    if not routers:
        raise InputError(f"{folder}: no routers (model_type {family}); give a mixture of experts, this is dense")
    if not openai and family not in _FAMILIES:
        raise InputError(f"{folder}: model_type {family} is not known to norm like {', '.join(_FAMILIES)}; give these")
    layers = tuple(sorted(routers))
    if lacking := sorted(set(_sparse_layers(config)) - set(layers)):
        raise InputError(f"{folder}: no router in layer {lacking[0]}, which config.json has; complete the download")
    if openai:
        norm, final, head, embedding = "block.{}.mlp.norm.scale", "norm.scale", "unembedding", "embedding"
    else:
        norm, final = "model.layers.{}.post_attention_layernorm.weight", "model.norm.weight"
        head, embedding = "lm_head", "model.embed_tokens"
    unembedding = f"{head}.weight"
    if config.get("tie_word_embeddings") and f"{embedding}.weight" in names:
        unembedding = f"{embedding}.weight"
    shape = checkpoint.shape(routers[layers[0]])
    vocabulary = checkpoint.shape(unembedding)
    if len(shape) != 2 or len(vocabulary) != 2 or shape[1] != vocabulary[1]:
        raise InputError(
            f"{folder}: router {list(shape)} and {unembedding} {list(vocabulary)} differ in width; give one model"
        )
    biases = [name.removesuffix("weight") + "bias" for name in (routers[layer] for layer in layers)]
    has_bias = any(bias in names for bias in biases)
    experts, width = shape

    def read(name: str, *wanted: int) -> Tensor:
        if (found := checkpoint.shape(name)) != wanted:
            raise InputError(f"{folder}: {name} is {list(found)}, not {list(wanted)}; give one model's weights")
        tensor = checkpoint.read(name)
        if not tensor.isfinite().all():
            raise InputError(f"{folder}: {name} holds NaN or infinity; download it again")
        return tensor

    return RouterWeights(
        layers=layers,
        weight=torch.stack([read(routers[layer], experts, width) for layer in layers]),
        bias=torch.stack([read(bias, experts) for bias in biases]) if has_bias else None,
        gain=torch.stack([read(norm.format(layer), width) for layer in layers]),
        final_gain=read(final, width),
        unembedding=unembedding,
        checkpoint=checkpoint,
    )


def random_rows(weights: RouterWeights, *, seed: int) -> RouterWeights:
    """The same checkpoint with each router row in a random direction (uniform on the sphere) and of equal norm.

    Its projection is the null; ``statistics.expected_max_cosine(V, d)`` is the null's largest plain cosine if the
    unembedding too were isotropic, which trained ones and ``gains=True`` are not.
    """
    rows = torch.randn(weights.weight.shape, generator=torch.Generator().manual_seed(seed))
    norms = torch.linalg.vector_norm(weights.weight.float(), dim=-1, keepdim=True)
    return replace(weights, weight=_unit(rows) * norms, bias=None)


@torch.no_grad()
def project_routers(
    weights: RouterWeights,
    *,
    top: int = 10,
    gains: bool,
    words: Sequence[Sequence[int]] = (),
    block_rows: int = BLOCK_ROWS,
) -> RouterProjection:
    """Cosine of every router row with every unembedding row, in one pass over blocks of the vocabulary.

    ``cos(R[e], W_U[t])``, or with ``gains`` ``cos(g_l * R[e], g_f * W_U[t])``: the directions that raise expert e and
    token t before the norms scale them. Memory: (L E) x (block_rows + d) + block_rows x d float32, a few times over.

    Args:
        weights: Of a checkpoint, or ``random_rows`` of it.
        top: How many top tokens to keep.
        gains: Whether the gains of both norms are folded in.
        words: Token ids of each word whose best score and rank are wanted.
        block_rows: Rows of the unembedding held at once.

    Raises:
        InputError: ``top`` or ``block_rows`` is not positive, a word has no ids or one outside the vocabulary, or the
            unembedding holds NaN or infinity.
    """
    vocabulary = weights.vocabulary
    if top < 1 or block_rows < 1:
        raise InputError(f"top, block_rows: {top}, {block_rows}: both must be at least 1")
    if bad := [list(ids) for ids in words if not ids or min(ids) < 0 or max(ids) >= vocabulary]:
        raise InputError(f"words: {bad[0]}: pass at least one id, each within 0..{vocabulary - 1}")
    directions = weights.weight.float()
    if gains:
        directions = directions * weights.gain.float()[:, None]
    directions = _unit(directions).flatten(0, 1)

    def scores_of(start: int, stop: int) -> Tensor:
        rows = weights.checkpoint.read(weights.unembedding, slice(start, stop)).float()
        return directions @ _unit(rows * weights.final_gain.float() if gains else rows).T

    n = len(directions)
    # One by one and first: a rank counts what is above a score that must be known before the pass.
    wanted = {i: scores_of(i, i + 1)[:, 0] for i in sorted({i for ids in words for i in ids})}
    best = torch.empty(n, len(words))
    for column, ids in enumerate(words):
        best[:, column] = torch.stack([wanted[i] for i in ids]).amax(0)
    higher = torch.zeros(n, len(words), dtype=torch.int64)
    total, squares = torch.zeros(2, n, dtype=torch.float64)
    top_scores, top_ids = torch.empty(n, 0), torch.empty(n, 0, dtype=torch.int64)
    for start in range(0, vocabulary, block_rows):
        scores = scores_of(start, min(start + block_rows, vocabulary))
        for i in range(start, start + scores.shape[1]):
            if i in wanted:  # a product of another shape rounds otherwise: a token would rank below itself
                scores[:, i - start] = wanted[i]
        total += scores.sum(-1, dtype=torch.float64)
        squares += torch.linalg.vector_norm(scores, dim=-1, dtype=torch.float64).square()
        for column in range(len(words)):
            higher[:, column] += (scores > best[:, column, None]).sum(-1)
        found, at = scores.topk(min(top, scores.shape[1]), dim=-1)
        top_scores, top_ids = torch.cat([top_scores, found], -1), torch.cat([top_ids, at + start], -1)
        top_scores, kept = top_scores.topk(min(top, top_scores.shape[1]), dim=-1)
        top_ids = top_ids.gather(-1, kept)
    if not squares.isfinite().all():
        raise InputError(f"{weights.checkpoint.folder}: {weights.unembedding} holds NaN or infinity; download it again")
    mean = total / vocabulary
    std = (squares / vocabulary - mean.square()).clamp(min=0).sqrt()
    shape = weights.weight.shape[:2]
    parts = (top_ids, top_scores, mean, std, best, 1 + higher)
    return RouterProjection(*(part.unflatten(0, shape) for part in parts))


def _unit(rows: Tensor) -> Tensor:
    unit: Tensor = rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1e-12)
    return unit


def _sparse_layers(config: dict[str, Any]) -> list[int]:
    """Blocks that have a router: all, but for what Qwen's configs make dense."""
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    return [i for i in range(config.get("num_hidden_layers") or 0) if i not in dense and (i + 1) % step == 0]


def _files(folder: Path) -> dict[str, str]:
    """File of every tensor: of model.safetensors, else of its index."""
    if (folder / "model.safetensors").is_file():
        with _open(folder / "model.safetensors") as handle:
            return dict.fromkeys(handle.keys(), "model.safetensors")
    index = "model.safetensors.index.json"
    if (folder / index).is_file():
        files = _json(folder, index).get("weight_map")
        if isinstance(files, dict) and files and all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            return files
        raise InputError(f"{folder}: {index} holds no weight_map of tensors to files; download it again")
    if pickles := sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind)):
        raise InputError(f"{folder}: only pickled weights ({pickles[0]}), which are never read; give *.safetensors")
    raise InputError(f"{folder}: neither model.safetensors nor {index}; give a folder of a checkpoint")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: larger than memory allows to map
        reason = str(error).splitlines()[0]
        raise InputError(f"{file}: cannot be read ({reason}); download it again") from error


def _json(folder: Path, name: str) -> dict[str, Any]:
    if not (folder / name).is_file():
        raise InputError(f"{folder}: no {name}; give a folder of a checkpoint")
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder}: {name} cannot be read; download it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{folder}: {name} cannot be read; download it again")
    return content
