"""What training did: alignment at every layer, answers, distance from the base model, and what reads a direction."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from classifier_emergence.errors import InputError
from classifier_emergence.lens import lens_scores
from classifier_emergence.readout import Readout, decoder_blocks, find_readout
from classifier_emergence.residuals import Start, batches, residual_stream
from classifier_emergence.training import encode
from classifier_emergence.vocabulary import WordTokens

GENERATED_TOGETHER = 50  # prompts in a batch


@dataclass(frozen=True)
class Alignment:
    """The lens on prompts whose operation is known; arrays are (layers, prompts)."""

    own: Tensor
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    own: Sequence[int],
    words: Sequence[WordTokens],
    *,
    rows: Sequence[int] | None = None,
) -> Alignment:
    """Read the lens at the last token of prompts.

    Args:
        model: Base model; the adapter that it carries, if any, is on.
        tokenizer: Its tokenizer.
        prompts: To read.
        own: Index into ``words`` for each prompt.
        words: The classes' words.
        rows: Rows of the residual stream to score; default all.
    """
    states = residual_stream(model, tokenizer, prompts, rows=rows)
    groups = [word.ids for word in words] + [[word.strict_id] for word in words]
    scores = lens_scores(states, find_readout(model), groups, ranked=[[0]] * len(prompts))
    n, index = len(words), torch.tensor(own)
    at = torch.arange(len(prompts))
    forms = torch.zeros(len(words), int(scores.top_id.max()) + 1, dtype=torch.bool)
    for k, word in enumerate(words):
        forms[k, [i for i in word.ids if i < forms.shape[1]]] = True
    return Alignment(
        own=scores.log_alignment[:, at, index].exp(),
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
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], wanted: Sequence[str]
) -> Answers:
    """Score answers that follow their prompts.

    One forward pass over prompt and answer does: greedy decoding gives the answer exactly if every token of it is the
    most probable one given those before.

    Args:
        model: Base model; the adapter that it carries, if any, is on.
        tokenizer: Its tokenizer.
        prompts: To answer.
        wanted: What should follow, with its leading space: ``" 56"``.

    Raises:
        InputError: A prompt is split in another way when the answer follows.
    """
    examples = [encode(tokenizer, prompt, answer) for prompt, answer in zip(prompts, wanted, strict=True)]
    texts = [(example.ids[:-1], example.prompt_length) for example in examples]  # without the end-of-text token
    rows, owner, target = [], [], []
    # Of the prompts, at least the last token passes with the answer: the answer's first token is read there.
    shared = Start(model, [ids[:length] for ids, length in texts])
    skipped = len(shared.ids)
    for batch in batches([len(ids) - skipped for ids, _ in texts]):
        states = _last_block([texts[i][0] for i in batch], model, tokenizer.pad_token_id or 0, shared)
        for row, i in enumerate(batch):
            ids, length = texts[i]
            rows.append(states[row, length - 1 - skipped : len(ids) - skipped])
            owner += [i] * (len(ids) - length + 1)
            target += [*ids[length:], -1]  # -1: what comes after the answer
    flat, of, wanted_ids = torch.cat(rows), torch.tensor(owner), torch.tensor(target)
    vocabulary = wanted_ids.unique()[1:]
    scores = lens_scores(flat[None], find_readout(model), [[int(i)] for i in vocabulary], ranked=[[0]] * len(flat))
    inside = wanted_ids >= 0
    column = torch.searchsorted(vocabulary, wanted_ids.clamp(min=0))
    log_prob = scores.log_alignment[0].gather(1, column.clamp(max=len(vocabulary) - 1)[:, None])[:, 0]
    zeros = torch.zeros(len(texts))
    total = zeros.index_add(0, of[inside], log_prob[inside])
    sizes = zeros.index_add(0, of[inside], torch.ones(int(inside.sum())))
    right = (scores.top_id[0] == wanted_ids) | ~inside
    for i in (~inside).nonzero()[:, 0].tolist():
        right[i] = not str(tokenizer.decode([int(scores.top_id[0, i])]))[:1].isdigit()
    wrong = zeros.index_add(0, of, (~right).float())
    return Answers(total, total / sizes, wrong == 0)


@torch.no_grad()
def divergence(wrapped: PeftModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Tensor:
    """KL(base || adapted) of the next token, mean over the positions of each text; (texts,), in nats."""
    model: Any = wrapped.get_base_model()
    readout = find_readout(model)
    found = []
    for text in texts:
        ids = [tokenizer(text)["input_ids"]]
        # In float32 the rounding of the sum makes small divergences negative.
        adapted = readout.logits(_last_block(ids, model, 0)[0]).double().log_softmax(-1)
        with wrapped.disable_adapter():
            base = readout.logits(_last_block(ids, model, 0)[0]).double().log_softmax(-1)
        found.append((base.exp() * (base - adapted)).sum(-1).mean().float())
    return torch.stack(found)


def word_basis(words: Sequence[WordTokens], readout: Readout) -> Tensor:
    """(k, d) orthonormal basis of the directions that raise the words' tokens: ``gain * W_U[t]``."""
    rows = readout.weight[[i for word in words for i in word.ids]] * readout.gain
    basis: Tensor = torch.linalg.qr(rows.T).Q.T
    return basis


