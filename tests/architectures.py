"""Random models of every family that is promised: four layers, from transformers' own configurations."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from classifier_emergence.reading.model import LanguageModel

LAYERS, WIDTH, HEADS, VOCABULARY = 4, 32, 4, 200
_LLAMA: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
_GEMMA = {**_LLAMA, "head_dim": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GPT = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}
_OPT = {"hidden_size": WIDTH, "ffn_dim": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "max_position_embeddings": 128}  # fmt: skip
_FALCON = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_NEXT = {**_LLAMA, **_EXPERTS, "head_dim": 8, "shared_expert_intermediate_size": 16, "linear_num_value_heads": 4,
         "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _LLAMA),
    "mistral": ("Mistral", {**_LLAMA, "sliding_window": 64}),
    "qwen2": ("Qwen2", _LLAMA),
    "qwen3": ("Qwen3", _GEMMA),
    "qwen3-moe": ("Qwen3Moe", {**_GEMMA, **_EXPERTS}),
    "gemma": ("Gemma", _GEMMA),
    "gemma2": ("Gemma2", {**_GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 64}),
    "gemma3": ("Gemma3Text", {**_GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 64}),
    "granite": ("Granite", {**_LLAMA, "logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
                            "attention_multiplier": 0.125}),
    "granite-moe": ("GraniteMoe", {**_LLAMA, **_LOCAL, "logits_scaling": 6.0, "embedding_multiplier": 12.0}),
    "olmo2": ("Olmo2", _LLAMA),
    "olmoe": ("Olmoe", {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("Cohere", {**_LLAMA, "logit_scale": 0.0625}),
    "cohere2": ("Cohere2", {**_LLAMA, "logit_scale": 0.25, "sliding_window": 64}),
    "phi": ("Phi", _LLAMA),
    "phi3": ("Phi3", {**_LLAMA, "pad_token_id": 0}),
    "gpt2": ("GPT2", _GPT),
    "gpt-neo": ("GPTNeo", {"hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "window_size": 8,
                           "attention_types": [[["global", "local"], 2]], "max_position_embeddings": 128}),
    "gpt-neox": ("GPTNeoX", {**_LLAMA, "rotary_pct": 0.5}),
    "gptj": ("GPTJ", {**_GPT, "rotary_dim": 4}),
    "opt": ("OPT", {**_OPT, "word_embed_proj_dim": WIDTH}),
    "opt-projected": ("OPT", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("Bloom", {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}),
    "falcon": ("Falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-key": ("Falcon", {**_FALCON, "multi_query": True}),
    "falcon-alibi": ("Falcon", {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False}),
    "mpt": ("Mpt", {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 128}),
    "mixtral": ("Mixtral", {**_LLAMA, **_LOCAL}),
    "gpt-oss": ("GptOss", {**_GEMMA, **_LOCAL, "sliding_window": 64}),
    "deepseek-v3": ("DeepseekV3", {
        **_LLAMA, "num_key_value_heads": HEADS, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
        "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}),
    "mamba": ("Mamba", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 8}),
    "lfm2": ("Lfm2", {**_LLAMA, "layer_types": ["conv", "full_attention"] * 2}),
    "recurrent-gemma": ("RecurrentGemma", {**_LLAMA, "lru_width": WIDTH, "attention_window_size": 64}),
    "qwen3-next": ("Qwen3Next", {**_NEXT, "layer_types": ["linear_attention", "full_attention"] * 2}),
}  # fmt: skip


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode."""
    family, settings = CONFIGS[name]
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, f"{family}Config")(**(common | settings | changes))
    torch.manual_seed(0)
    model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    # Biases and gains start at 0 and 1, where a mistake with them would not show.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def save_as_mxfp4(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Write a GPT-OSS as it is published, with random experts, and return the values of these."""
    model.config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    values = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    expected = {}
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, width, out = weights.pop(name).shape
        blocks = torch.randint(256, (experts, out, width // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 122, (experts, out, width // 32), dtype=torch.uint8)
        pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1).flatten(-2)
        expected[name] = (pairs * 2.0 ** (scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    model.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return expected


def language_model(name: str, **changes: Any) -> LanguageModel:
    """The same with a tokenizer that knows signs, four words and the numbers up to 180."""
    words = ["<bos>", "<eos>", "<unk>", *"*+-/=", "multiply", "add", "subtract", "divide", *map(str, range(181))]
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<bos>", eos_token="<eos>")
    return LanguageModel(name, build(name, **changes), tokenizer)
