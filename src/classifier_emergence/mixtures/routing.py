"""Routing in use: which experts each token goes to, what they share with operations and tokens, and with the context.

Routers are hooked. Outputs of models are not read: most mixture-of-experts classes of transformers return no router
logits, and what some return has changed between versions. In transformers 5 the routers of Mixtral, OLMoE, Qwen2-MoE,
Qwen3-MoE, Granite-MoE and GPT-OSS are all classes named ``...TopKRouter`` whose forward gives the logits of all
experts, then the weights and numbers of those chosen; ``trace`` checks this on every batch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from classifier_emergence.errors import InputError
from classifier_emergence.progress import progress
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import removing
from classifier_emergence.statistics import Floats, bootstrap_mean, permutation_p

Outputs = tuple[Tensor, Tensor, Tensor]
BATCH_TOKENS = 512  # more gains nothing on two cores
REREAD_BATCH_TOKENS = 256  # when texts are read again: other batches, other rounding
ROUNDING = 1e-5  # relative: many times the rounding error of a softmax in 32 bits


@dataclass(frozen=True)
class Routing:
    """Where T tokens of some texts went at L layers with a router, k of E experts each."""

    layers: tuple[int, ...]
    """Numbers of the blocks."""
    experts: Tensor
    """(L, T, k) numbers of the chosen experts, the one with the largest logit first."""
    weights: Tensor
    """(L, T, k) factors of their outputs; they sum to 1, or to less where the family does not normalise."""
    n_experts: int
    token: Tensor
    """(T,) token ids."""
    text: Tensor
    """(T,) number of the text."""
    position: Tensor
    """(T,) position within the text."""

    @property
    def last(self) -> Tensor:
        """(texts,) the last token of every text, as an index into T."""
        ends: Tensor = (self.text[1:] != self.text[:-1]).nonzero()[:, 0]
        return torch.cat([ends, torch.tensor([len(self.text) - 1])])

    def shares(self) -> Tensor:
        """(L, T, E): weights spread over all experts and scaled to sum to 1: how much of a token an expert gets."""
        shape = (*self.experts.shape[:2], self.n_experts)
        return torch.zeros(shape).scatter(-1, self.experts, self.weights / self.weights.sum(-1, keepdim=True))


def routers(lm: LanguageModel) -> dict[int, nn.Module]:
    """Routers of a model by number of their block.

    Raises:
        InputError: There are none, or a block has several; names the model class.
    """
    by_block: dict[int, nn.Module] = {}
    for number, block in enumerate(lm.blocks):
        here = [module for module in block.modules() if type(module).__name__.endswith("TopKRouter")]
        if len(here) > 1:
            raise InputError(
                f"model {type(lm.model).__name__}: block {number} has {len(here)} routers; one is supported"
            )
        if here:
            by_block[number] = here[0]
    if not by_block:
        raise InputError(
            f"{lm.key} ({type(lm.model).__name__}): no module named ...TopKRouter; give a mixture of experts"
        )
    return by_block


@contextmanager
def hooked(lm: LanguageModel) -> Iterator[dict[int, Outputs]]:
    """Logits (tokens, E), weights and experts (tokens, k) of the last forward pass by block, with gradients.

    Raises:
        InputError: The model has no routers, or, in a forward pass, one gives something else.
    """
    outputs: dict[int, Outputs] = {}

    def keep(number: int, router: nn.Module, output: object) -> None:
        outputs[number] = _checked(output, type(router).__name__)

    handles = [
        router.register_forward_hook(lambda module, _, output, number=number: keep(number, module, output))
        for number, router in routers(lm).items()
    ]
    with removing(handles):
        yield outputs


def _checked(output: object, name: str) -> Outputs:
    if isinstance(output, tuple) and len(output) == 3 and all(isinstance(part, Tensor) for part in output):
        logits, weights, experts = output
        if weights.shape == experts.shape and len(logits) == len(experts) and not experts.is_floating_point():
            least = logits.gather(-1, experts).amin(-1, keepdim=True)
            # The k chosen are those with the largest logits: fewer than k lie above the least of them, but for a
            # rounding error, as routers choose by probabilities, which may be equal where logits are not quite.
            above = logits > least + ROUNDING * (1 + least.abs())
            if bool((above.sum(-1) < experts.shape[-1]).all()):
                return logits, weights, experts
    raise InputError(
        f"router {name}: gives no (logits, weights, experts); this version of transformers is not supported"
    )


@torch.no_grad()
def trace(
    lm: LanguageModel,
    texts: Sequence[Sequence[int]],
    *,
    batch_tokens: int = BATCH_TOKENS,
    description: str | None = None,
) -> Routing:
    """Experts and weights of every token of every text, at every layer with a router.

    Args:
        lm: A mixture of experts, in memory.
        texts: Token ids of each text. They are padded on the right, where a causal mask hides the padding.
        batch_tokens: Texts are read together up to so many tokens, padding included; 1 reads them one by one.
        description: Shown with the progress bar.

    Raises:
        InputError: A text is empty, or the model's routers are not understood (see ``hooked``).
    """
    if not texts or not all(texts):
        raise InputError("texts: none, or one without tokens; give every text some")
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts: dict[int, tuple[Tensor, Tensor]] = {}  # text -> experts and weights, (L, tokens, k)
    size = 0
    with progress(description, total=sum(map(len, texts))) as advance, hooked(lm) as seen:
        for batch in _batches(order, texts, batch_tokens):
            width = max(len(texts[i]) for i in batch)
            ids = torch.tensor([[*texts[i], *[0] * (width - len(texts[i]))] for i in batch], device=lm.model.device)
            lm.model.get_decoder()(input_ids=ids, use_cache=False)
            layers = sorted(seen)
            experts = torch.stack([seen[n][2] for n in layers]).unflatten(1, (len(batch), width)).cpu()
            weights = torch.stack([seen[n][1].float() for n in layers]).unflatten(1, (len(batch), width)).cpu()
            size = seen[layers[0]][0].shape[-1]
            for row, i in enumerate(batch):
                parts[i] = experts[:, row, : len(texts[i])], weights[:, row, : len(texts[i])]
            advance(sum(len(texts[i]) for i in batch))
    lengths = torch.tensor([len(text) for text in texts])
    return Routing(
        layers=tuple(layers),
        experts=torch.cat([parts[i][0] for i in range(len(texts))], dim=1),
        weights=torch.cat([parts[i][1] for i in range(len(texts))], dim=1),
        n_experts=size,
        token=torch.tensor([token for text in texts for token in text]),
        text=torch.arange(len(texts)).repeat_interleave(lengths),
        position=torch.cat([torch.arange(int(length)) for length in lengths]),
    )


def _batches(order: list[int], texts: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:  # ascending length: the newest text is the longest of its batch
        if batch and len(texts[i]) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(i)
    yield batch


# --- Usage ---


@dataclass(frozen=True)
class Usage:
    """How experts are used; arrays start with the layers."""

    load: Floats
    """(L, E) share of all tokens that an expert gets; 1 / E each if balanced."""
    load_entropy: Floats
    """(L,) entropy of the load over log E: 1 if balanced, 0 if one expert gets all."""
    token_entropy: Floats
    """(L,) mean entropy of a token's shares over log E: what is left undecided."""


