"""Loading a language model with its tokenizer: float32, evaluation mode, frozen."""

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from classifier_emergence.errors import InputError
from classifier_emergence.models.registry import ModelSource, PathSource, source_of
from classifier_emergence.models.sources import fetch
from classifier_emergence.reading.lens import check_lens
from classifier_emergence.reading.model import LanguageModel


def load(name: str, registry: dict[str, ModelSource]) -> LanguageModel:
    """Load a registered model or a local folder; fetch it first if need be.

    The model is float32 with SDPA attention, in evaluation mode, without gradients. The tokenizer pads on the
    left and has a padding token. Code from a model repository is never run.

    Args:
        name: A key of ``registry``, or the path of a folder in the Hugging Face layout.
        registry: Models by key, as ``params.load_params`` gives them.

    Raises:
        InputError: The name is unknown, the weights cannot be had (see ``sources.fetch``), are quantised or
            incomplete, the architecture is unknown to transformers, or there is no token to pad with.
    """
    if name not in registry and (Path(name).is_dir() or "/" in name):
        key, source = Path(name).resolve().name, PathSource(source="path", path=name)
        folder = fetch(key, source)
    else:
        key = name
        folder = fetch(key, source_of(key, registry))
    try:
        with _quiet():
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Progress bars belong on a terminal, not in a log.
    hide = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if hide:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            logging.enable_progress_bar()
