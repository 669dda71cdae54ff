"""Completions drawn and scored; what several texts begin with passes through the model once."""

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from trl.kernels import ChunkedLogProbFunction

from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.readout import Readout
from classifier_emergence.reading.tree import Tree, last_states, one_pass, side_by_side, takes_trees
from classifier_emergence.training.adapters import each_its_own

BLOCK_TOKENS = 4096  # vocabulary rows whose logits are held at once: they stay in cache


@dataclass(frozen=True)
class Draws:
    """What is drawn for one run."""

    prompts: Sequence[list[int]]
    """Token ids."""
    rows: Sequence[int]
    """For each completion the prompt that it answers."""
    generator: torch.Generator
    adapter: str | None = None
    """That draws, where several are on the model; else the one that is on."""


def generator_of(seed: int, step: int, device: torch.device) -> torch.Generator:
    """The random numbers of one step of one run: nothing of them need be kept in a checkpoint."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


@torch.no_grad()
def draw_completions(
    lm: LanguageModel,
    draws: Sequence[Draws],
    *,
    new_tokens: int,
    temperature: float,
    stop: Sequence[int],
    wrapped: PeftModel | None = None,
) -> list[list[list[int]]]:
    """Draw completions: prompts and what is drawn after them grow as one tree for each run.

    Args:
        lm: The model.
        draws: Of runs that are made together; what is drawn for one does not depend on the others.
        new_tokens: Completions end here at the latest.
        temperature: Logits are divided by it.
        stop: Tokens that end a completion; they are part of it.
        wrapped: The model with the adapters that ``draws`` name.

    Returns:
        Token ids of each completion of each run.

    Raises:
        InputError: A text would be longer than what the model attends to at once, or its logits are not finite.
    """
    model, longest = lm.model, max(len(prompt) for draw in draws for prompt in draw.prompts) + new_tokens
    if not takes_trees(model, longest):
        raise InputError(
            f"prompts: with {new_tokens} new tokens {longest} tokens, more than the model attends to at once"
        )
    growths, readout = [_Growth(draw) for draw in draws], lm.readout
    cache = DynamicCache()  # not the model's own: a sliding window forgets nodes, not positions
    states = torch.empty(len(draws), 0, readout.weight.shape[1], dtype=model.dtype, device=model.device)
    adapters = [draw.adapter for draw in draws if draw.adapter is not None]
    with each_its_own(wrapped, adapters) if wrapped is not None else nullcontext():
        for _ in range(new_tokens):
            states = _grown(model, growths, states, cache)
            for growth, logits in zip(growths, _next_logits(readout, growths, states, temperature), strict=True):
                growth.draw(logits, stop)
            if not any(growth.going for growth in growths):
                break
    return [growth.texts for growth in growths]


class _Growth:
    """The tree of one run's prompts and of what is drawn after them."""

    def __init__(self, draws: Draws) -> None:
        self.generator, self.tree = draws.generator, Tree(draws.prompts)
        self.at = [self.tree.paths[row][-1] for row in draws.rows]  # the node of every completion's last token
        self.texts: list[list[int]] = [[] for _ in draws.rows]
        self.going = list(range(len(draws.rows)))  # what has ended does not pass any more

    def ends(self) -> list[int]:
        """The nodes to draw after: completions that are alike so far are one."""
        return sorted({self.at[i] for i in self.going})

    def draw(self, logits: Tensor, stop: Sequence[int]) -> None:
        """Draw a token after each of the ends, by its logits."""
        if not self.going:
            return
        # As many random numbers as if all went on, so that a completion does not depend on when others end.
        odds = torch.ones(len(self.at), logits.shape[1], device=logits.device)
        row_of = {node: row for row, node in enumerate(self.ends())}
        odds[self.going] = logits.softmax(-1)[[row_of[self.at[i]] for i in self.going]]
        token: list[int] = torch.multinomial(odds, 1, generator=self.generator)[:, 0].tolist()
        for i in self.going:
            self.texts[i].append(token[i])
        self.going = [i for i in self.going if token[i] not in stop]
        for i in self.going:
            self.at[i] = self.tree.child(self.at[i], token[i])


def _grown(model: PreTrainedModel, growths: Sequence[_Growth], states: Tensor, cache: DynamicCache) -> Tensor:
    """(runs, nodes, d) normed last states of all nodes, from those that have passed."""
    trees, passed = [growth.tree for growth in growths], states.shape[1]
    if all(len(tree.ids) == passed for tree in trees):
        return states
    inputs = side_by_side(trees, model, passed)
    new = model.get_decoder()(**inputs, past_key_values=cache, use_cache=True).last_hidden_state
    return torch.cat([states, new], dim=1)


def _next_logits(readout: Readout, growths: Sequence[_Growth], states: Tensor, temperature: float) -> Sequence[Tensor]:
    """(ends, vocabulary) logits of what follows the ends of each run."""
    ends = [growth.ends() for growth in growths]
    rows = torch.cat([own[nodes] for own, nodes in zip(states, ends, strict=True)])
    logits: Tensor = readout.unembed(rows).float() / temperature
    if not logits.isfinite().all():
        raise InputError("model: its logits are not finite; if it is in training, choose a smaller learning_rate")
    return torch.split(logits, [len(nodes) for nodes in ends])


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
