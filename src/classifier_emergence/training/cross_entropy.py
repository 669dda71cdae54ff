"""Cross-entropy under a large unembedding without its logits: loss and gradient in one pass over the vocabulary."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from classifier_emergence.reading.readout import Readout

BLOCK_TOKENS = 2048  # rows of the unembedding that stay in cache between the two products that read them


def cross_entropy(normed: Tensor, readout: Readout, target: Tensor) -> Tensor:
    """Cross-entropy of target tokens under the readout, (rows,), in nats.

    Equal to ``F.cross_entropy(readout.unembed(normed), target, reduction="none")``. On a CPU both directions together
    read the unembedding once, block by block with a running softmax, and no logits outlive their block: for a few rows
    of a large vocabulary memory is the cost, not arithmetic.

    Args:
        normed: (rows, d) states after the final norm.
        readout: Frozen.
        target: (rows,) token ids.

    Source: the running softmax is that of Milakov and Gimelshein (2018), arXiv:1805.02867; loss and gradient in one
    pass is the idea of cut cross-entropy, Wijmans et al. (2024), arXiv:2411.09009.
    """
    if readout.softcap is not None or normed.device.type != "cpu":
        return functional.cross_entropy(readout.unembed(normed), target, reduction="none")
    losses: Tensor = _CrossEntropy.apply(normed.float(), readout, target)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, normed: Tensor, readout: Readout, target: Tensor) -> Tensor:
        n, (vocabulary, d) = len(normed), readout.weight.shape
        top, total = torch.full((n,), -torch.inf), torch.zeros(n)
        learning = context.needs_input_grad[0]
        mean_row = torch.zeros(n, d)  # softmax @ W_U, up to normalisation
        buffer = torch.empty(n, BLOCK_TOKENS)
        for start in range(0, vocabulary, BLOCK_TOKENS):
            block = slice(start, min(start + BLOCK_TOKENS, vocabulary))
            logits = readout.unembed(normed, block, out=buffer[:, : block.stop - start])
            higher = torch.maximum(top, logits.amax(-1))
            shrink = (top - higher).exp()
            # e^-40 adds nothing to a sum of at least 1; far below it products turn into denormal numbers, which crawl.
            shares = logits.sub_(higher[:, None]).clamp_(min=-40).exp_()
            total = total * shrink + shares.sum(-1)
            if learning:
                mean_row.mul_(shrink[:, None]).addmm_(shares, readout.rows(block))
            top = higher
        rows = readout.rows(target)
        wanted = (normed * rows).sum(-1)
        if readout.bias is not None:
            wanted = wanted + readout.bias[target]
        if learning:
            context.save_for_backward((mean_row / total[:, None] - rows) / readout.divisor)
        return top + total.log() - wanted / readout.divisor

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = context.saved_tensors
        return gradient * upstream[0][:, None], None, None
