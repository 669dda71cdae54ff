"""Where a prompt is read: the tokens that the model is really fed, chats among them, and the states at any of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from classifier_emergence.errors import InputError, first_line
from classifier_emergence.progress import progress
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.sites import site_states
from classifier_emergence.reading.tree import batches, one_pass
from classifier_emergence.reading.vocabulary import token_text

Position = str | int
"""``last``, ``all``, a number of a token (from 0, or from -1 backwards), or ``after:TEXT``."""
_MARK = re.compile(r"[<\[][^<\[]*$")


@dataclass(frozen=True)
class Fed:
    """One prompt as the model gets it.

    Example:
        >>> (fed,) = feed(lm.tokenizer, ["7 * 8 ="], position="after:*")
        >>> fed.tokens, fed.read
        (('7', ' *', ' 8', ' ='), (1,))
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """The text of each, special tokens by their names."""
    read: tuple[int, ...]
    """Numbers of the tokens that are read, from 0."""
    notices: tuple[str, ...] = ()
    """What is special about it, and what was done: a sentence each."""


def feed(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    position: Position = "last",
    chat: bool = False,
    system: str | None = None,
) -> list[Fed]:
    """Prompts as token ids, and where to read them.

    A prompt that begins with the BOS that the tokenizer adds gets one of them, and an end token that the tokenizer
    appends is left out: both are notices, as are a chat template that a prompt holds already, and an end token in it.

    Args:
        tokenizer: Adds its special tokens as it does by default, but to a chat, whose template has them.
        prompts: Texts; with ``chat`` what the user says.
        position: ``last``; ``all``; a number of a token, from 0 or from -1 backwards; ``after:TEXT``, the token that
            ends the last occurrence of a text.
        chat: Pass each through the model's own template, up to where the answer would begin.
        system: What the system says in the chat.

    Raises:
        InputError: A prompt tokenises to nothing, has no such position, or there is no chat template.
    """
    if system is not None and not chat:
        raise InputError("system: given without chat; a system prompt needs the chat template")
    header = _user_header(tokenizer) if tokenizer.chat_template or chat else None
    return [_feed(tokenizer, f"prompt {i}", text, position, chat, system, header) for i, text in enumerate(prompts, 1)]


def _feed(
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    text: str,
    position: Position,
    chat: bool,
    system: str | None,
    header: str | None,
) -> Fed:
    notices = []
    rendered = header is not None and header in text
    if rendered:
        notices.append(f"holds a chat template already ({header!r}) and is fed as it stands")
    if chat and not rendered:
        text = _rendered(tokenizer, text, system)
    ids, spans = _encoded(tokenizer, text, special=not chat or rendered)
    bare, _ = _encoded(tokenizer, text, special=False)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos] and bare[:2] != [bos, bos]:
        ids, spans = ids[1:], spans[1:]
        notices.append(f"begins with {tokenizer.bos_token!r}, which the tokenizer adds: fed with one")
    if eos is not None and ids[-1:] == [eos] and bare[-1:] != [eos]:
        ids, spans = ids[:-1], spans[:-1]
        notices.append(f"gets {tokenizer.eos_token!r} from the tokenizer at its end: left out")
    if eos != bos and eos in ids and not rendered and not chat:
        notices.append(f"holds the end token {tokenizer.eos_token!r} at position {ids.index(eos)}")
    if not set(ids) - set(tokenizer.all_special_ids):
        raise InputError(f"prompt {text!r}: tokenises to nothing but special tokens; give it some text")
    read = _read(position, text, spans, what)
    tokens = tuple(token_text(tokenizer, i) for i in ids)
    where = "every token" if len(read) > 1 else f"token {read[0]}, {tokens[read[0]]!r}"
    return Fed(tuple(ids), tokens, read, tuple(f"{what}: {notice}; read at {where}" for notice in notices))


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> tuple[list[int], list[Any]]:
    """Token ids, and for each where in the text it stands (start, end); None where the tokenizer cannot say."""
    batch = tokenizer(text, add_special_tokens=special, return_offsets_mapping=tokenizer.is_fast)
    ids: list[int] = batch["input_ids"]
    return ids, list(batch["offset_mapping"]) if tokenizer.is_fast else [None] * len(ids)