def random_basis(like: Tensor, *, seed: int) -> Tensor:
    """(k, d) random orthonormal directions."""
    generator = torch.Generator().manual_seed(seed)
    basis: Tensor = torch.linalg.qr(torch.randn(like.shape[1], like.shape[0], generator=generator)).Q.T
    return basis


@contextmanager
def removed(model: PreTrainedModel, layer: int, basis: Tensor, along: Tensor | None = None) -> Iterator[None]:
    """Take a subspace out of the state after a block, at every position: ``h - (h B^T) B``.

    Args:
        model: To act on.
        layer: 0-based block.
        basis: B, (k, d) orthonormal.
        along: (k, d) orthonormal R; subtracts ``(h B^T) R`` instead, a vector of equal norm in other directions.
    """
    target = basis if along is None else along

    def edit(_: nn.Module, __: object, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        states = states - states @ basis.T @ target
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = decoder_blocks(model)[layer].register_forward_hook(edit)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def forgotten(wrapped: PeftModel, modules: Sequence[str]) -> Iterator[None]:
    """The adapter as a loader restores it that forgets some kinds of modules (``("k_proj", "o_proj")``)."""
    endings = tuple(f".{module}.lora_B.default" for module in modules)
    lost: list[nn.Module] = [m for name, m in wrapped.named_modules() if name.endswith(endings)]
    if not lost:
        raise InputError(f"modules: the adapter has none of {', '.join(modules)} to forget")
    weights = [m.get_parameter("weight") for m in lost]
    kept = [weight.detach().clone() for weight in weights]
    for weight in weights:
        weight.data.zero_()
    try:
        yield
    finally:
        for weight, values in zip(weights, kept, strict=True):
            weight.data.copy_(values)


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, new_tokens: int
) -> list[str]:
    """Greedy continuations of prompts, special tokens left out."""
    texts = []
    for start in range(0, len(prompts), GENERATED_TOGETHER):
        batch = tokenizer(list(prompts[start : start + GENERATED_TOGETHER]), return_tensors="pt", padding=True)
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        generator: Any = model
        ids = generator.generate(
            **inputs, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts += tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def parse_number(text: str) -> str | None:
    """The first whole number after the last colon, or in the whole text if it has none: the originals' rule."""
    found = re.search(r"-?\d+", text.rpartition(":")[2])
    return found.group() if found else None


def _last_block(batch: list[list[int]], model: PreTrainedModel, pad: int, start: Start | None = None) -> Tensor:
    """(rows, width, d) pre-norm states after the last block, at the tokens after those that all texts share.

    Padding is on the right, so earlier positions cannot see it.
    """
    shared = 0 if start is None else len(start.ids)
    width = max(map(len, batch)) - shared
    ids = torch.tensor([row[shared:] + [pad] * (width + shared - len(row)) for row in batch], device=model.device)
    cache = None if start is None else start.cache(len(batch))
    kept: list[Tensor] = []
    handle = decoder_blocks(model)[-1].register_forward_hook(
        lambda _, __, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=cache is not None)
    finally:
        handle.remove()
    return kept[0].float().cpu()
