"""What training did: alignment at every layer, answers, distance from the base model, and what reads a direction."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from classifier_emergence.reading.layers import layer_row
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.readout import Readout
from classifier_emergence.reading.residuals import first_tensor, removing, residual_stream, states_at
from classifier_emergence.reading.tree import batches, one_pass
from classifier_emergence.reading.vocabulary import WordTokens
from classifier_emergence.training.examples import encode

GENERATED_TOGETHER = 50  # prompts in a batch


@dataclass(frozen=True)
class Alignment:
    """The lens on prompts whose operation is known; arrays are (layers, prompts)."""

    own_word: Tensor
    """Alignment of the prompt's own word: total probability of its single-token forms."""
    strict: Tensor
    """Probability of the first token of the bare own word, as the originals score."""
    top_id: Tensor
    """The most probable token."""
    top_probability: Tensor
    is_top: Tensor
    """Whether the top token is a form of the own word."""
    choice: Tensor
    """Which of the words has the largest alignment."""


def alignment(
    lm: LanguageModel,
    prompts: Sequence[str],
    classes: Sequence[int],
    words: Sequence[WordTokens],
    *,
    rows: Sequence[int] | None = None,
) -> Alignment:
    """Read the lens at the last token of prompts.

    Args:
        lm: The adapter that it carries, if any, is on.
        prompts: To read.
        classes: Index into ``words`` for each prompt: which is its own word.
        words: The classes' words.
        rows: Rows of the residual stream to score; default all.
    """
    states = residual_stream(lm, prompts, rows=rows)
    groups = [word.ids for word in words] + [[word.strict_id] for word in words]
    scores = lens_scores(states, lm.readout, groups, ranked=[[0]] * len(prompts))
    n, index = len(words), torch.tensor(classes)
    at = torch.arange(len(prompts))
    forms = torch.zeros(len(words), int(scores.top_id.max()) + 1, dtype=torch.bool)
    for k, word in enumerate(words):
        forms[k, [i for i in word.ids if i < forms.shape[1]]] = True
    return Alignment(
        own_word=scores.log_alignment[:, at, index].exp(),
        strict=scores.log_alignment[:, at, n + index].exp(),
        top_id=scores.top_id,
        top_probability=scores.top_prob,
        is_top=forms[index.expand_as(scores.top_id), scores.top_id],
        choice=scores.log_alignment[..., :n].argmax(-1),
    )


@dataclass(frozen=True)
class Answers:
    """How a model answers; (prompts,) each."""

    log_prob: Tensor
    """Log-probability of the whole answer, in nats."""
    per_token: Tensor
    """The same divided by the number of its tokens; minus the answer loss."""
    exact: Tensor
    """Whether greedy decoding gives the answer and then something that is no digit."""


@torch.no_grad()
def answers(lm: LanguageModel, prompts: Sequence[str], wanted: Sequence[str]) -> Answers:
    """Score answers that follow their prompts.

    One forward pass over prompt and answer does: greedy decoding gives the answer exactly if every token of it is the
    most probable one given those before.

    Args:
        lm: The adapter that it carries, if any, is on.
        prompts: To answer.
        wanted: What should follow, with its leading space: ``" 56"``.

    Raises:
        InputError: A prompt is split in another way when the answer follows.
    """
    examples = [encode(lm.tokenizer, prompt, answer) for prompt, answer in zip(prompts, wanted, strict=True)]
    texts = [example.ids[:-1] for example in examples]  # without the end-of-text token
    rows, owner, target = [], [], []
    last = [layer_row(lm.n_layers - 1)]
    for batch in batches(texts):
        inputs, paths = one_pass([texts[i] for i in batch], lm.model)
        # Every token is read at the one before it, and what comes after the answer at its last.
        read = [node for path, i in zip(paths, batch, strict=True) for node in path[examples[i].prompt_length - 1 :]]
        rows.append(states_at(lm, inputs, read, last)[0])
        for i in batch:
            answer = texts[i][examples[i].prompt_length :]
            owner += [i] * (len(answer) + 1)
            target += [*answer, -1]  # -1: what comes after the answer
    flat, of, wanted_ids = torch.cat(rows), torch.tensor(owner), torch.tensor(target)
    vocabulary = wanted_ids.unique()[1:]
    scores = lens_scores(flat[None], lm.readout, [[int(i)] for i in vocabulary], ranked=[[0]] * len(flat))
    inside = wanted_ids >= 0
    column = torch.searchsorted(vocabulary, wanted_ids.clamp(min=0))
    log_prob = scores.log_alignment[0].gather(1, column.clamp(max=len(vocabulary) - 1)[:, None])[:, 0]
    zeros = torch.zeros(len(texts))
    total = zeros.index_add(0, of[inside], log_prob[inside])
    sizes = zeros.index_add(0, of[inside], torch.ones(int(inside.sum())))
    right = (scores.top_id[0] == wanted_ids) | ~inside
    for i in (~inside).nonzero()[:, 0].tolist():
        right[i] = not str(lm.tokenizer.decode([int(scores.top_id[0, i])]))[:1].isdigit()
    wrong = zeros.index_add(0, of, (~right).float())
    return Answers(total, total / sizes, wrong == 0)


