"""The Jacobian lens: a state is read through what it does, to first order, to the last layer here and later.

``lens_l(h) = softmax(W_U norm(J_l h))`` with J_l the mean, over texts and source positions t, of the Jacobians of the
last block's states at all positions t' >= t by the state at t after block l, summed over t'. J_l = I is the logit lens.

Source: Gurnee et al. (2026), Verbalizable Representations Form a Global Workspace in Language Models, Transformer
Circuits Thread; the estimator is that of the authors' code (github.com/anthropics/jacobian-lens).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from classifier_emergence.errors import InputError
from classifier_emergence.progress import progress
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.readout import device_of
from classifier_emergence.reading.residuals import first_tensor, removing

TOGETHER = 16
"""Copies of a text in one pass, a cotangent each; more do not fit into cache."""


def jacobian(
    lm: LanguageModel,
    ids: Sequence[int],
    *,
    skip: int,
    directions: Tensor | None = None,
    description: str | None = None,
) -> Tensor:
    """The mean Jacobian of one text at every layer: one forward pass, and a backward one for every few outputs.

    A cotangent stands at all target positions at once: by causality the gradient at t is the sum over t' >= t.

    Args:
        lm: In evaluation mode, its parameters frozen; the adapter that it carries, if any, is on.
        ids: Of the text.
        skip: So many leading positions are neither sources nor targets, as they attract attention whatever they hold;
            nor is the last one.
        directions: (k, d) of the last layer's space: what of it is read; default all of it, a coordinate each.
        description: Shown with the progress bar.

    Returns:
        (n_layers + 1, k, d): ``directions @ J_l`` for every row of the residual stream; of the last, ``directions``.

    Raises:
        InputError: The text has no position but those left out.
    """
    at = slice(skip, len(ids) - 1)
    if at.start >= at.stop:
        raise InputError(f"text of {len(ids)} tokens: none is left between the first {skip} and the last")
    rows = torch.eye(lm.model.config.get_text_config().hidden_size) if directions is None else directions.float()
    sources, target = _pass(lm, [list(ids)] * min(TOGETHER, len(rows)))
    found = rows.new_empty(len(sources) + 1, *rows.shape)
    found[-1] = rows
    with progress(description, total=len(rows)) as advance:
        for start in range(0, len(rows), TOGETHER):
            part = rows[start : start + TOGETHER]
            cotangents = torch.zeros_like(target)
            cotangents[: len(part), at] = part.to(target)[:, None]
            gradients = torch.autograd.grad(target, sources, cotangents, retain_graph=True)
            for row, gradient in enumerate(gradients):
                found[row, start : start + len(part)] = gradient[: len(part), at].mean(1).float().cpu()
            advance(len(part))
    return found


def _pass(lm: LanguageModel, texts: Sequence[Sequence[int]]) -> tuple[list[Tensor], Tensor]:
    """States (texts, length, d) of one pass with what leads from each to the last: all but the last, and the last."""
    states: list[Tensor] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        first = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        states.append(first)
        return ((first, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": first})

    blocks = lm.blocks
    handles = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [block.register_forward_hook(lambda *call: states.append(first_tensor(call[-1]))) for block in blocks]
    with torch.enable_grad(), removing(handles):
        lm.model.get_decoder()(input_ids=torch.tensor(texts, device=device_of(lm.model)), use_cache=False)
    return states[:-1], states[-1]
