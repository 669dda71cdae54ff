"""The ledger: the claims of the write-ups and our own predictions, and what our results are asked about each.

A prediction stands in ``paper/predictions.yaml`` in the form of a claim before the run that tests it, as the history of
that file shows; it is judged by the same rule.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from classifier_emergence.errors import InputError
from classifier_emergence.statistics import wilson
from experiments.report.verdicts import Bounds

LEDGER = Path("paper/claims.yaml")
PREDICTIONS = Path("paper/predictions.yaml")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Where(_Strict):
    """A number of every model's result."""

    stage: str
    key: str
    """Dotted key of the number, of what holds it beside its interval, or of such an array over layers."""
    at: Literal["min", "max", "first"] | float | None = None
    """Row of an array over layers: of its least or largest value (from L0 on), L0, or layer int(at * n_layers)."""
    n: str | None = None
    """Key of the number of examples of a share that has no interval beside it."""
    model: str | None = None
    """The one model that the number is read of, where the claim is about that one; else every model."""


class Atom(Where):
    """One test of a claim: what it says about one number."""

    what: str
    """The quantity in words, as the evidence table shows it."""
    protocol: Literal["reported", "controlled", "flaw ablation"]
    why: str
    """Where the bound comes from."""
    primary: bool = False
    """The one that decides the headline."""
    theirs: str = ""
    """The number of the write-up that it is about."""
    at_least: float | None = None
    at_most: float | None = None
    all_of: int | None = None
    """That many of as many, in the write-up: at least what that establishes, the Wilson limit."""
    none_of: int | None = None
    p_of: int | None = None
    """The number is the smallest p-value of so many; the claim says that there is nothing to find."""
    increasing: bool = False
    """Over models by parameters."""
    minus: Where | None = None
    """A number to take away."""
    baseline: str | None = None
    """Key of the same number without what the claim is about: of the untrained model, or of a null."""

    @model_validator(mode="after")
    def _sound(self) -> "Atom":
        if not (self.increasing or self.p_of) and self.bounds(0.95) == Bounds():
            raise ValueError("give a bound (at_least, at_most, all_of, none_of), p_of or increasing: it cannot fail")
        if self.primary and not (self.protocol == "controlled" and self.theirs):
            raise ValueError("a primary test is controlled, and says what the write-up reports (theirs)")
        return self

    def bounds(self, confidence: float) -> Bounds:
        """What is met."""
        low, high = self.at_least, self.at_most
        if self.all_of:
            low = wilson(self.all_of, self.all_of, confidence=confidence)[0]
        if self.none_of:
            high = wilson(0, self.none_of, confidence=confidence)[1]
        return Bounds(*(fallback if x is None else x for x, fallback in ((low, -np.inf), (high, np.inf))))

    def expected(self, confidence: float) -> str:
        """The bounds in words."""
        if self.p_of:
            return "nothing found" if self.p_of == 1 else f"nothing found ({self.p_of} p-values)"
        if self.increasing:
            return "grows with parameters"
        bounds = self.bounds(confidence)
        words = [f"{name} {bound:.3g}" for name, bound in (("at least", bounds.low), ("at most", bounds.high))
                 if np.isfinite(bound)]  # fmt: skip
        of = self.all_of or self.none_of
        return " and ".join(words).replace("-", "−") + (f" ({'all' if self.all_of else 'none'} of {of})" if of else "")


class Claim(_Strict):
    """A claim of the sources."""

    claim: str
    source: str
    reported: str
    recommendation: bool = False
    """Recommended in a write-up, and never run there."""
    needs: str | None = None
    """Models that the paper has not: without them the claim cannot be tested, its evidence only bears on it."""
    models: list[str] = []
    """Their keys in the registry; where the primary test was made on all of them, they alone decide the headline."""
    atoms: list[Atom] = []

    @model_validator(mode="after")
    def _one_primary(self) -> "Claim":
        primary = [atom.model for atom in self.atoms if atom.primary]
        if self.atoms and (not primary or len(primary) > len({*primary})):
            raise ValueError("mark exactly one atom as primary, and at most one more for each model that atoms name")
        if self.models and not self.needs:
            raise ValueError("models: only of a claim that needs some")
        return self


def load_claims(path: Path) -> dict[str, Claim]:
    """Read the ledger.

    Raises:
        InputError: Missing file, unknown field or wrong type; names the claim and the field.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TypeAdapter(dict[str, Claim]).validate_python({} if raw is None else raw)  # comments alone
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(f"{path}: {where or 'the ledger'}: {problem['msg']}") from error