def usage(routing: Routing) -> Usage:
    """Load and entropies of routing."""
    shares = routing.shares().double().numpy()
    load = shares.mean(1)
    scale = np.log(routing.n_experts)
    return Usage(load, _entropy(load) / scale, _entropy(shares).mean(-1) / scale)


@dataclass(frozen=True)
class Information:
    """Mutual information between expert and label at every layer, (L,), in bits."""

    bits: Floats
    shuffled_mean: Floats
    """Mean with labels shuffled: what finitely many examples give by chance."""
    shuffled_95: Floats
    p: Floats
    share: Floats
    """``(bits - shuffled_mean) / H(label)``: the part of the label that the expert tells."""
    label_bits: float
    """Entropy of the label."""
    n: int


def information(
    shares: Tensor, labels: ArrayLike, *, shuffles: int, seed: int, groups: ArrayLike | None = None
) -> Information:
    """Mutual information ``I(expert; label)`` with ``p(expert | example)`` given by the shares, against shuffles.

    Args:
        shares: (L, n, E), from ``Routing.shares``.
        labels: (n,) label of each example: its operation, or its token.
        shuffles: Random permutations of the labels.
        seed: Of the permutations.
        groups: (n,) group of each example whose members share a label (tokens of one text); labels are permuted
            between groups then, as members are no independent witnesses. Default: each its own.

    Raises:
        InputError: Lengths differ, there is one label only, or members of a group have different labels.
    """
    values, label = np.unique(np.asarray(labels), return_inverse=True)
    n = shares.shape[1]
    if label.shape != (n,) or n == 0:
        raise InputError(f"labels: shape {label.shape} for {n} examples; pass one for each")
    if len(values) < 2:
        raise InputError("labels: all are equal, so that experts can tell nothing of them; pass at least 2")
    _, first, member = np.unique(
        np.arange(n) if groups is None else np.asarray(groups), return_index=True, return_inverse=True
    )
    if not np.array_equal(label[first][member], label):
        raise InputError("groups: members of one group have different labels")
    random = np.random.default_rng(seed)
    of_group = label[first]
    arrangements = [label, *(of_group[random.permutation(len(first))][member] for _ in range(shuffles))]
    every = np.stack([_mutual_information(shares, torch.from_numpy(each), len(values)) for each in arrangements], -1)
    bits, null = every[:, 0], every[:, 1:]
    label_bits = float(_entropy(np.bincount(label) / n) / np.log(2))
    mean, high = null.mean(-1), np.quantile(null, 0.95, axis=-1)
    return Information(bits, mean, high, permutation_p(bits, null), (bits - mean) / label_bits, label_bits, n)


def _mutual_information(shares: Tensor, label: Tensor, n_labels: int) -> Floats:
    layers, n, experts = shares.shape
    joint = torch.zeros(layers, n_labels, experts, dtype=torch.float64).index_add(1, label, shares.double()) / n
    p = joint.numpy()
    both = _entropy(p.reshape(layers, -1))
    bits: Floats = (_entropy(p.sum(1)) + _entropy(p.sum(2)) - both) / np.log(2)
    return bits