def _read(position: Position, text: str, spans: Sequence[tuple[int, int] | None], what: str) -> tuple[int, ...]:
    n = len(spans)
    if position == "all":
        return tuple(range(n))
    if isinstance(position, str) and position.startswith("after:"):
        return (_after(position.removeprefix("after:"), text, spans, what),)
    try:
        index = -1 if position == "last" else int(position)
    except ValueError as error:
        raise InputError(f"position {position!r}: unknown; write last, all, a number or after:TEXT") from error
    if not -n <= index < n:
        raise InputError(f"position {position}: {what} has tokens 0 to {n - 1}; choose one of them, or last")
    return (index % n,)


def _after(wanted: str, text: str, spans: Sequence[tuple[int, int] | None], what: str) -> int:
    start = text.rfind(wanted) if wanted else -1
    if start < 0:
        raise InputError(f"position 'after:{wanted}': {what} does not hold that text; choose one that it holds")
    end = start + len(wanted)
    hits = [i for i, span in enumerate(spans) if span is not None and span[0] < end <= span[1]]
    if not hits:
        raise InputError(
            f"position 'after:{wanted}': this tokenizer does not say where its tokens stand; give a number"
        )
    return hits[-1]


def _user_header(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What a chat template writes last before the user's words, such as ``<|im_start|>user``."""
    user = "what-the-user-says"
    mark = _MARK.search(_rendered(tokenizer, user, None).partition(user)[0].rstrip())
    return mark[0] if mark else None


def _rendered(tokenizer: PreTrainedTokenizerBase, text: str, system: str | None) -> str:
    if not tokenizer.chat_template:
        raise InputError("chat: the tokenizer of this model has no chat template; leave chat out, or take a chat model")
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": text})
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program: it may fail in any way
        raise InputError(f"chat: the model's template refuses this chat ({first_line(error)})") from error


def continued(fed: Fed, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Fed:
    """A prompt with tokens that follow it, read where each of them was predicted: from its last token on."""
    n = len(fed.ids)
    tokens = (*fed.tokens, *(token_text(tokenizer, int(i)) for i in ids))
    return replace(fed, ids=(*fed.ids, *map(int, ids)), tokens=tokens, read=tuple(range(n - 1, n - 1 + len(ids))))


@torch.no_grad()
def read_states(
    lm: LanguageModel,
    fed: Sequence[Fed],
    *,
    rows: Sequence[int] | None = None,
    site: str = "resid",
    description: str | None = None,
) -> Tensor:
    """Pre-norm residual streams at the tokens that are read; see ``residuals.residual_stream``.

    Args:
        lm: Any causal language model.
        fed: What it is fed; tokens after the last that is read need not pass.
        rows: Of the residual stream; default all.
        site: Where in a block, see ``sites.site_states``.
        description: Shown with the progress bar.

    Returns:
        (rows, positions, d); positions prompt by prompt.

    Raises:
        InputError: A state is not finite.
    """
    texts = [prompt.ids[: max(prompt.read) + 1] for prompt in fed]
    wanted = range(len(lm.layers)) if rows is None else rows
    parts: list[Tensor] = [torch.empty(0)] * len(fed)
    with progress(description, total=sum(map(len, texts))) as advance:
        for batch in batches(texts):
            inputs, paths = one_pass([texts[i] for i in batch], lm.model)
            nodes = [path[k] for i, path in zip(batch, paths, strict=True) for k in fed[i].read]
            sizes = [len(fed[i].read) for i in batch]
            for i, part in zip(batch, site_states(lm, inputs, nodes, wanted, site).split(sizes, 1), strict=True):
                parts[i] = part
            advance(sum(len(texts[i]) for i in batch))
    for i, part in enumerate(parts, start=1):
        if not part.isfinite().all():
            raise InputError(f"prompt {i}: the model's residual stream is not finite (NaN or infinity)")
    return torch.cat(parts, 1)
