"""Completions drawn and scored; what several texts begin with passes through the model once.

Source: prompts that a group shares pass once in Prefix Grouper, Liu et al. (2025), arXiv:2506.05433; a batch of texts
as one tree, whose nodes see their ancestors, in SpecInfer, Miao et al. (2023), arXiv:2305.09781.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.kernels import ChunkedLogProbFunction

from classifier_emergence.errors import InputError
from classifier_emergence.readout import Readout, find_readout
from classifier_emergence.residuals import shared_start

BLOCK_TOKENS = 4096  # vocabulary rows whose logits are held at once: they stay in cache
LARGEST_TREE = 2048  # nodes; every node is compared with every other


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    rows: Sequence[int],
    *,
    new_tokens: int,
    temperature: float,
    stop: Sequence[int],
) -> list[list[int]]:
    """Draw completions, several of a prompt from one pass over it.

    Args:
        model: Base model; the adapter that it carries, if any, is on.
        prompts: Token ids.
        rows: For each completion the prompt that it answers.
        new_tokens: Completions end here at the latest.
        temperature: Logits are divided by it.
        stop: Tokens that end a completion; they are part of it.

    Returns:
        Token ids of each completion, drawn with torch's global generator.

    Raises:
        InputError: The model's logits are not finite.
    """
    decoder, readout, device = model.get_decoder(), find_readout(model), model.device
    width, at = max(map(len, prompts)), torch.tensor(rows, device=device)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=device)
    seen, mask = _read_prompts(decoder, ids, mask)
    cache = seen.past_key_values
    cache.batch_select_indices(at)
    state, mask, position = seen.last_hidden_state[at, -1], mask[at], mask.sum(-1, keepdim=True)[at]
    ends = torch.tensor(list(stop), device=device)
    going = torch.arange(len(rows), device=device)  # what has ended does not pass any more
    drawn: list[Tensor] = []
    while True:
        logits = readout.unembed(state).float() / temperature
        if not logits.isfinite().all():
            raise InputError("model: its logits are not finite; if it is in training, choose a smaller learning_rate")
        # As many random numbers as if all went on, so that a completion does not depend on when others end.
        odds = torch.ones(len(rows), logits.shape[1], device=device)
        odds[going] = logits.softmax(-1)
        token = torch.multinomial(odds, 1)
        drawn.append(token)
        on = ~torch.isin(token[going, 0], ends)
        if not on.any() or len(drawn) == new_tokens:
            break
        if not on.all():
            cache.batch_select_indices(on.nonzero()[:, 0])
            going, mask, position = going[on], mask[on], position[on]
        token = token[going]
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        state = _decode(decoder, token, mask, position, cache).last_hidden_state[:, -1]
        position = position + 1
    texts: list[list[int]] = torch.cat(drawn, dim=1).tolist()
    return [text[: next((i + 1 for i, t in enumerate(text) if t in set(stop)), len(text))] for text in texts]


def line_ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that hold a line break, as byte-level, SentencePiece and byte-fallback vocabularies spell it."""
    return sorted(i for token, i in tokenizer.get_vocab().items() if "\n" in token or "Ċ" in token or token == "<0x0A>")


class Tree:
    """Texts that pass through a model as one row: a node for every token, once for all texts that begin alike.

    A node sees its ancestors and itself, at the position that it has in its texts. So it gets the state that it would
    get in each of them, and its gradient is the sum of theirs.

    Args:
        texts: Token ids.
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.ids: list[int] = []
        self.paths: list[list[int]] = []
        """The nodes of every text, in order."""
        self._parents: list[int] = []
        self._depths: list[int] = []
        known: dict[tuple[int, int], int] = {}
        for text in texts:
            path: list[int] = []
            for depth, token in enumerate(text):
                parent = path[-1] if path else -1
                node = known.setdefault((parent, token), len(self.ids))
                if node == len(self.ids):
                    self.ids.append(token)
                    self._parents.append(parent)
                    self._depths.append(depth)
                path.append(node)
            self.paths.append(path)

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether one row of all nodes is worth it, and no attention of the model looks back less far than a text."""
        window = getattr(model.config.get_text_config(), "sliding_window", None) or LARGEST_TREE
        return len(self.ids) <= LARGEST_TREE and max(self._depths) < window

    def states(self, model: PreTrainedModel) -> Tensor:
        """(nodes, d) normed last states."""
        seen = torch.eye(len(self.ids), dtype=torch.bool)
        for node, parent in enumerate(self._parents):  # parents come before their children
            if parent >= 0:
                seen[node] |= seen[parent]
        hidden = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
        output = model.get_decoder()(
            input_ids=torch.tensor([self.ids], device=model.device),
            attention_mask=hidden[None, None].to(model.device),
            position_ids=torch.tensor([self._depths], device=model.device),
            use_cache=False,
        )
        found: Tensor = output.last_hidden_state[0]
        return found


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The token ids of every row without its padding."""
    return [row[kept == 1].tolist() for row, kept in zip(ids, mask, strict=True)]


def sequence_log_probs(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """(rows, width - 1) log-probability of every token given those before, 0 for padding and the first token."""
    tree = Tree(unpadded(ids, mask))
    asked = (mask[:, 1:] == 1) & (mask[:, :-1] == 1)
    # Every node but the first of a text is scored once, at its parent, however many texts it belongs to.
    steps = [pair for path in tree.paths for pair in itertools.pairwise(path)]
    distinct = list(dict.fromkeys(steps))
    parents, nodes = torch.tensor(distinct, device=ids.device).T
    tokens = torch.tensor(tree.ids, device=ids.device)[nodes]
    found, _ = token_log_probs(tree.states(model)[parents], live_readout(model), tokens)
    place = {pair: i for i, pair in enumerate(distinct)}
    values = found[torch.tensor([place[pair] for pair in steps], device=ids.device)]
    return torch.zeros(asked.shape, device=found.device).masked_scatter(asked, values)


def _read_prompts(decoder: Any, ids: Tensor, mask: Tensor) -> tuple[Any, Tensor]:
    """The decoder's output at left-padded prompts, its cache complete, and the mask of that cache.

    Where the prompts begin alike, the output is that at the tokens after, and padding stands between the two.
    """
    texts = unpadded(ids, mask)
    shared = shared_start(texts)
    if not shared:
        return _decode(decoder, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)), mask
    first = decoder(input_ids=torch.tensor([texts[0][:shared]], device=ids.device), use_cache=True)
    cache = first.past_key_values
    cache.batch_repeat_interleave(len(texts))
    later = mask.clone()
    for row, text in zip(later, texts, strict=True):
        row[: ids.shape[1] - len(text) + shared] = 0
    seen = torch.cat([torch.ones_like(mask[:, :shared]), later[:, shared:]], dim=1)
    positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, shared:]
    return _decode(decoder, ids[:, shared:], seen, positions, cache), seen


def _decode(decoder: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any = None) -> Any:
    return decoder(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)


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


def live_readout(model: PreTrainedModel) -> Readout:
    """The readout, its unembedding with the gradient that ``find_readout`` cuts off."""
    head: Any = model.get_output_embeddings()
    return replace(find_readout(model), weight=head.weight, bias=getattr(head, "bias", None))


def base_of(model: Any) -> PreTrainedModel:
    """The model itself, without the wrapper of its adapter."""
    found: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base: PreTrainedModel = found
    return base
