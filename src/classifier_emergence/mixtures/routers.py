"""Routers of a mixture-of-experts checkpoint, read without the model.

A router scores experts by ``R norm_l(h) + b``, an unembedding tokens by ``W_U norm_f(h)``; both read the residual
stream through an RMS norm with a gain. Families and names of tensors, as published and as transformers 5 saves them:
Mixtral ``block_sparse_moe.gate``, OLMoE, Qwen2-MoE and Qwen3-MoE ``mlp.gate`` (``mlp.shared_expert_gate`` is no
router), Granite-MoE ``block_sparse_moe.router.layer``, GPT-OSS ``mlp.router``, and OpenAI's own files of GPT-OSS.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classifier_emergence.errors import InputError
from classifier_emergence.models.checkpoint import Checkpoint

# Families whose norm is g * x / rms(x) in front of the router; others share names, but store 1 + g or norm elsewhere.
_FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "granitemoe", "gpt_oss")
_ROUTER = re.compile(
    r"model\.layers\.(\d+)\.(?:block_sparse_moe\.(?:gate|router|router\.layer)|mlp\.(?:gate|router))\.weight"
)
_OPENAI_ROUTER = re.compile(r"block\.(\d+)\.mlp\.gate\.weight")


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


def has_routers(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint is a mixture of experts, by the names of its tensors."""
    return any(_ROUTER.fullmatch(name) or _OPENAI_ROUTER.fullmatch(name) for name in checkpoint.names)


def load_routers(source: Path | Checkpoint) -> RouterWeights:
    """Read the routers and norm gains of a Hugging Face checkpoint, or of OpenAI's own files of GPT-OSS.

    Args:
        source: A folder, or a checkpoint that lies elsewhere (``sources.checkpoint_of``).

    Raises:
        InputError: Files are missing, truncated, pickled or disagree; the model is dense or of another family; or
            shapes do not fit. One line that names the folder and what to do.
    """
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint(source)
    config, folder = checkpoint.json("config.json"), checkpoint.root
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
        if (shape := checkpoint.shape(name)) != wanted:
            raise InputError(f"{folder}: {name} is {list(shape)}, not {list(wanted)}; give one model's weights")
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


def _sparse_layers(config: dict[str, Any]) -> list[int]:
    """Blocks that have a router: all, but for what Qwen's configs make dense."""
    dense, step = config.get("mlp_only_layers") or [], config.get("decoder_sparse_step") or 1
    return [i for i in range(config.get("num_hidden_layers") or 0) if i not in dense and (i + 1) % step == 0]
