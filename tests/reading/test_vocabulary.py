import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import matched_words, token_text, word_tokens
from classifier_emergence.tasks.arithmetic import OPERATIONS


def test_single_token_forms_decode_to_themselves(lm: LanguageModel) -> None:
    tokens = word_tokens("multiply", lm.tokenizer)
    assert tokens.forms.keys() == {"multiply", " multiply"}
    assert all(lm.tokenizer.decode([i]) == form for form, i in tokens.forms.items())
    assert tokens.strict_is_whole


def test_multi_piece_forms_are_reported_not_truncated(lm: LanguageModel) -> None:
    tokens = word_tokens("multiply", lm.tokenizer)
    assert tokens.multi_piece.keys() == {"Multiply", " Multiply"}
    assert all(len(pieces) > 1 for pieces in tokens.multi_piece.values())
    unknown = word_tokens("xylophone", lm.tokenizer)
    assert not unknown.ids
    assert not unknown.strict_is_whole


@pytest.mark.parametrize("word", ["", " ", "\n\t"])
def test_an_empty_word_is_refused(lm: LanguageModel, word: str) -> None:
    with pytest.raises(InputError, match="target word"):
        word_tokens(word, lm.tokenizer)


@pytest.mark.parametrize("word", ["🙂", "#", "|", "=cmd", "עברית", "\u202eabc", "a" * 5000])
def test_hostile_words_are_looked_up_without_harm(lm: LanguageModel, word: str) -> None:
    tokens = word_tokens(word, lm.tokenizer)
    assert set(tokens.forms) | set(tokens.multi_piece)


def test_null_words_match_in_forms_and_norm(lm: LanguageModel) -> None:
    target = word_tokens("multiply", lm.tokenizer)
    norms = torch.rand(len(lm.tokenizer) + 5, generator=torch.Generator().manual_seed(0))
    null = matched_words(target, norms, lm.tokenizer, 20, exclude=OPERATIONS)
    assert len({word.word for word in null}) == 20
    assert not {word.word for word in null} & set(OPERATIONS)
    wanted = float(norms[target.ids].mean())
    distance = [abs(float(norms[word.ids].mean()) - wanted) for word in null]
    assert distance == sorted(distance)
    assert all(len(word.ids) == len(target.ids) for word in null)
    for word in null:
        assert word_tokens(word.word, lm.tokenizer).ids == word.ids


def test_too_many_null_words_are_refused(lm: LanguageModel) -> None:
    target = word_tokens("multiply", lm.tokenizer)
    with pytest.raises(InputError, match="null_words: 99999 asked for"):
        matched_words(target, torch.ones(len(lm.tokenizer) + 5), lm.tokenizer, 99999)
    with pytest.raises(InputError, match="null_words: 88888 asked for"):
        matched_words(target, torch.ones(len(lm.tokenizer) + 5), lm.tokenizer, 99999, fewest=88888)
    assert len(matched_words(target, torch.ones(len(lm.tokenizer) + 5), lm.tokenizer, 99999, fewest=20)) >= 20


def test_tokens_beyond_the_tokenizer_have_a_text(lm: LanguageModel) -> None:
    assert token_text(lm.tokenizer, len(lm.tokenizer) + 2)


def test_where_every_text_gets_a_space_the_word_is_the_spaced_form() -> None:
    pieces = ["<unk>", "<s>", "▁multiply", "multiply", "▁add", "▁table", "table", "▁stone", *"multipyade"]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    unigram = Tokenizer(models.Unigram([(piece, -float(len(piece) < 2)) for piece in vocabulary], unk_id=0))
    unigram.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    unigram.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>", bos_token="<s>")
    multiply, add = (word_tokens(word, tokenizer) for word in ("multiply", "add"))
    assert multiply.forms == {"multiply": vocabulary["multiply"], " multiply": vocabulary["▁multiply"]}
    assert multiply.strict_id == vocabulary["▁multiply"]
    assert add.forms == {" add": vocabulary["▁add"]}
    norms = torch.ones(len(vocabulary))
    assert [word.forms for word in matched_words(multiply, norms, tokenizer, 1)] == [
        {"table": vocabulary["table"], " table": vocabulary["▁table"]}
    ]
    assert [word.ids for word in matched_words(add, norms, tokenizer, 1)] == [[vocabulary["▁stone"]]]
    assert token_text(tokenizer, vocabulary["▁add"]) == " add"
    assert token_text(tokenizer, vocabulary["table"]) == "table"
