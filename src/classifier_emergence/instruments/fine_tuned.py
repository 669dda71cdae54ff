"""What fine-tuning did: the held-out items of a task before and after it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from classifier_emergence.instruments.base import Reading
from classifier_emergence.reading.positions import Fed
from classifier_emergence.statistics import Proportion

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class HeldOutScores:
    """The model on the held-out items."""

    alignment: NDArray[np.float64]
    """(layers,) mean total probability of the forms of the item's own class word."""
    top: Proportion
    """How often the lens's top token at the classifier layer is a form of the own word."""
    choice: Proportion
    """How often the own word has the largest alignment of all class words there."""
    answers: Proportion | None
    """How often greedy decoding writes the answer; None where the items have none."""


@dataclass(frozen=True, eq=False)
class FineTuned(Reading):
    """What fine-tuning did, on items that were never trained on."""

    task: str
    method: str
    classes: tuple[str, ...]
    words: tuple[str, ...]
    layer: str
    """The classifier layer, where the lens is read (and trained, by dual reward)."""
    settings: dict[str, Any]
    n_train: int
    n_test: int
    parameters: int
    """Trained parameters."""
    losses: tuple[dict[str, float], ...]
    before: HeldOutScores
    after: HeldOutScores
    drift: float
    """How far the model moved on text that has nothing to do with the task: ``divergence`` on ``NEUTRAL``, the mean."""
    warnings: tuple[str, ...]
    """What is wrong with the run, in words; empty if nothing is."""
    fed: tuple[Fed, ...]
    """What the model was fed for each prompt, and where it was read: of items trained on, then of those held out."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a layer: mean alignment of the own word before and after."""
        return [
            {"layer": layer, "before": b, "after": a, "n": self.n_test}
            for layer, b, a in zip(self.layers, self.before.alignment, self.after.alignment, strict=True)
        ]

    def plot(self) -> "Figure":
        """Alignment over depth, before and after; and what was trained, or rewarded, over steps."""
        from classifier_emergence.instruments.drawing import FLOOR, drawable, layer_axis, panels, probability_axis

        figure, (depth, curve) = panels(1, 2, (9.6, 3.4), width_ratios=[3, 2])
        depth.plot(np.clip(self.before.alignment, FLOOR, None), color="0.5", ls="--", label="before")
        depth.plot(np.clip(self.after.alignment, FLOOR, None), color="0.0", label="after")
        depth.axvline(self.layers.index(self.layer), color="0.7", lw=0.7)
        depth.set_xlabel(f"layer  ({self.method}, {self.n_test} held-out items)")
        layer_axis(depth, self.layers)
        probability_axis(depth, "alignment of the class's word")
        depth.legend(frameon=False)
        depth.set_title(drawable(self.model), loc="left", fontsize="medium")
        shown = ("reward", "class_loss") if "reward" in self.losses[-1] else ("class_loss", "answer_loss")
        for part, line in zip(shown, ("-", "--"), strict=True):
            if part in self.losses[-1]:
                x, y = zip(*((step["step"], step[part]) for step in self.losses if part in step), strict=True)
                curve.plot(x, y, color="0.0", ls=line, marker=".", label=part.replace("_", " "))
        curve.set_xlabel("step")
        units = {"reward": "mean reward", "class_loss": "nats", "answer_loss": "nats"}
        curve.set_ylabel("; ".join(dict.fromkeys(units[part] for part in shown if part in self.losses[-1])))
        curve.set_ylim(bottom=0)
        curve.legend(frameon=False)
        curve.set_title("while training", loc="left", fontsize="medium")
        return figure
