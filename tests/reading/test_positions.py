"""Where a prompt is read, and what is said of prompts that are not what they seem."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import feed, read_states
from classifier_emergence.reading.residuals import residual_stream

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|says|>{% endif %}"
)


@pytest.fixture
def chatty(tiny_models: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with a BOS, and a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_models / "tiny-gemma")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize(
    ("position", "read"), [("last", 4), (-1, 4), ("-2", 3), (0, 0), ("1", 1), ("after:7", 1), ("after:*", 2)]
)
def test_a_position_is_a_token(position: str, read: int, chatty: PreTrainedTokenizerBase) -> None:
    (fed,) = feed(chatty, ["7 * 8 ="], position=position)
    assert fed.tokens == ("<bos>", "7", " *", " 8", " =")
    assert fed.read == (read,)
    assert not fed.notices


@pytest.mark.parametrize(
    ("position", "message"), [("5", "tokens 0 to 4"), ("-6", "tokens 0 to 4"), ("x", "unknown"), ("after:9", "hold")]
)
def test_a_position_that_is_not_there_is_refused(position: str, message: str, chatty: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match=message):
        feed(chatty, ["7 * 8 ="], position=position)


def test_states_at_every_token_are_those_of_the_texts_that_end_there(lm: LanguageModel, as_tree: bool) -> None:
    prompts = ["7 * 8 =", "What is 12 plus 5?"]
    fed = feed(lm.tokenizer, prompts, position="all")
    states = read_states(lm, fed)
    assert states.shape[1] == sum(len(one.ids) for one in fed)
    ends = [sum(len(one.ids) for one in fed[: i + 1]) - 1 for i in range(2)]
    torch.testing.assert_close(states[:, ends], residual_stream(lm, prompts), rtol=1e-4, atol=1e-5)
    alone = [replace(fed[0], ids=fed[0].ids[:k], read=(k - 1,)) for k in range(1, len(fed[0].ids) + 1)]
    one_by_one = torch.cat([read_states(lm, [one], rows=[2]) for one in alone], 1)
    torch.testing.assert_close(states[2:3, : len(alone)], one_by_one, rtol=1e-4, atol=1e-5)


def test_a_chat_is_read_where_the_answer_would_begin(chatty: PreTrainedTokenizerBase) -> None:
    (fed,) = feed(chatty, ["7 * 8 ="], chat=True, system="Be brief.")
    assert "".join(fed.tokens) == "<bos><|system|>Be brief.<eos><|user|>7 * 8 =<eos><|says|>"
    assert fed.read == (len(fed.ids) - 1,)
    assert not fed.notices
    (rendered,) = feed(chatty, ["".join(fed.tokens)], chat=True)
    assert rendered.ids == fed.ids
    assert "holds a chat template already ('<|user|>') and is fed as it stands" in rendered.notices[0]


def test_chats_that_cannot_be_are_refused(chatty: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InputError, match="system: given without chat"):
        feed(chatty, ["7 * 8 ="], system="Be brief.")
    chatty.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match=r"template refuses this chat \(no system role\)"):
        feed(chatty, ["7 * 8 ="], chat=True)
    chatty.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        feed(chatty, ["7 * 8 ="], chat=True)


def test_tokens_that_change_what_is_read_are_said(chatty: PreTrainedTokenizerBase) -> None:
    chatty.chat_template = None
    (fed,) = feed(chatty, ["<bos>7 ="])
    assert fed.tokens == ("<bos>", "7", " =")
    (notice,) = fed.notices
    assert notice == "prompt 1: begins with '<bos>', which the tokenizer adds: fed with one; read at token 2, ' ='"
    (fed,) = feed(chatty, ["7 =<eos> 8"])
    assert fed.notices == ("prompt 1: holds the end token '<eos>' at position 3; read at token 4, ' 8'",)
    chatty.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    (fed,) = feed(chatty, ["7 ="])
    assert fed.tokens == ("<bos>", "7", " =")
    assert fed.notices == ("prompt 1: gets '<eos>' from the tokenizer at its end: left out; read at token 2, ' ='",)
