"""From a name to a language model with its tokenizer: placed, in evaluation mode, frozen; adapters merged in."""

import atexit
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FineGrainedFP8Config,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import Mxfp4Config

from classifier_emergence.errors import InputError
from classifier_emergence.extras import missing_extras_named
from classifier_emergence.models.checkpoint import Checkpoint
from classifier_emergence.models.gguf_file import read_gguf, values_in_gguf
from classifier_emergence.models.names import resolve
from classifier_emergence.models.placement import Placement, check_fits, place
from classifier_emergence.models.registry import ModelSource, local_path
from classifier_emergence.models.sources import fetch
from classifier_emergence.progress import no_bars_in_logs
from classifier_emergence.reading.lens import check_lens
from classifier_emergence.reading.model import LanguageModel

_console = Console(stderr=True, highlight=False, soft_wrap=True)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def open_model(
    name: str,
    *,
    adapter: str | Path | Sequence[str | Path] | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> LanguageModel:
    """Load what ``name`` and ``adapter`` mean: in evaluation mode, frozen.

    Args:
        name: A key of ``names.registry()``, ``owner/name[@revision]`` on the hub, a local folder or a GGUF file.
        adapter: Folder of a PEFT adapter (``adapter_config.json``, ``adapter_model.safetensors``) that was trained on
            this model; or several, each trained on the model with those before it. They are merged into the weights, so
            that training can go on from there.
        device: See ``placement.place``.
        dtype: Likewise.

    Raises:
        InputError: See ``load``; or the adapter is no such folder, or does not fit the model tensor by tensor.

    Example:
        >>> open_model("gemma-3-270m", adapter="dual-reward").key
        'gemma-3-270m+dual-reward'
    """
    lm = load(name, device=device, dtype=dtype)
    for folder in [adapter] if isinstance(adapter, str | Path) else adapter or ():
        lm = with_adapter(lm, local_path(folder))
    return lm


def load(
    name: str, known: dict[str, ModelSource] | None = None, *, device: str = "auto", dtype: str = "float32"
) -> LanguageModel:
    """Load the model that ``names.resolve(name, known)`` means; fetch it first if need be.

    The model is in evaluation mode, without gradients, with SDPA attention where its family has it, else eager (a
    notice says so). The tokenizer pads on the left and has a padding token. Code from a model repository is never run.
    Weights in MXFP4 or FP8 and those of GGUF files are dequantised; other quantised ones stay so, where the library
    that reads them is installed.

    Args:
        name: See ``names.resolve``.
        known: Likewise.
        device: See ``placement.place``.
        dtype: Likewise.

    Raises:
        InputError: The name means nothing, the weights cannot be had (see ``sources.fetch``), do not fit into memory or
            are incomplete, the architecture is unknown to transformers, or there is no token to pad with.

    Example:
        >>> load("gemma-3-270m").model.dtype
        torch.float32
    """
    key, source = resolve(name, known)
    folder = fetch(key, source)
    try:
        with no_bars_in_logs(), missing_extras_named():
            model, tokenizer = (_from_file if folder.is_file() else _from_folder)(key, folder, device, dtype)
    except InputError:
        raise
    except Exception as error:  # a damaged file makes transformers stumble in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{key}: transformers cannot load {folder} ({reason}); choose another model") from error
    attention = model.config._attn_implementation
    if attention != "sdpa" and getattr(model.config.get_text_config(), "num_attention_heads", None):
        notice = f"{key}: {attention} attention, as {type(model).__name__} has no scaled_dot_product_attention"
        _console.print(notice, markup=False)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"{key}: the tokenizer has neither a padding nor an end token; set one in {folder}")
        tokenizer.pad_token = tokenizer.eos_token
    return LanguageModel(key, model.eval().requires_grad_(False), tokenizer)


def with_adapter(lm: LanguageModel, folder: Path) -> LanguageModel:
    """The model with an adapter merged into its weights, which are changed in place.

    Raises:
        InputError: See ``open_model``.
    """
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
    return replace(lm, model=model, key=f"{lm.key}+{folder.resolve().name}")


def describe(lm: LanguageModel) -> dict[str, Any]:
    """What one should know of a loaded model before measuring it.

    ``lens_log_gap`` is as ``lens.check_lens`` gives it; None for a model without a readout, and ``lens`` says why.
    """
    embedding, head = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
    try:
        gap, lens = check_lens(lm), "yes"
    except InputError as error:
        gap, lens = None, f"no: {error}"
    return {
        "model": lm.key,
        "architecture": type(lm.model).__name__,
        "n_layers": lm.n_layers,
        "d_model": lm.model.config.get_text_config().hidden_size,
        "vocabulary": embedding.get_parameter("weight").shape[0],
        "tokenizer_vocabulary": len(lm.tokenizer),
        "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
        "tied_embeddings": head is not None and embedding.weight is head.weight,
        "adds_bos": lm.tokenizer("=")["input_ids"][:1] == [lm.tokenizer.bos_token_id],
        "device": ", ".join(
            sorted({str(d) for d in getattr(lm.model, "hf_device_map", {"": lm.model.device}).values()})
        ),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "attention": lm.model.config._attn_implementation,
        "lens": lens,
        "lens_log_gap": gap,
    }


def _from_folder(key: str, folder: Path, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    checkpoint = Checkpoint(folder)
    config = checkpoint.json("config.json")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    placement = place(device, dtype, _stored(config))
    check_fits(key, *checkpoint.sizes(), placement)
    settings = _taken_apart(config) | _arguments(placement)
    pair: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True, **settings
    )
    model, report = pair
    # transformers fills missing weights with random numbers and only logs it.
    wrong = sorted(report["missing_keys"]) + sorted(str(item) for item in report["mismatched_keys"])
    if wrong:
        raise InputError(f"{key}: {folder} lacks weights that fit ({', '.join(wrong[:3])}); fetch or save it again")
    return model, tokenizer


def _from_file(key: str, file: Path, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    placement = place(device, dtype, "bfloat16")
    try:
        check_fits(key, values_in_gguf(file), 0, placement)
        return read_gguf(file, **_arguments(placement))
    except InputError as error:
        raise InputError(f"{key}: {str(error).removeprefix(f'{key}: ')}") from error


def _stored(config: dict[str, Any]) -> str | None:
    """The precision that a configuration names, of a text model within it too."""
    for part in (config, config.get("text_config") or {}):
        if name := part.get("dtype") or part.get("torch_dtype"):
            return str(name)
    return None


def _taken_apart(config: dict[str, Any]) -> dict[str, Any]:
    """What makes transformers take weights in four or eight bits apart; arithmetic on them needs kernels of a hub."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    known = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
    return {"quantization_config": known[method](dequantize=True)} if method in known else {}


def _arguments(placement: Placement) -> dict[str, Any]:
    """Arguments of ``from_pretrained``."""
    if placement.device == "cpu":
        return {"dtype": placement.dtype}
    import accelerate  # noqa: F401  # transformers needs it for whatever is not the CPU

    if placement.device != "balanced":
        return {"dtype": placement.dtype, "device_map": placement.device}
    offload = mkdtemp(prefix="classifier-emergence-")  # what goes to the disk in another precision than it is stored in
    atexit.register(shutil.rmtree, offload, ignore_errors=True)
    return {"dtype": placement.dtype, "device_map": "auto", "offload_folder": offload}
