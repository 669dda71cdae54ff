"""GGUF files, as llama.cpp writes them: read by transformers, with the weights of their blocks dequantised."""

import math
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from classifier_emergence.errors import InputError, first_line
from classifier_emergence.progress import no_bars_in_logs


def read_gguf(file: Path, **placement: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer of a GGUF file.

    The weights are the dequantised blocks of the file; embeddings are tied or not as the file has them.

    Args:
        file: ``*.gguf``.
        placement: What else ``from_pretrained`` is told: dtype, device.

    Raises:
        InputError: transformers cannot read the file, or weights of the architecture are missing in it.
        ModuleNotFoundError: gguf or accelerate is not installed.

    Example:
        >>> model, tokenizer = read_gguf(Path("small.gguf"), dtype=torch.float32)
    """
    import accelerate  # noqa: F401  # transformers reads no GGUF without it, but names it in an ImportError of its own
    from gguf import GGUFReader

    with no_bars_in_logs():
        try:
            pair: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, output_loading_info=True, **placement
            )
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except OSError:  # the disk, not the file
            raise
        except Exception as error:  # of any type for a bad file: tokenizers raises Exception itself
            advice = "choose another model"
            raise InputError(f"transformers cannot read the GGUF ({first_line(error)}); {advice}") from error
    model, report = pair
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"the GGUF lacks {', '.join(missing[:3])}; choose another model")
    splitting = GGUFReader(file).get_field("tokenizer.ggml.pre")
    # transformers reads the byte-pair tokenizer of a Llama GGUF as GPT-2's. SmolLM's takes digits out one by
    # one before GPT-2's rule sees the text; without that, white space before a number is cut elsewhere.
    if splitting is not None and splitting.contents() == "smollm":
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    # The weights are plain by now, but transformers leaves its GGUF quantizer on the model, which refuses to be saved.
    model.hf_quantizer = None
    del model.config.quantization_config
    return model, tokenizer


def values_in_gguf(file: Path) -> int:
    """How many weights a GGUF file holds, from its header.

    Raises:
        InputError: It is no GGUF file.
        ModuleNotFoundError: gguf is not installed.
    """
    from gguf import GGUFReader

    try:
        return sum(math.prod(map(int, tensor.shape)) for tensor in GGUFReader(file).tensors)
    except Exception as error:  # of any type for a bad file
        raise InputError(f"{file} is no readable GGUF ({first_line(error)}); download it again") from error
