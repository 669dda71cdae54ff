"""Texts that pass through a model as one row: no padding, and what several texts begin with passes once.

Source: a batch of texts as one tree, whose nodes see their ancestors, is SpecInfer, Miao et al. (2023),
arXiv:2305.09781; prompts that a group shares pass once in Prefix Grouper, Liu et al. (2025), arXiv:2506.05433.
"""

import itertools
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from classifier_emergence.errors import InputError
from classifier_emergence.reading.readout import device_of

BATCH_TOKENS = 256  # more gains nothing on two cores, and every token is compared with every other
LARGEST_TREE = 2048  # nodes of one row, for the same reason
MASKED = {"sdpa", "eager"}
"""Attention that takes a mask as it stands."""
MASKABLE = {"full_attention", "sliding_attention", "global"}
"""Layers to which such a mask is all that a text is; a recurrent one would go through a row from left to right, and
GPT-Neo's local ones look back along the row."""
TRIED = ([1, 2, 3], [1, 4, 5, 2])
"""Texts of the trial in ``follows_masks``."""


class Tree:
    """A node for every token of some texts, once for all texts that begin alike.

    A node sees its ancestors and itself, at the position that it has in its texts. So it gets the state that it would
    get in each of them, and its gradient is the sum of theirs.

    Args:
        texts: Token ids.
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.ids: list[int] = []
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._known: dict[tuple[int, int], int] = {}
        self.paths = [self._path(text) for text in texts]
        """The nodes of every text, in order."""

    def _path(self, text: Sequence[int]) -> list[int]:
        path: list[int] = []
        for token in text:
            path.append(self.child(path[-1] if path else -1, token))
        return path

    def child(self, parent: int, token: int) -> int:
        """The node of a token after a node (-1: at the start of a text), a new one if there is none."""
        node = self._known.setdefault((parent, token), len(self.ids))
        if node == len(self.ids):
            self.ids.append(token)
            self._parents.append(parent)
            self._depths.append(self._depths[parent] + 1 if parent >= 0 else 0)
        return node

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether a row of all nodes is worth its comparisons, and the model can take it."""
        return len(self.ids) <= LARGEST_TREE and takes_trees(model, 1 + max(self._depths))

    def pad(self, width: int) -> None:
        """Add nodes of no text, each of which sees itself alone, until there are ``width``."""
        padding = width - len(self.ids)
        self.ids += [0] * padding
        self._parents += [-1] * padding
        self._depths += [0] * padding

    def inputs(self, model: PreTrainedModel, start: int = 0) -> dict[str, Tensor]:
        """What the model's decoder is given to pass the nodes from ``start`` on; those before are in its cache.

        Returns:
            ``input_ids`` and ``position_ids`` (1, nodes); ``attention_mask`` (1, 1, nodes, all nodes), added to scores.
        """
        rows, columns = [], []
        for node in range(start, len(self.ids)):
            ancestor = node
            while ancestor >= 0:
                rows.append(node - start)
                columns.append(ancestor)
                ancestor = self._parents[ancestor]
        seen = torch.zeros(len(self.ids) - start, len(self.ids), dtype=torch.bool)
        seen[rows, columns] = True
        return row_inputs(self.ids[start:], self._depths[start:], seen, model)


def row_inputs(ids: list[int], positions: list[int], seen: Tensor, model: PreTrainedModel) -> dict[str, Tensor]:
    """A decoder's inputs for tokens in one row, ``seen`` (tokens, all tokens) saying what each of them attends to."""
    mask = torch.full(seen.shape, torch.finfo(model.dtype).min, dtype=model.dtype).masked_fill(seen, 0)
    device = device_of(model)
    return {
        "input_ids": torch.tensor([ids], device=device),
        "attention_mask": mask[None, None].to(device),  # a 4-D mask is taken as it stands, and added to scores
        "position_ids": torch.tensor([positions], device=device),
    }


def check_tokens(ids: Sequence[int], model: PreTrainedModel) -> None:
    """Refuse token ids that the model has no embedding for.

    Raises:
        InputError: There is one; names it and the size of the vocabulary.
    """
    known = model.get_input_embeddings().get_parameter("weight").shape[0]
    if ids and max(ids) >= known:
        raise InputError(
            f"token {max(ids)}: the model's vocabulary has {known} tokens; the tokenizer knows more, so call "
            "model.resize_token_embeddings(len(tokenizer))"
        )


