"""The lens at every layer and position: of a prompt, a chat, or what the model writes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.base import Reading, check_list, feed_prompts, pick_rows
from classifier_emergence.instruments.lens import chained, target_tokens
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import Fed, Position, continued, read_states
from classifier_emergence.reading.top_tokens import top_tokens
from classifier_emergence.reading.vocabulary import token_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROBABILITY, ENTROPY = "probability", "entropy"
"""What a map can be coloured by, beside its targets."""


@dataclass(frozen=True, eq=False)
class LensMap(Reading):
    """What the vocabulary says of one text at every layer and token."""

    site: str
    """Where in a block, see ``sites.SITES``."""
    prompt: str
    tokens: tuple[str, ...]
    """All that the model was fed, special tokens by their names; what it wrote is at the end."""
    written: int
    """How many tokens at the end the model wrote."""
    read: tuple[int, ...]
    """Numbers of the tokens that were read, from 0."""
    notices: tuple[str, ...]
    """What is special about the prompt, and what was done."""
    top_tokens: tuple[tuple[tuple[str, ...], ...], ...]
    """(layers, positions, k): the most probable next tokens, in order."""
    probability: NDArray[np.float64]
    """(layers, positions, k)"""
    entropy: NDArray[np.float64]
    """(layers, positions), in nats."""
    targets: tuple[str, ...]
    forms: tuple[tuple[str, ...], ...]
    """Single-token forms of each target, whose probabilities add up to its alignment."""
    alignment: NDArray[np.float64]
    """(targets, layers, positions)"""
    rank: NDArray[np.int64]
    """(targets, layers, positions): best rank among the forms; 1 is the top of the vocabulary."""

    @property
    def fed(self) -> Fed:
        """The same as what was fed, for a report."""
        return Fed((), self.tokens, self.read, self.notices)

    def peak(self, target: int) -> tuple[int, int]:
        """Layer and position where a target is most probable, from the first block on if there is one."""
        first = 1 if self.layers[0] == "emb" and len(self.layers) > 1 else 0
        i, j = np.unravel_index(self.alignment[target, first:].argmax(), self.alignment[target, first:].shape)
        return first + int(i), int(j)

    def rows(self) -> list[dict[str, Any]]:
        """One row a position and layer, with a column of probabilities and one of ranks for every target."""
        return [
            {"position": position, "token": self.tokens[position], "layer": layer,
             "top_token": self.top_tokens[i][j][0], "top_probability": self.probability[i, j, 0],
             "entropy": self.entropy[i, j],
             **{f"probability of {target}": self.alignment[t, i, j] for t, target in enumerate(self.targets)},
             **{f"rank of {target}": self.rank[t, i, j] for t, target in enumerate(self.targets)}}
            for j, position in enumerate(self.read) for i, layer in enumerate(self.layers)
        ]  # fmt: skip

    def shade(self, colour: str = PROBABILITY) -> NDArray[np.float64]:
        """(layers, positions): what a cell is coloured by, a probability or an entropy in nats.

        Raises:
            InputError: ``colour`` is neither ``probability``, ``entropy`` nor a target.
        """
        if colour == ENTROPY:
            return self.entropy
        if colour == PROBABILITY:
            top: NDArray[np.float64] = self.probability[..., 0]
            return top
        of_target: NDArray[np.float64] = self.alignment[self.target_number(colour)]
        return of_target

    def target_number(self, colour: str) -> int:
        """Which target a colour names, with or without what is said of its pieces.

        Raises:
            InputError: None.
        """
        named = [t for t, target in enumerate(self.targets) if colour in (target, target.partition(" (")[0])]
        check_colour(colour, [*self.targets, *[colour for _ in named]])
        return named[0]

    def plot(self, colour: str = PROBABILITY) -> "Figure":
        """A cell for every layer and token, with the top token; at most ``drawing.COLUMNS`` tokens in a panel."""
        from classifier_emergence.instruments.drawing import Cells, token_map

        top = [[cell[0] for cell in row] for row in self.top_tokens]
        return token_map([Cells(self.model, top, self.shade(colour), colour_name(colour))], *self.axes())

    def axes(self) -> tuple[list[str], list[bool], tuple[str, ...]]:
        """Tokens that were read, whether the model wrote what follows each, and the layers."""
        return [self.tokens[i] for i in self.read], [self.is_written(i + 1) for i in self.read], self.layers

    def is_written(self, position: int) -> bool:
        """Whether the model wrote the token at a position."""
        return len(self.tokens) - self.written <= position < len(self.tokens)

    def page(self, **how: Any) -> str:
        """One interactive HTML file: choose metric, target and layers, and look into every cell."""
        return page_of([self], **how)


def page_of(maps: Sequence[LensMap], colour: str = PROBABILITY) -> str:
    """The page of a map, or of two of one text: before, after and the difference, to choose from.

    Args:
        maps: One, or two.
        colour: What they are coloured by at first, see ``LensMap.shade``.
    """
    from classifier_emergence.instruments.pages import map_page, short_numbers

    parts = []
    for seen in maps:
        texts = dict.fromkeys(token for row in seen.top_tokens for cell in row for token in cell)
        number = {token: i for i, token in enumerate(texts)}
        parts.append(
            {
                "model": seen.model,
                "vocabulary": list(texts),
                "ids": [[[number[token] for token in cell] for cell in row] for row in seen.top_tokens],
                "p": short_numbers(seen.probability.tolist()),
                "entropy": short_numbers(seen.entropy.tolist()),
                "alignment": short_numbers(seen.alignment.tolist()),
                "rank": seen.rank.tolist(),
            }
        )
    shared = ("tokens", "written", "read", "notices", "layers", "targets")
    metric, target = (colour, 0) if colour in (PROBABILITY, ENTROPY) else ("target", maps[0].target_number(colour))
    first = {"maps": parts, "metric": metric, "target": target}
    return map_page({name: getattr(maps[0], name) for name in shared} | first)


def colour_name(colour: str) -> str:
    """What a colour stands for, in words."""
    names = {PROBABILITY: "probability of the top token", ENTROPY: "entropy, nats"}
    return names.get(colour, f"probability of “{colour}”")


def check_colour(colour: str, targets: Sequence[str]) -> None:
    """Refuse what a map cannot be coloured by.

    Raises:
        InputError: It is neither ``probability``, ``entropy`` nor a target.
    """
    if colour not in (PROBABILITY, ENTROPY, *targets):
        known = ", ".join((PROBABILITY, ENTROPY, *targets))
        raise InputError(f"color {colour!r}: unknown; choose one of {known}, or make it a target")


def lens_map(
    lm: LanguageModel,
    prompt: str,
    targets: Sequence[str] = (),
    *,
    position: Position = "all",
    layers: Sequence[str | int] | None = None,
    chat: bool = False,
    system: str | None = None,
    generate: int = 0,
    top: int = 10,
    pieces: str = "refuse",
    site: str = "resid",
) -> LensMap:
    """What does the readout say at every layer and token?

    At a token the lens reads what would come next. With ``generate`` the model writes (greedily) and the lens is read
    where each token was predicted, from the prompt's last token on.

    Args:
        lm: Any causal language model.
        prompt: A text; with ``chat`` what the user says.
        targets: Words to follow.
        position: Where, if not everywhere; see ``positions.feed``. Not with ``generate``.
        layers: Which to read (``"L16"``, ``16``, ``"emb"``); default all.
        chat: Pass the prompt through the model's own chat template.
        system: What the system says in the chat.
        generate: How many tokens the model may write.
        top: How many tokens to keep for every cell.
        pieces: What a target of several tokens means, see ``lens.lens``.
        site: ``resid``, the state after each block; or inside of it, see ``sites.SITES``.

    Raises:
        InputError: The prompt cannot be read, a layer or position does not exist, or a target has no single token.

    Source: nostalgebraist (2020), interpreting GPT: the logit lens.

    Example:
        >>> lens_map(lm, "7 * 8 =", ["multiply"]).alignment.shape  # targets, layers, positions
        (1, 31, 4)
    """
    check_list(targets, "targets")
    if generate and position != "all":
        raise InputError(f"position {position!r}: not with generate, which reads at every token that the model writes")
    (fed,) = feed_prompts(lm, [prompt], "last" if generate else position, chat=chat, system=system)
    if generate:
        fed = _written(lm, fed, generate)
    picked = pick_rows(lm, layers, site)
    found = [target_tokens(target, lm, pieces) for target in dict.fromkeys(targets)]
    words = [word for word, _ in found]
    states = read_states(lm, [fed], rows=picked, site=site, description=f"{lm.key}: residual streams")
    readout = lm.readout
    seen = top_tokens(states, readout, [word.ids for word in words], top, description=f"{lm.key}: lens")
    alignment = np.moveaxis(seen.alignment.double().numpy(), -1, 0)
    for t, (_, chains) in enumerate(found):
        if chains:
            alignment[t] = chained(lm, [replace(fed, read=(i,)) for i in fed.read], chains, picked, readout, site)
    names = {int(i): token_text(lm.tokenizer, int(i)) for i in seen.ids.unique()}
    return LensMap(
        model=lm.key,
        layers=tuple(lm.layers[row] for row in picked),
        site=site,
        prompt=prompt,
        tokens=fed.tokens,
        written=len(fed.read) if generate else 0,
        read=fed.read,
        notices=fed.notices,
        top_tokens=tuple(tuple(tuple(names[i] for i in cell) for cell in row) for row in seen.ids.tolist()),
        probability=seen.probability.double().numpy(),
        entropy=seen.entropy.double().numpy(),
        targets=tuple(word.word for word in words),
        forms=tuple(tuple(word.forms) for word in words),
        alignment=alignment,
        rank=np.moveaxis(seen.rank.numpy(), -1, 0),
    )


def _written(lm: LanguageModel, fed: Fed, n: int) -> Fed:
    generator: Any = lm.model
    ids = torch.tensor([fed.ids], device=lm.model.device)
    out = generator.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n,
        do_sample=False,
        pad_token_id=lm.tokenizer.pad_token_id,
    )
    return continued(fed, out[0, len(fed.ids) :].tolist(), lm.tokenizer)
