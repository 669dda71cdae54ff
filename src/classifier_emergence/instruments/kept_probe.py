"""A probe that is kept: one layer's linear classifier in a folder, used again on new prompts or inside the model."""

import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from classifier_emergence.errors import InputError, first_line
from classifier_emergence.instruments.base import feed_prompts
from classifier_emergence.reading.layers import layer_of
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import Fed, Position, read_states
from classifier_emergence.results import read_result, write_bytes_atomic, write_result

WEIGHTS, CARD = "probe.safetensors", "card.json"


@dataclass(frozen=True)
class Card:
    """What a kept probe is, and how far it can be trusted."""

    model: str
    layer: str
    site: str
    """Where in the block, see ``sites.SITES``."""
    classes: tuple[str, ...]
    position: Position
    """The token of every prompt that it was fitted on."""
    chat: bool
    system: str | None
    n: int
    accuracy: float
    """Held out, at this layer, which was chosen as the best."""
    interval: tuple[float, float]
    null_95: float
    """What the best layer of permuted labels reaches in one of twenty cases."""
    p: float


@dataclass(frozen=True)
class Cost:
    """What a probe costs inside the model: medians of passes that alternate, in seconds."""

    routed: float
    """With the probe as a hook behind its block."""
    alone: float
    """Without it."""
    passes: int
    """Of each."""
    tokens: int
    """Of the text that passed."""


@dataclass(frozen=True, eq=False)
class KeptProbe:
    """A matrix from the state after one block to classes: ``softmax(W h + b)``.

    Example:
        >>> probe(lm, prompts, labels, output="mine")
        >>> kept = KeptProbe.load("mine")
        >>> kept.predict_proba(kept.states(lm, ["11 * 12 ="]))
        tensor([[0.98, 0.02]])
    """

    weight: Tensor
    """W, (classes, d) float32, for raw states."""
    bias: Tensor
    """b, (classes,)"""
    card: Card

    def save(self, folder: str | Path) -> None:
        """Write ``probe.safetensors`` (``weight``, ``bias``) and ``card.json``: both, or there is no folder.

        Raises:
            InputError: The folder exists or cannot be written.
        """
        folder = Path(folder)
        check_new(folder)
        made = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
        try:
            tensors = {"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}
            write_bytes_atomic(made / WEIGHTS, save(tensors))
            write_result(made / CARD, asdict(self.card))
            made.rename(folder)
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"output {folder}: cannot be written ({reason}); free space or name another") from error
        finally:
            shutil.rmtree(made, ignore_errors=True)

    @classmethod
    def load(cls, folder: str | Path) -> "KeptProbe":
        """Read what ``save`` wrote.

        Raises:
            InputError: It is no such folder.
        """
        folder = Path(folder)
        try:
            tensors = load_file(folder / WEIGHTS)
            # Twice: the first knows the names of the fields, the second their types.
            card = TypeAdapter(Card).validate_python(vars(Card(**read_result(folder / CARD))))
            weight, bias = tensors["weight"], tensors["bias"]
            if not (weight.ndim == 2 and len(weight) == len(bias) == len(card.classes)):
                raise ValueError(f"{len(card.classes)} classes, but weights {tuple(weight.shape)}")
            return cls(weight, bias, card)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise InputError(
                f"probe {folder}: {CARD}: {where}: {problem['msg']}; name what probe --output wrote"
            ) from error
        except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"probe {folder}: not what probe --output wrote ({first_line(error)}); name that"
            ) from error

    def row(self, lm: LanguageModel) -> int:
        """Row of the model's residual stream that the probe reads.

        Raises:
            InputError: The model has no such layer, or states of another width.
        """
        if self.card.layer not in lm.layers:
            raise InputError(f"model {lm.key}: has no layer {self.card.layer}; take {self.card.model}")
        width = lm.model.config.get_text_config().hidden_size
        if width != self.weight.shape[1]:
            raise InputError(
                f"model {lm.key}: states of width {width}, but the probe reads {self.weight.shape[1]}; "
                f"take {self.card.model}"
            )
        return lm.layers.index(self.card.layer)

    def feed(self, lm: LanguageModel, prompts: Sequence[str]) -> list[Fed]:
        """What the model is fed for prompts, to be read at the token that the probe was fitted on."""
        return feed_prompts(lm, prompts, self.card.position, chat=self.card.chat, system=self.card.system)

    def states(self, lm: LanguageModel, prompts: Sequence[str]) -> Tensor:
        """(prompts, d): the states that the probe reads."""
        return read_states(lm, self.feed(lm, prompts), rows=[self.row(lm)], site=self.card.site)[0]

    def logits(self, states: Tensor) -> Tensor:
        """(..., classes) for states (..., d)."""
        return states.float() @ self.weight.to(states.device).T + self.bias.to(states.device)

    def predict_proba(self, states: Tensor) -> Tensor:
        """(..., classes) for states (..., d)."""
        return self.logits(states).softmax(-1)

    def predict(self, states: Tensor) -> list[str]:
        """Names of the most probable classes for states (n, d)."""
        return [self.card.classes[int(i)] for i in self.logits(states).argmax(-1)]

    @contextmanager
    def routing(self, lm: LanguageModel) -> Iterator[list[Tensor]]:
        """Class logits (batch, tokens, classes) of every pass of the model within, as a router would get them.

        The probe stands as a hook behind its block; the pass itself is as it was.

        Example:
            >>> with kept.routing(lm) as routed:
            ...     lm.model(input_ids)
            >>> routed[0][:, -1].argmax(-1)  # the class of each text
        """
        if self.card.site != "resid":
            raise InputError(f"site {self.card.site!r}: a probe is put into the model behind a block; fit one there")
        block = lm.blocks[layer_of(self.row(lm))]
        routed: list[Tensor] = []

        def route(_: Any, __: Any, output: Any) -> None:
            routed.append(self.logits(output[0] if isinstance(output, tuple) else output))

        handle = block.register_forward_hook(route)
        try:
            with torch.no_grad():
                yield routed
        finally:
            handle.remove()

    @torch.no_grad()
    def cost(self, lm: LanguageModel, prompt: str, *, passes: int = 20) -> Cost:
        """How long a pass of the model takes with the probe in it as a router, and without it.

        Raises:
            InputError: See ``routing``.
        """
        ids = list(self.feed(lm, [prompt])[0].ids)
        inputs = torch.tensor([ids], device=lm.model.device)
        forward: Any = lm.model

        def seconds() -> float:
            started = time.perf_counter()
            float(forward(input_ids=inputs, use_cache=False).logits[0, -1, 0])  # waits for a GPU
            return time.perf_counter() - started

        seconds()  # the first pass is slower
        routed, alone = [], []
        for _ in range(passes):
            with self.routing(lm):
                routed.append(seconds())
            alone.append(seconds())
        return Cost(median(routed), median(alone), passes, len(ids))


def check_new(folder: Path) -> None:
    """Refuse a folder that is there already.

    Raises:
        InputError: It is.
    """
    if folder.exists():
        raise InputError(f"output {folder}: exists already, and is not overwritten; name a new folder")
