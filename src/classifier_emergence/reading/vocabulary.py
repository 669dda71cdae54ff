"""Words to token ids: single-token variants, what is multi-piece, and other words that make a null."""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from classifier_emergence.errors import InputError
from classifier_emergence.reading.readout import Readout


@dataclass(frozen=True)
class WordTokens:
    """How one vocabulary spells a word."""

    word: str
    forms: dict[str, int]
    """Single-token forms (bare, leading space, capitalised) -> token id; ids are distinct."""
    multi_piece: dict[str, list[str]]
    """Forms that need several tokens -> their pieces. They are reported, never truncated to a first piece."""
    strict_id: int
    """First token of the bare word: the target of the originals."""

    @property
    def ids(self) -> list[int]:
        """Token ids of the single-token forms."""
        return list(self.forms.values())

    @property
    def strict_is_whole(self) -> bool:
        """Whether the strict target is the word, not merely its first piece."""
        return self.strict_id in self.forms.values()


def word_tokens(word: str, tokenizer: PreTrainedTokenizerBase) -> WordTokens:
    """Look up a word's forms: ``word``, ``␣word``, ``Word``, ``␣Word``.

    Where the tokenizer puts a space before every text (SentencePiece, as Llama 2 has it), the word by itself already
    is the spaced form, ``▁word``; the bare form is then the piece without it, which stands inside words.

    Raises:
        InputError: The word is empty or only white space, or tokenises to nothing.
    """
    if not word.strip():
        raise InputError(f"target word {word!r}: empty; give a word or a symbol")
    forms: dict[str, int] = {}
    multi_piece: dict[str, list[str]] = {}
    for form in _forms(word):
        ids = _piece_ids(form, tokenizer)
        if len(ids) == 1:
            if ids[0] not in forms.values():
                forms[form] = ids[0]
        elif ids:
            multi_piece[form] = [str(piece) for piece in tokenizer.convert_ids_to_tokens(ids)]
    bare = tokenizer.encode(word, add_special_tokens=False)
    if not bare:
        raise InputError(f"target word {word!r}: tokenises to nothing in this vocabulary")
    return WordTokens(word, forms, multi_piece, bare[0])


def _piece_ids(form: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a form as it stands inside a text; none if a text can only begin with it."""
    bare: list[int] = tokenizer.encode(form.removeprefix(" "), add_special_tokens=False)
    if not str(tokenizer.convert_ids_to_tokens(bare[:1] or [0])[0]).startswith("▁"):
        return tokenizer.encode(form, add_special_tokens=False) if form.startswith(" ") else bare
    if form.startswith(" "):  # its space is the one that the tokenizer puts before every text
        return bare
    known = tokenizer.get_vocab().get(form)
    return [] if known is None else [known]


def _forms(word: str) -> list[str]:
    capital = word[:1].upper() + word[1:]
    return list(dict.fromkeys([word, f" {word}", capital, f" {capital}"]))


def matched_words(
    target: WordTokens,
    norms: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    *,
    exclude: Collection[str] = (),
    fewest: int | None = None,
) -> list[WordTokens]:
    """The ``n`` other words nearest to ``target`` in unembedding norm, spelt in the same forms.

    Candidates are lower-case ASCII words of three letters or more that have the target's single-token forms. Distance
    is that of the mean norm over forms, so that frequency and scale effects of the readout are shared.

    Args:
        target: The word to match.
        norms: (vocabulary,) norms of the unembedding rows.
        tokenizer: Of the same vocabulary.
        n: How many words.
        exclude: Words that may not serve (the operation words and their synonyms).
        fewest: How many are enough if the vocabulary has no ``n``; default ``n``.

    Raises:
        InputError: The target has no single-token form, or the vocabulary has too few such words.
    """
    if not target.forms:
        raise InputError(f"target word {target.word!r}: no single-token form in this vocabulary, so no null matches it")
    spelling = {token.replace("▁", " ").replace("Ġ", " "): i for token, i in tokenizer.get_vocab().items()}
    banned = {target.word, *exclude}
    candidates = [
        word
        for form in spelling
        if (word := form.strip()) and form == f" {word}"
        and len(word) >= 3 and word.isascii() and word.isalpha() and word.islower() and word not in banned
    ]  # fmt: skip
    target_norm = float(norms[target.ids].mean())
    matches = []
    for word in candidates:
        ids = {form: spelling[form] for form in _forms(word) if form in spelling}
        if len(ids) == len(target.forms) and all(_same_shape(a, b) for a, b in zip(ids, target.forms, strict=True)):
            distance = abs(float(norms[list(ids.values())].mean()) - target_norm)
            matches.append((distance, word, ids))
    if len(matches) < (least := n if fewest is None else min(n, fewest)):
        raise InputError(
            f"null_words: {least} asked for, this vocabulary has {len(matches)} words spelt like {target.word!r}"
        )
    matches.sort(key=lambda match: match[:2])
    return [WordTokens(word, ids, {}, next(iter(ids.values()))) for _, word, ids in matches[:n]]


def _same_shape(a: str, b: str) -> bool:
    return a.startswith(" ") == b.startswith(" ") and a.strip()[0].isupper() == b.strip()[0].isupper()


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token as the text it adds, or its vocabulary name where it decodes to nothing or to broken bytes."""
    text = str(tokenizer.decode([token_id]))
    name = tokenizer.convert_ids_to_tokens(token_id)
    if text and "\ufffd" not in text:
        # Tokenizers that put a space before a text take it off again.
        return f" {text}" if str(name).startswith("▁") and not text.startswith((" ", "▁")) else text
    return str(name) if name else f"<{token_id}>"  # padded vocabularies have ids that the tokenizer does not know


def row_norms(readout: Readout) -> Tensor:
    """(vocabulary,) norms of the tokens' directions, which act on the normalised state: ``|gain * W_U[t]|``."""
    parts = [slice(start, start + 16384) for start in range(0, len(readout.weight), 16384)]
    return torch.cat([torch.linalg.vector_norm(readout.directions(part), dim=-1) for part in parts]).cpu()
