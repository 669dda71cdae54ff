"""A causal language model in memory, with what its readings need."""

from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model, its tokenizer and the name that results carry."""

    key: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
