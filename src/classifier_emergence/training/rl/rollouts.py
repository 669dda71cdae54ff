"""Completions drawn and scored; what several texts begin with passes through the model once."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from trl.kernels import ChunkedLogProbFunction

from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.readout import Readout
from classifier_emergence.reading.tree import Tree, last_states, one_pass, takes_trees

BLOCK_TOKENS = 4096  # vocabulary rows whose logits are held at once: they stay in cache


@torch.no_grad()
def draw_completions(
    lm: LanguageModel,
    prompts: Sequence[list[int]],
    rows: Sequence[int],
    *,
    new_tokens: int,
    temperature: float,
    stop: Sequence[int],
) -> list[list[int]]:
    """Draw completions: prompts and what is drawn after them grow as one tree.

    Args:
        lm: The adapter that it carries, if any, is on.
        prompts: Token ids.
        rows: For each completion the prompt that it answers.
        new_tokens: Completions end here at the latest.
        temperature: Logits are divided by it.
        stop: Tokens that end a completion; they are part of it.

    Returns:
        Token ids of each completion, drawn with torch's global generator.

    Raises:
        InputError: A text would be longer than what the model attends to at once, or its logits are not finite.
    """
    model, longest = lm.model, max(map(len, prompts)) + new_tokens
    if not takes_trees(model, longest):
        raise InputError(
            f"prompts: with {new_tokens} new tokens {longest} tokens, more than the model attends to at once"
        )
    decoder, readout, device = model.get_decoder(), lm.readout, model.device
    tree, cache = Tree(prompts), DynamicCache()  # not the model's own: a sliding window forgets nodes, not positions
    at = [tree.paths[row][-1] for row in rows]  # the node of every completion's last token
    texts: list[list[int]] = [[] for _ in rows]
    going = list(range(len(rows)))  # what has ended does not pass any more
    states = torch.empty(0, readout.weight.shape[1], dtype=model.dtype, device=device)  # of all nodes so far
    for _ in range(new_tokens):
        if len(tree.ids) > len(states):
            inputs = tree.inputs(model, len(states))
            new = decoder(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[0]
            states = torch.cat([states, new])
        distinct = sorted({at[i] for i in going})  # completions that are alike so far are one node
        logits = readout.unembed(states[distinct]).float() / temperature
        if not logits.isfinite().all():
            raise InputError("model: its logits are not finite; if it is in training, choose a smaller learning_rate")
        # As many random numbers as if all went on, so that a completion does not depend on when others end.
        odds = torch.ones(len(rows), logits.shape[1], device=device)
        row_of = {node: row for row, node in enumerate(distinct)}
        odds[going] = logits.softmax(-1)[[row_of[at[i]] for i in going]]
        token: list[int] = torch.multinomial(odds, 1)[:, 0].tolist()
        for i in going:
            texts[i].append(token[i])
        going = [i for i in going if token[i] not in stop]
        if not going:
            break
        for i in going:
            at[i] = tree.child(at[i], token[i])
    return texts


def line_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that hold a line break, as byte-level, SentencePiece and byte-fallback vocabularies spell it."""
    return sorted(i for token, i in tokenizer.get_vocab().items() if "\n" in token or "Ċ" in token or token == "<0x0A>")


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The token ids of every row without its padding."""
    return [row[kept == 1].tolist() for row, kept in zip(ids, mask, strict=True)]


def sequence_log_probs(
    lm: LanguageModel, ids: Tensor, mask: Tensor, passed: tuple[Tree, Tensor] | None = None
) -> Tensor:
    """(rows, width - 1) log-probability of every token given those before, 0 for padding and the first token.

    Args:
        lm: The adapter that it carries, if any, is on.
        ids: (rows, width) padded on either side.
        mask: 0 for padding.
        passed: The tree of these texts and its normed last states, if the texts have passed already.
    """
    if passed is None:
        inputs, paths = one_pass(unpadded(ids, mask), lm.model)
        tokens, states = inputs["input_ids"].flatten(), last_states(inputs, lm.model)
    else:
        tree, states = passed
        paths, tokens = tree.paths, torch.tensor(tree.ids, device=ids.device)
    asked = (mask[:, 1:] == 1) & (mask[:, :-1] == 1)
    # Every token but the first of a text is scored once, at the one before it, however many texts it belongs to.
    steps = [pair for path in paths for pair in itertools.pairwise(path)]
    distinct = list(dict.fromkeys(steps))
    before, at = torch.tensor(distinct, device=ids.device).T
    log_probs, _ = token_log_probs(states[before], live_readout(lm), tokens[at])
    index = {pair: i for i, pair in enumerate(distinct)}
    values = log_probs[torch.tensor([index[pair] for pair in steps], device=ids.device)]
    return torch.zeros(asked.shape, device=log_probs.device).masked_scatter(asked, values)


def token_log_probs(
    normed: Tensor, readout: Readout, target: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of target tokens and entropy of the distribution, (rows,) each, in nats."""
    log_probs, entropy, *_ = ChunkedLogProbFunction.apply(
        normed,
        readout.weight,
        readout.bias,
        target,
        temperature,
        BLOCK_TOKENS,
        readout.softcap,
        1 / readout.divisor,
        ("entropy",),
    )
    return log_probs, entropy


def live_readout(lm: LanguageModel) -> Readout:
    """The readout, its unembedding with the gradient that ``LanguageModel.readout`` cuts off."""
    head: Any = lm.model.get_output_embeddings()
    return replace(lm.readout, weight=head.weight, bias=getattr(head, "bias", None))


def base_of(model: Any) -> PreTrainedModel:
    """The model itself, without the wrapper of its adapter."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return base  # type: ignore[no-any-return]