def last_states(inputs: dict[str, Tensor], model: PreTrainedModel) -> Tensor:
    """(batch * width, d) normed last states of one pass through a model's decoder."""
    states: Tensor = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    return states.flatten(0, 1)


def takes_trees(model: PreTrainedModel, length: int) -> bool:
    """Whether the model's layers go by a mask of ours alone, and none looks back less far than ``length`` tokens."""
    window = getattr(model.config.get_text_config(), "sliding_window", None) or length
    return length <= window and follows_masks(model)


def follows_masks(model: PreTrainedModel) -> bool:
    """Whether positions and a mask decide what a token sees, wherever in a row it stands.

    Recurrent layers go through a row from left to right, some families count positions along it (ALiBi), others build
    masks of their own. What the configuration does not say is tried, once a model, on two short texts.
    """
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or MASKABLE)
    if not (layers <= MASKABLE and config._attn_implementation in MASKED):
        return False
    if model not in _follows:
        _follows[model] = _trial(model)
    return _follows[model]


_follows: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


@torch.no_grad()
def _trial(model: PreTrainedModel) -> bool:
    """Whether two texts that pass as a tree get the states that they get alone."""
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout would not repeat
    try:
        size = model.get_input_embeddings().get_parameter("weight").shape[0]
        texts = [[token % size for token in text] for text in TRIED]
        tree = Tree(texts)
        together = last_states(tree.inputs(model), model)
        for text, path in zip(texts, tree.paths, strict=True):
            alone = last_states({"input_ids": torch.tensor([text], device=device_of(model))}, model)
            gap = (together[path] - alone).float().norm() / alone.float().norm()
            if not gap <= 16 * torch.finfo(model.dtype).eps ** 0.75:  # rounding; what is wrong is far above it
                return False
    except Exception:  # a family that takes no such mask or positions stumbles over them in its own way
        return False
    finally:
        for module in training:
            module.training = True
    return True


def one_pass(texts: Sequence[Sequence[int]], model: PreTrainedModel) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Texts as inputs of one pass through a model's decoder: as a tree, or where that does not fit padded.

    Returns:
        The inputs, and for every text where its tokens stand among the flattened states (batch * width, d).

    Raises:
        InputError: See ``check_tokens``.
    """
    inputs, (paths,), _ = joint_pass([texts], model)
    return inputs, paths


def joint_pass(
    groups: Sequence[Sequence[Sequence[int]]], model: PreTrainedModel
) -> tuple[dict[str, Tensor], list[list[list[int]]], list[int]]:
    """Groups of texts as inputs of one pass, no row of which holds texts of two groups.

    Returns:
        The inputs; for every text of every group where its tokens stand among the flattened states (batch * width, d);
        and the number of rows of each group, which stand in order.

    Raises:
        InputError: See ``check_tokens``.
    """
    check_tokens([max(text) for texts in groups for text in texts if text], model)
    trees = [Tree(texts) for texts in groups]
    if all(tree.fits(model) for tree in trees):
        inputs = side_by_side(trees, model)
        width = len(trees[0].ids)
        paths = [[[row * width + node for node in path] for path in tree.paths] for row, tree in enumerate(trees)]
        return inputs, paths, [1] * len(trees)
    rows = [text for texts in groups for text in texts]
    width = max(map(len, rows))
    # Padding is on the right, so no token can see it.
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in rows], device=device_of(model))
    starts = itertools.count(0, width)
    padded = [
        [list(range(start, start + len(text))) for text, start in zip(texts, starts, strict=False)] for texts in groups
    ]
    return {"input_ids": ids}, padded, [len(texts) for texts in groups]


def side_by_side(trees: Sequence[Tree], model: PreTrainedModel, start: int = 0) -> dict[str, Tensor]:
    """What the decoder is given to pass trees, padded to one width, as a row each; see ``Tree.inputs``."""
    for tree in trees:
        tree.pad(max(len(tree.ids) for tree in trees))
    parts = [tree.inputs(model, start) for tree in trees]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def batches(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of texts, in batches of at most ``BATCH_TOKENS`` nodes; texts that begin alike come together."""
    batch: list[int] = []
    nodes = 0
    for i in sorted(range(len(texts)), key=lambda i: list(texts[i])):
        new = len(texts[i]) - (_alike(texts[batch[-1]], texts[i]) if batch else 0)
        if batch and nodes + new > BATCH_TOKENS:
            yield batch
            batch, nodes, new = [], 0, len(texts[i])
        batch.append(i)
        nodes += new
    if batch:
        yield batch


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens that two texts begin with."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
