"""What V, O, Q, K and the MLP are called in every family of architectures, also where one map holds several of them.

An adapter asks for maps by the names that Llama gives them. Most families use these; the others are in ``FAMILIES``.
Where Q, K and V are rows of one map, a low-rank update ``B A`` of one of them is that of the whole map with all other
rows of B at zero: they start there and ``Targets.confine`` keeps them from gradients.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from classifier_emergence.errors import InputError

VO, QK = ("v_proj", "o_proj"), ("q_proj", "k_proj")
QKVO = (*QK, *VO)
MLP = ("gate_proj", "up_proj", "down_proj")

Layout = Callable[[Any], tuple[int, dict[str, int]]]
"""Of a configuration: how often a sequence of parts is repeated over the rows of a map, and the rows of each part."""


@dataclass(frozen=True)
class Names:
    """One kind of block: where the maps are that Llama calls so, within the block."""

    names: dict[str, str]
    layouts: dict[str, Layout]
    """Of the maps that hold several."""


@dataclass(frozen=True)
class Targets:
    """The maps of a model that an adapter asks for."""

    names: tuple[str, ...]
    """Ends of module names, as PEFT takes them."""
    transposed: bool
    """Whether they are GPT-2's Conv1D, which holds its weight the other way round."""
    kept: dict[str, Tensor]
    """Of a map that holds more than was asked for: (rows,) whether each is trained."""

    def confine(self, wrapped: nn.Module, adapter: str = "default") -> None:
        """Keep rows that were not asked for at zero in every B of a fresh LoRA adapter that requires gradients."""
        for name, rows in self.kept.items():
            for path, parameter in wrapped.named_parameters():
                if f".{name}.lora_B.{adapter}." in path:
                    mask = rows.to(parameter)[:, None]
                    parameter.register_hook(lambda gradient, mask=mask: gradient * mask)


def _plain(attention: str, q: str, k: str, v: str, o: str, *mlp: str) -> Names:
    maps = {role: f"{attention}.{name}" for role, name in zip(QKVO, (q, k, v, o), strict=True)}
    return Names(maps | dict(zip(MLP[-len(mlp) :], mlp, strict=True)), {})


def _fused(qkv: str, o: str, *mlp: str, layout: Layout) -> Names:
    names = dict.fromkeys(("q_proj", "k_proj", "v_proj"), qkv) | {"o_proj": o}
    return Names(names | dict(zip(MLP[1:], mlp, strict=False)), {qkv: layout})


def _parts(**rows: int) -> dict[str, int]:
    return {f"{part}_proj": n for part, n in rows.items()}


def _thirds(config: Any) -> tuple[int, dict[str, int]]:
    """All of Q, then K, then V."""
    return 1, _parts(q=config.hidden_size, k=config.hidden_size, v=config.hidden_size)


def _per_head(config: Any) -> tuple[int, dict[str, int]]:
    """Q, K and V of the first head, then of the next."""
    n = config.hidden_size // config.num_attention_heads
    return config.num_attention_heads, _parts(q=n, k=n, v=n)


