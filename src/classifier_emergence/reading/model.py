"""A causal language model in memory, with the parts that every reading needs."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from classifier_emergence.reading.layers import layer_labels
from classifier_emergence.reading.readout import Readout, check_readout, decoder_blocks, find_readout


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model of transformers, its tokenizer and the name that results carry.

    The parts are looked up when they are asked for, so that they are those of the model as it is now: with the adapter
    that it carries, if any, and with the weights that training has put into it.

    Example:
        >>> lm = LanguageModel("mine", model, tokenizer)
        >>> lm.layers[:2], lm.readout.weight.shape
        (['emb', 'L0'], torch.Size([49152, 576]))
    """

    key: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, in order; see ``readout.decoder_blocks`` for what is refused."""
        return decoder_blocks(self.model)

    @property
    def readout(self) -> Readout:
        """Final norm and unembedding; checked against the model's own output when a model is first asked for it.

        See ``readout.find_readout`` and ``readout.check_readout`` for what is refused.
        """
        found = find_readout(self.model)
        if not self.model.training:  # dropout would not repeat
            check_readout(self.model, found, self.tokenizer("7 * 8 =")["input_ids"])
        return found

    @property
    def n_layers(self) -> int:
        """Number of blocks; a residual stream has one row more."""
        return len(self.blocks)

    @property
    def layers(self) -> list[str]:
        """Labels of the rows of a residual stream: ``emb``, ``L0`` ... ``L{n_layers - 1}``."""
        return layer_labels(self.n_layers)
