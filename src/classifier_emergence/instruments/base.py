"""What every instrument shares: checked prompts, named layers, and results that export."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import Fed, Position, feed
from classifier_emergence.reading.sites import check_site
from classifier_emergence.reading.tree import check_tokens
from classifier_emergence.reading.vocabulary import WordTokens, word_tokens
from classifier_emergence.results import plain, write_bytes_atomic

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Reading(ABC):
    """What an instrument found, with every setting that it was found under."""

    model: str
    """Key of the model."""
    layers: tuple[str, ...]
    """Labels of the rows that were read: ``emb``, ``L0`` and so on."""

    def to_dict(self) -> dict[str, Any]:
        """The whole reading in JSON's own types; ``results.write_result`` takes it."""
        tree: dict[str, Any] = plain(self)
        return tree

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """The reading as a long table, one dictionary a row."""

    def to_frame(self) -> "pandas.DataFrame":
        """The same as a data frame.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise InputError("to_frame: needs pandas; install it, or use rows() or to_dict()") from error
        return pd.DataFrame(plain(self.rows()))

    @abstractmethod
    def plot(self) -> "Figure":
        """A figure of the reading."""

    def page(self, **how: Any) -> str:
        """The figure, drawn as ``plot`` is told, and its numbers as one HTML file that needs nothing else."""
        from classifier_emergence.instruments.pages import figure_page

        return figure_page(self.plot(**how), plain(self.rows()), f"{type(self).__name__} of {self.model}")

    def save(self, file: str | Path, **how: Any) -> None:
        """Draw it in the format that the file's ending names, atomically; ``how`` goes to ``plot``.

        Raises:
            InputError: Another ending than .png, .svg, .pdf or .html.
        """
        from classifier_emergence.instruments.drawing import check_ending, rendered

        file = Path(file)
        check_ending(file)
        kind = file.suffix[1:].lower()
        write_bytes_atomic(file, self.page(**how).encode() if kind == "html" else rendered(self.plot(**how), kind))

    def _repr_html_(self) -> str | None:
        """What a notebook shows; its text where there is nothing to draw with."""
        try:
            from classifier_emergence.instruments.pages import framed

            return framed(self.page())
        except (InputError, ImportError):
            return None


def check_prompts(prompts: Sequence[str], *, what: str = "prompt") -> None:
    """Refuse prompts that no model can read.

    Raises:
        InputError: There are none, or one is empty or is not valid Unicode.
    """
    check_list(prompts, f"{what}s")
    if not prompts:
        raise InputError(f"{what}s: none given; pass at least one")
    for i, prompt in enumerate(prompts, start=1):
        check_text(prompt, f"{what} {i}")


def feed_prompts(
    lm: LanguageModel,
    prompts: Sequence[str],
    position: Position = "last",
    *,
    chat: bool = False,
    system: str | None = None,
    what: str = "prompt",
) -> list[Fed]:
    """``positions.feed`` for prompts that the model can read.

    Raises:
        InputError: See ``check_prompts`` and ``positions.feed``; or a prompt, in the chat's template if
            any, is longer than the model's context or holds a token that the model does not have.
    """
    check_prompts(prompts, what=what)
    fed = feed(lm.tokenizer, prompts, position=position, chat=chat, system=system)
    check_tokens([max(one.ids) for one in fed], lm.model)
    config: Any = lm.model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    for i, one in enumerate(fed, start=1):
        if context and len(one.ids) > context:
            raise InputError(f"{what} {i}: {len(one.ids)} tokens, but {lm.key} reads at most {context}; shorten it")
    return fed


def one_position(position: Position) -> Position:
    """Refuse ``all`` where one token of each prompt is read.

    Raises:
        InputError: It is ``all``.
    """
    if position == "all":
        raise InputError("position 'all': reads many tokens of one text, with lens_map; here choose one, such as last")
    return position


def check_list(texts: object, what: str) -> None:
    """Refuse one text where several are meant: its characters would pass for them.

    Raises:
        InputError: It is a text; names ``what``.
    """
    if isinstance(texts, str):
        raise InputError(f"{what}: one text; pass a list of them")


def class_names(labels: Sequence[Any]) -> list[str]:
    """Labels as text: those that are whole numbers or truth values by their names.

    Raises:
        InputError: One is neither, or is empty; names its row.
    """
    check_list(labels, "labels")
    names = []
    for i, label in enumerate(labels, start=1):
        label = label.item() if hasattr(label, "item") else label  # NumPy's and PyTorch's numbers
        if not isinstance(label, str | bool | int):
            raise InputError(f"label {i}: {label!r} is no class; give a text, a whole number or a truth value")
        check_text(str(label), f"label {i}")
        names.append(str(label))
    return names


def check_text(text: str, what: str) -> None:
    """Refuse text that no tokenizer takes.

    Raises:
        InputError: It is empty or only white space, or not valid Unicode (a lone surrogate); names ``what``.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{what}: not valid Unicode; fix its encoding") from error
    if not text.strip():
        raise InputError(f"{what}: empty; give it some text")


def known_word(word: str, lm: LanguageModel) -> WordTokens:
    """How the vocabulary spells a word, without forms that it does not know at all.

    Raises:
        InputError: The word is empty, not valid Unicode, tokenises to nothing, or to a token that the model does not
            have.
    """
    check_text(word, f"target word {word!r}")
    tokens = word_tokens(word, lm.tokenizer)
    check_tokens([*tokens.ids, tokens.strict_id], lm.model)
    unknown = lm.tokenizer.unk_token_id
    return replace(tokens, forms={form: i for form, i in tokens.forms.items() if i != unknown})


def pick_rows(lm: LanguageModel, layers: Sequence[str | int] | None, site: str = "resid") -> list[int]:
    """Rows of a residual stream by name: ``emb``, ``L16`` or ``16`` for the state after block 16; None for all.

    Inside of blocks (another site) there is no ``emb``.

    Raises:
        InputError: The model has no such layer.
    """
    check_site(site)
    check_list(layers or [], "layers")
    labels = lm.layers
    if layers is None:
        return list(range(0 if site == "resid" else 1, len(labels)))
    rows = []
    for layer in layers:
        label = f"L{layer}" if str(layer).isdecimal() else str(layer)
        if label not in labels:
            raise InputError(f"layer {layer!r}: {lm.key} has {labels[0]} and {labels[1]} to {labels[-1]}")
        rows.append(labels.index(label))
        if site != "resid" and rows[-1] == 0:
            raise InputError(f"layer {layer!r}: no block, so it has no {site}; choose {labels[1]} to {labels[-1]}")
    return sorted(set(rows))