def _falcon(config: Any) -> tuple[int, dict[str, int]]:
    n, heads = config.hidden_size // config.num_attention_heads, config.num_attention_heads
    if config.new_decoder_architecture:
        return config.num_kv_heads, _parts(q=heads // config.num_kv_heads * n, k=n, v=n)
    return (1, _parts(q=heads * n, k=n, v=n)) if config.multi_query else _per_head(config)


def _bigcode(config: Any) -> tuple[int, dict[str, int]]:
    n = config.hidden_size // config.num_attention_heads
    return (1, _parts(q=config.hidden_size, k=n, v=n)) if config.multi_query else _per_head(config)


def _phi3(config: Any) -> tuple[int, dict[str, int]]:
    n = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = config.num_key_value_heads * n
    return 1, _parts(q=config.num_attention_heads * n, k=keys, v=keys)


def _latent(config: Any) -> tuple[int, dict[str, int]]:
    """DeepSeek's map from the shared latent state to keys and values."""
    return config.num_attention_heads, _parts(k=config.qk_nope_head_dim, v=config.v_head_dim)


def _delta(config: Any) -> tuple[int, dict[str, int]]:
    """Qwen3-Next's linear attention; its values have a gate of the same size."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    n = values // keys * config.linear_value_head_dim
    return keys, _parts(q=config.linear_key_head_dim, k=config.linear_key_head_dim, v=n, gate=n)


def _gate_up(config: Any) -> tuple[int, dict[str, int]]:
    return 1, _parts(gate=config.intermediate_size, up=config.intermediate_size)


_LLAMA = Names({name: name for name in (*QKVO, *MLP)}, {})
_GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_NEOX = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_BLOOM = ("self_attention.query_key_value", "self_attention.dense", *_NEOX[2:])
_MLA = {"k_proj": "kv_b_proj", "v_proj": "kv_b_proj", "o_proj": "o_proj", **dict(zip(MLP, MLP, strict=True))}
_DEEPSEEK = tuple(Names({"q_proj": q, **_MLA}, {"kv_b_proj": _latent}) for q in ("q_b_proj", "q_proj"))
_FUSED_MLP = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
_QKV = ("q_proj", "k_proj", "v_proj")

FAMILIES: dict[str, tuple[Names, ...]] = {
    "gpt2": (_fused(*_GPT2, layout=_thirds),),
    "gpt_bigcode": (_fused(*_GPT2, layout=_bigcode),),
    "gpt_neo": (_plain("attn.attention", *_QKV, "out_proj", "mlp.c_fc", "mlp.c_proj"),),
    "gptj": (_plain("attn", *_QKV, "out_proj", "mlp.fc_in", "mlp.fc_out"),),
    "gpt_neox": (_fused(*_NEOX, layout=_per_head),),
    "bloom": (_fused(*_BLOOM, layout=_per_head),),
    "falcon": (_fused(*_BLOOM, layout=_falcon),),
    "mpt": (_fused("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj", layout=_thirds),),
    "opt": (_plain("self_attn", *_QKV, "out_proj", "fc1", "fc2"),),
    "phi": (_plain("self_attn", *_QKV, "dense", "mlp.fc1", "mlp.fc2"),),
    "phi3": (
        Names(dict.fromkeys(_QKV, "qkv_proj") | {"o_proj": "o_proj"} | _FUSED_MLP,
              {"qkv_proj": _phi3, "gate_up_proj": _gate_up}),
    ),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "qwen3_next": (
        _LLAMA,
        _fused("linear_attn.in_proj_qkvz", "linear_attn.out_proj", layout=_delta),
    ),
    "lfm2": (_plain("self_attn", *_QKV, "out_proj", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),),
}  # fmt: skip
"""By ``model_type``: the kinds of blocks that a family has, where they are not Llama's."""


def targets(model: PreTrainedModel, blocks: nn.ModuleList, asked: Sequence[str], layers: Sequence[int]) -> Targets:
    """The maps that an adapter asks for, by the model's own names.

    A block that has none of them is passed over, as those without attention are in hybrid families.

    Args:
        model: Its configuration says which family it is.
        blocks: Its blocks.
        asked: Names as Llama's, or the model's own.
        layers: 0-based blocks.

    Raises:
        InputError: A block has some of the maps but not all, or no block has any; names the maps that there are.

    Example:
        >>> targets(gpt2, gpt2.transformer.h, VO, [0]).names
        ('attn.c_attn', 'attn.c_proj')
    """
    config: Any = model.config.get_text_config()
    found: dict[str, Tensor | None] = {}
    transposed = False
    missing: set[str] = set()
    for layer in layers:
        maps = {name: part for name, part in blocks[layer].named_modules() if isinstance(part, nn.Linear | Conv1D)}
        best = min(
            (_lookup(kind, asked, maps) for kind in FAMILIES.get(config.model_type, (_LLAMA,))),
            key=lambda pair: len(pair[1]),
        )
        if best[0] and best[1]:
            raise InputError(_refusal(model, best[1], layer, maps))
        missing |= best[1]
        for name, (rows, kind) in best[0].items():
            found[name] = _mask(kind.layouts[name], config, rows) if name in kind.layouts else None
            transposed |= any(isinstance(part, Conv1D) for path, part in maps.items() if _is(path, name))
    if not found:
        raise InputError(_refusal(model, missing, layer, maps))
    kept = {name: mask for name, mask in found.items() if mask is not None and not mask.all()}
    return Targets(tuple(found), transposed, kept)


def _lookup(
    kind: Names, asked: Sequence[str], maps: Iterable[str]
) -> tuple[dict[str, tuple[set[str], Names]], set[str]]:
    """The maps that one kind of block has of those asked for -> what they are asked for as; and what is missing."""
    found: dict[str, tuple[set[str], Names]] = {}
    missing: set[str] = set()
    for role in asked:
        name = kind.names.get(role, role)
        if any(_is(path, name) for path in maps):
            found.setdefault(name, (set(), kind))[0].add(role)
        elif not (role == "gate_proj" and role not in kind.names and "up_proj" in asked):  # an MLP without a gate
            missing.add(role)
    return found, missing


def _mask(layout: Layout, config: Any, asked: set[str]) -> Tensor:
    repeats, parts = layout(config)
    one = torch.cat([torch.full((n,), part in asked) for part, n in parts.items()])
    return one.repeat(repeats)


def _is(path: str, name: str) -> bool:
    """Whether PEFT takes a module for one that is called so."""
    return path == name or path.endswith(f".{name}")


def _refusal(model: PreTrainedModel, missing: set[str], layer: int, maps: Iterable[str]) -> str:
    has = ", ".join(dict.fromkeys(maps)) or "none"
    return (
        f"modules: {', '.join(sorted(missing))}: not found in block {layer} of {type(model).__name__}, whose linear "
        f"maps are {has}; choose among these, or another model"
    )