@torch.no_grad()
def divergence(lm: LanguageModel, wrapped: PeftModel, texts: Sequence[str]) -> Tensor:
    """KL(base || adapted) of the next token, mean over the positions of each text; (texts,), in nats."""
    readout, last = lm.readout, [layer_row(lm.n_layers - 1)]
    inputs, paths = one_pass([lm.tokenizer(text)["input_ids"] for text in texts], lm.model)
    positions, sizes = [node for path in paths for node in path], [len(path) for path in paths]
    adapted = states_at(lm, inputs, positions, last)[0].split(sizes)
    with wrapped.disable_adapter():
        base = states_at(lm, inputs, positions, last)[0].split(sizes)
    means = []
    for one, other in zip(adapted, base, strict=True):  # text by text: logits are large
        # In float32 the rounding of the sum makes small divergences negative.
        log_q, log_p = (readout.logits(states).double().log_softmax(-1) for states in (one, other))
        means.append((log_p.exp() * (log_p - log_q)).sum(-1).mean().float())
    return torch.stack(means)


def word_basis(words: Sequence[WordTokens], readout: Readout) -> Tensor:
    """(k, d) orthonormal basis of the directions that raise the words' tokens; see ``Readout.directions``."""
    rows = readout.directions(torch.tensor([i for word in words for i in word.ids]))
    basis: Tensor = torch.linalg.qr(rows.T).Q.T
    return basis


def random_basis(like: Tensor, *, seed: int) -> Tensor:
    """(k, d) random orthonormal directions."""
    generator = torch.Generator().manual_seed(seed)
    basis: Tensor = torch.linalg.qr(torch.randn(like.shape[1], like.shape[0], generator=generator)).Q.T
    return basis


@contextmanager
def subspace_removed(lm: LanguageModel, layer: int, basis: Tensor, along: Tensor | None = None) -> Iterator[None]:
    """Take a subspace out of the state after a block, at every position: ``h - (h B^T) B``.

    Args:
        lm: To act on.
        layer: 0-based block.
        basis: B, (k, d) orthonormal.
        along: (k, d) orthonormal R; subtracts ``(h B^T) R`` instead, a vector of equal norm in other directions.
    """
    target = basis if along is None else along
    with _edited(lm, layer, lambda states: states - states @ basis.T @ target):
        yield


@contextmanager
def words_interchanged(lm: LanguageModel, layer: int, pair: Sequence[int], seed: int | None = None) -> Iterator[None]:
    """Interchange what the lens reads of two tokens after a block, at every position, and leave the rest of the state.

    With v_i the direction of t_i (``Readout.directions``) the lens's logits of the two are proportional to ``h . v_i``.
    The state becomes ``h + (h . (v_2 - v_1)) w``, where w, in the span of the two, has ``w . v_1 = 1`` and
    ``w . v_2 = -1``: afterwards ``h . v_1`` is what ``h . v_2`` was and the other way round.

    Args:
        lm: To act on.
        layer: 0-based block.
        pair: The two token ids.
        seed: Of a random direction of w's length that takes its place: the null.
    """
    rows = lm.readout.directions(torch.tensor(pair))
    along = torch.linalg.solve(rows @ rows.T, torch.tensor([1.0, -1.0], dtype=rows.dtype, device=rows.device)) @ rows
    if seed is not None:
        along = random_basis(along[None].cpu(), seed=seed)[0].to(along) * along.norm()
    between = rows[1] - rows[0]
    with _edited(lm, layer, lambda states: states + (states @ between)[..., None] * along):
        yield


@contextmanager
def _edited(lm: LanguageModel, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """States after a block as ``change`` makes them."""

    def edit(_: nn.Module, __: object, output: Any) -> Any:
        states = change(first_tensor(output))
        return (states, *output[1:]) if isinstance(output, tuple) else states

    with removing([lm.blocks[layer].register_forward_hook(edit)]):
        yield


def generate(lm: LanguageModel, prompts: Sequence[str], *, new_tokens: int) -> list[str]:
    """Greedy continuations of prompts, special tokens left out."""
    texts: list[str] = []
    for start in range(0, len(prompts), GENERATED_TOGETHER):
        ids, width = generated_ids(lm, prompts[start : start + GENERATED_TOGETHER], new_tokens, do_sample=False)
        texts += lm.tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    return texts


def generated_ids(lm: LanguageModel, prompts: Sequence[str], new_tokens: int, **sampling: Any) -> tuple[Tensor, int]:
    """Prompts and their continuations as one batch of token ids, and where in it the continuations begin."""
    batch = lm.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    inputs = {name: batch[name].to(lm.model.device) for name in ("input_ids", "attention_mask")}
    generator: Any = lm.model
    ids = generator.generate(**inputs, max_new_tokens=new_tokens, pad_token_id=lm.tokenizer.pad_token_id, **sampling)
    return ids, inputs["input_ids"].shape[1]


def parse_number(text: str) -> str | None:
    """The first whole number after the last colon, or in the whole text if it has none: the originals' rule."""
    number = re.search(r"-?\d+", text.rpartition(":")[2])
    return number.group() if number else None
