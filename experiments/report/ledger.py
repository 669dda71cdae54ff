"""Stage claims: the ledger of claims, and a program that turns results into verdicts (results/claims.json).

``paper/claims.yaml`` states each claim, where it stands, what was reported, and tests: a number in a result file and
what the claim says about it. A test gives one piece of evidence a model. The verdict follows from how many of them meet
the claim: all (``holds``), none (``does not hold``), or some (``holds in part``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from classifier_emergence.errors import InputError
from classifier_emergence.reading.layers import layer_at, layer_row
from classifier_emergence.results import lookup, write_result
from experiments.params import load_params
from experiments.shared.stage import RESULTS, STAGES, exit_on_bad_input, result_path, results_of

LEDGER = Path("paper/claims.yaml")
Verdict = Literal["holds", "holds in part", "does not hold", "not testable offline", "not tested yet"]
Results = Mapping[str, Mapping[str, Any]]
"""Stage -> model -> result."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Criterion(_Strict):
    """What the claim says about one number of every model's result."""

    what: str
    """The quantity in words, as the evidence table shows it."""
    protocol: Literal["reported", "controlled", "flaw ablation"]
    stage: str
    key: str
    """Dotted key of the number, or of an array whose first axis is layers."""
    at: Literal["min", "max", "first"] | float | None = None
    """Row of a layer array: the layer of its least or largest value (from L0 on), L0, or layer int(at * n_layers)."""
    interval: str | None = None
    """Key of the interval, indexed alike."""
    n: str | None = None
    """Key of the number of examples."""
    at_least: float | None = None
    at_most: float | None = None
    across: Literal["spread", "increasing"] | None = None
    """Judge all models together: largest minus smallest value against the bounds, or growth with parameters."""

    @model_validator(mode="after")
    def _says_something(self) -> "Criterion":
        if self.at_least is None and self.at_most is None and self.across is None:
            raise ValueError("give at_least, at_most or across: a test without them cannot fail")
        return self

    def met_by(self, value: float) -> bool:
        """Whether a value lies within the bounds."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    @property
    def expected(self) -> str:
        """The bounds in words."""
        if self.across == "increasing":
            return "grows with parameters, intervals apart"
        bounds = {"at least": self.at_least, "at most": self.at_most}
        words = " and ".join(f"{name} {bound:g}" for name, bound in bounds.items() if bound is not None)
        return ("spread between models " if self.across else "") + words


class Claim(_Strict):
    """A claim of the sources."""

    claim: str
    source: str
    reported: str
    needs: str | None = None
    """Models that no wheel ships: the claim itself cannot be tested offline, its evidence only bears on it."""
    tests: list[Criterion] = []


@dataclass(frozen=True)
class Evidence:
    """One number against what the claim says about it."""

    model: str
    protocol: str
    what: str
    value: float
    interval: list[float] | None
    n: int | None
    expected: str
    met: bool
    result: dict[str, str]
    """``file`` and dotted ``key`` of the value."""


def load_claims(path: Path) -> dict[str, Claim]:
    """Read the ledger.

    Raises:
        InputError: Missing file, unknown field or wrong type; names the claim and the field.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        return TypeAdapter(dict[str, Claim]).validate_python(raw)
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise InputError(f"{path}: {where or 'the ledger'}: {problem['msg']}") from error


def evaluate(claim: Claim, results: Results, models: Sequence[str], parameters: Mapping[str, int]) -> dict[str, Any]:
    """The claim with its verdict and evidence.

    Args:
        claim: An entry of the ledger.
        results: Stage -> model -> result; a stage that is absent has not been built yet, and a model that is absent
            from a stage is not judged by it.
        models: The models to judge.
        parameters: Number of parameters of each model.
    """
    evidence = [
        item for test in claim.tests if test.stage in results
        for item in _evidence(test, results[test.stage], models, parameters)
    ]  # fmt: skip
    return {
        **claim.model_dump(include={"claim", "source", "reported"}),
        "verdict": _verdict(claim, evidence),
        "evidence": evidence,
    }


def _verdict(claim: Claim, evidence: list[Evidence]) -> Verdict:
    if claim.needs:
        return "not testable offline"
    # What a flaw gives explains a reported number; it is no evidence for the claim.
    evidence = [item for item in evidence if item.protocol != "flaw ablation"]
    if not evidence:
        return "not tested yet"
    if all(item.met for item in evidence):
        return "holds"
    return "holds in part" if any(item.met for item in evidence) else "does not hold"


def _evidence(
    test: Criterion, results: Mapping[str, Any], models: Sequence[str], parameters: Mapping[str, int]
) -> list[Evidence]:
    found = []
    for model, result in ((model, results[model]) for model in models if model in results):
        row = _row(test, result)
        value = lookup(result, test.key + row)
        if value is None:  # not measured on this model, so no evidence
            continue
        interval = lookup(result, test.interval + row) if test.interval else None
        n = lookup(result, test.n) if test.n else None
        source = {"file": result_path(test.stage, model).as_posix(), "key": test.key + row}
        met = test.met_by(value)
        found.append(Evidence(model, test.protocol, test.what, value, interval, n, test.expected, met, source))
    if test.across is None or not found:
        return found
    return [replace(item, met=_holds_across(test, found, parameters)) for item in found]


def _holds_across(test: Criterion, found: Sequence[Evidence], parameters: Mapping[str, int]) -> bool:
    if len(found) < 2:
        return False  # one model cannot show a difference between models
    if test.across == "spread":
        values = [item.value for item in found]
        return test.met_by(max(values) - min(values))
    ordered = sorted(found, key=lambda item: parameters[item.model])
    low = [(item.interval or [item.value])[0] for item in ordered]
    high = [(item.interval or [item.value])[-1] for item in ordered]
    return all(below < above for below, above in zip(high, low[1:], strict=False))


def _row(test: Criterion, result: Mapping[str, Any]) -> str:
    """Suffix that picks a layer: ``.3``, or nothing for a scalar."""
    if test.at is None:
        return ""
    if test.at == "first":
        return f".{layer_row(0)}"
    if isinstance(test.at, float):
        return f".{layer_row(layer_at(test.at, len(result['layers']) - 1))}"
    values = lookup(result, test.key)[layer_row(0) :]
    pick = np.argmin if test.at == "min" else np.argmax
    return f".{layer_row(int(pick(values)))}"


def run() -> None:
    """Judge every claim by the results of the models of the paper."""
    params = load_params()
    ledger = load_claims(LEDGER)
    tested = {test.stage for claim in ledger.values() for test in claim.tests}
    results = {stage: results_of(stage, params) for stage in STAGES if stage in tested}
    parameters = {model: facts["parameters"] for model, facts in results_of("fetch", params).items()}
    judged = list(dict.fromkeys([*params.models, *params.moe_models]))
    verdicts = {key: evaluate(claim, results, judged, parameters) for key, claim in ledger.items()}
    write_result(RESULTS / "claims.json", verdicts)


if __name__ == "__main__":
    exit_on_bad_input(run)
