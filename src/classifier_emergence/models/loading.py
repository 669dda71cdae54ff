"""From a name to a language model with its tokenizer: float32, evaluation mode, frozen; adapters merged in."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from classifier_emergence.errors import InputError
from classifier_emergence.extras import missing_extras_named
from classifier_emergence.models.names import resolve
from classifier_emergence.models.registry import ModelSource
from classifier_emergence.models.sources import fetch
from classifier_emergence.progress import no_bars_in_logs
from classifier_emergence.reading.lens import check_lens
from classifier_emergence.reading.model import LanguageModel

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def open_model(name: str, *, adapter: str | Path | Sequence[str | Path] | None = None) -> LanguageModel:
    """Load what ``name`` and ``adapter`` mean: float32, in evaluation mode, frozen.

    Args:
        name: A key of ``names.registry()``, ``owner/name[@revision]`` on the hub, or a local folder.
        adapter: Folder of a PEFT adapter (``adapter_config.json``, ``adapter_model.safetensors``) that was trained on
            this model; or several, each trained on the model with those before it. They are merged into the weights, so
            that training can go on from there.

    Raises:
        InputError: See ``load``; or the adapter is no such folder, or does not fit the model tensor by tensor.

    Example:
        >>> open_model("gemma-3-270m", adapter="dual-reward").key
        'gemma-3-270m+dual-reward'
    """
    lm = load(name)
    for folder in [adapter] if isinstance(adapter, str | Path) else adapter or ():
        lm = _adapted(lm, Path(folder).expanduser())
    return lm


def load(name: str, known: dict[str, ModelSource] | None = None) -> LanguageModel:
    """Load the model that ``names.resolve(name, known)`` means; fetch it first if need be.

    The model is float32 with SDPA attention, in evaluation mode, without gradients. The tokenizer pads on the
    left and has a padding token. Code from a model repository is never run.

    Raises:
        InputError: The name means nothing, the weights cannot be had (see ``sources.fetch``), are quantised or
            incomplete, the architecture is unknown to transformers, or there is no token to pad with.

    Example:
        >>> load("gemma-3-270m").model.dtype
        torch.float32
    """
    key, source = resolve(name, known)
    folder = fetch(key, source)
    try:
        with no_bars_in_logs():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = _model(key, folder)
    except InputError:
        raise
    except Exception as error:  # a damaged file makes transformers stumble in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{key}: transformers cannot load {folder} ({reason}); choose another model") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"{key}: the tokenizer has neither a padding nor an end token; set one in {folder}")
        tokenizer.pad_token = tokenizer.eos_token
    lm = LanguageModel(key, model, tokenizer)
    check_lens(lm)
    return lm


def describe(lm: LanguageModel) -> dict[str, Any]:
    """What one should know of a loaded model before measuring it; ``lens_log_gap`` as ``lens.check_lens`` gives it."""
    vocabulary, width = lm.readout.weight.shape
    return {
        "model": lm.key,
        "architecture": type(lm.model).__name__,
        "n_layers": lm.n_layers,
        "d_model": width,
        "vocabulary": vocabulary,
        "tokenizer_vocabulary": len(lm.tokenizer),
        "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
        "tied_embeddings": lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight,
        "adds_bos": lm.tokenizer("=")["input_ids"][:1] == [lm.tokenizer.bos_token_id],
        "lens_log_gap": check_lens(lm),
    }


def _model(key: str, folder: Path) -> PreTrainedModel:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "some way")
        raise InputError(f"{key}: the weights are quantised ({method}); give a folder with unquantised weights")
    pair: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="sdpa",
        trust_remote_code=False,
        output_loading_info=True,
    )
    model, report = pair
    # transformers fills missing weights with random numbers and only logs it.
    wrong = sorted(report["missing_keys"]) + sorted(str(item) for item in report["mismatched_keys"])
    if wrong:
        raise InputError(f"{key}: {folder} lacks weights that fit ({', '.join(wrong[:3])}); fetch or save it again")
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def _adapted(lm: LanguageModel, folder: Path) -> LanguageModel:
    with missing_extras_named():
        from peft import PeftModel, get_peft_model_state_dict

    for file in _ADAPTER_FILES:
        if not (folder / file).is_file():  # peft would take a pickle instead, or ask the hub
            raise InputError(f"adapter {folder}: no {file}; give a folder that PEFT's save_pretrained wrote")
    try:
        stored = set(load_file(folder / _ADAPTER_FILES[1]))
        with warnings.catch_warnings():
            # Said again below, as an error.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            wrapped: Any = PeftModel.from_pretrained(lm.model, str(folder))
        # peft leaves out, without an error, tensors for layers that the model does not have.
        least, most = (set(get_peft_model_state_dict(wrapped, save_embedding_layers=e)) for e in (False, True))
        fits = least <= stored <= most and not wrapped.active_peft_config.is_prompt_learning
        model = wrapped.merge_and_unload() if fits else None
    except Exception as error:  # a damaged or foreign adapter makes peft stumble in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"adapter {folder}: cannot be put on {lm.key} ({reason}); give one trained on it") from error
    if model is None:
        raise InputError(f"adapter {folder}: its tensors do not fit {lm.key}; give a LoRA adapter trained on it")
    model.requires_grad_(False).eval()
    adapted = replace(lm, model=model, key=f"{lm.key}+{folder.resolve().name}")
    check_lens(adapted)
    return adapted