def _entropy(p: Floats) -> Floats:
    """Over the last axis, in nats."""
    return np.asarray(-(p * np.log(np.where(p > 0, p, 1.0))).sum(-1))


# --- Context ---


@dataclass(frozen=True)
class ContextDependence:
    """How often a token's experts change; each array (L,) or (L, 2). A change of 1 keeps none of the k experts."""

    change: Floats
    """Mean share of a token's experts that another context of the same token does not choose."""
    interval: Floats
    """(L, 2) bootstrap interval over tokens."""
    repeated: Floats
    """The same where the context is repeated: 0 but for rounding, as routing is a function of the context."""
    other_tokens: Floats
    """The same between different tokens: what chance gives with these loads."""
    overall: float
    """Mean of the change over layers: the one number of the claim."""
    overall_interval: tuple[float, float]
    tokens: int
    pairs: int


def context_dependence(
    routing: Routing, repeated: Routing, *, pairs_per_token: int, confidence: float, resamples: int, seed: int
) -> ContextDependence:
    """Whether the same token goes to different experts in different contexts, as a number with an interval.

    For every token that occurs in several texts, random pairs of its occurrences in different texts after different
    beginnings; the change of a pair is ``1 - |A & B| / k`` for its sets of experts A and B. First positions are left
    out: they have no context, and models treat them in their own way.

    Args:
        routing: Of texts.
        repeated: Of the same texts, read again in other batches (``batch_tokens=1``).
        pairs_per_token: At most so many pairs of one token; each token counts once, whatever its pairs.
        confidence: Of the intervals.
        resamples: Of the bootstrap, over tokens.
        seed: Of pairs and bootstrap.

    Raises:
        InputError: No token occurs in two contexts, or ``repeated`` is of other texts.
    """
    if not torch.equal(routing.token, repeated.token) or not torch.equal(routing.text, repeated.text):
        raise InputError("repeated: is of other texts; trace the same ones in the same order")
    random = np.random.default_rng(seed)
    inside = (routing.position > 0).numpy()
    token, text = routing.token.numpy(), routing.text.numpy()
    context = _contexts(token, routing.position.numpy())
    chosen, owner = [], []
    for number in np.unique(token[inside]):
        places = np.flatnonzero((token == number) & inside)
        a, b = random.choice(places, size=(2, 20 * pairs_per_token))
        other = (text[a] != text[b]) & (context[a] != context[b])
        pairs = np.unique(np.sort(np.stack([a, b], -1)[other], axis=-1), axis=0)
        if len(pairs):
            kept = random.permutation(len(pairs))[:pairs_per_token]
            chosen.append(pairs[kept])
            owner += [number] * len(kept)
    if not chosen:
        raise InputError(
            "texts: no token occurs in two of them after different beginnings; give texts that share words"
        )
    pairs = np.concatenate(chosen)
    _, of = np.unique(owner, return_inverse=True)
    by_pair = _change(routing.experts[:, pairs[:, 0]], routing.experts[:, pairs[:, 1]])
    counts = np.bincount(of)
    by_token = np.stack([np.bincount(of, row) / counts for row in by_pair])
    change = by_token.mean(-1)
    # The last row is the mean over layers, resampled with the same tokens.
    rows = np.concatenate([by_token, by_token.mean(0, keepdims=True)])
    ends = bootstrap_mean(rows, confidence=confidence, resamples=resamples, seed=seed)
    low, high = (end[:-1] for end in ends)
    places = np.flatnonzero(inside)
    a, b = random.choice(places, size=(2, 10 * len(pairs)))
    differ = token[a] != token[b]
    if not differ.any():
        raise InputError("texts: hold one kind of token only; give texts with several")
    others = _change(routing.experts[:, a[differ]], routing.experts[:, b[differ]]).mean(-1)
    again = _change(routing.experts[:, places], repeated.experts[:, places]).mean(-1)
    return ContextDependence(
        change=change,
        interval=np.stack([low, high], -1),
        repeated=again,
        other_tokens=others,
        overall=float(change.mean()),
        overall_interval=(float(ends[0][-1]), float(ends[1][-1])),
        tokens=len(counts),
        pairs=len(pairs),
    )


def _contexts(token: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.int64]:
    """(T,) number of each token's text up to and with it: equal where texts begin alike, as those of a template do."""
    known: dict[tuple[int, int], int] = {}
    numbers = []
    here = 0
    for t, at in zip(token.tolist(), position.tolist(), strict=True):
        here = known.setdefault((here if at else 0, t), len(known) + 1)
        numbers.append(here)
    return np.array(numbers)


def _change(a: Tensor, b: Tensor) -> Floats:
    """(L, pairs): share of the experts of ``a`` (L, pairs, k) that are not among those of ``b``."""
    shared = (a[..., :, None] == b[..., None, :]).any(-1)
    return np.asarray(1 - shared.double().mean(-1))
