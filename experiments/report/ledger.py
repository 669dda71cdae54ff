"""Stage claims: turn results into verdicts on the claims and on our predictions.

Every atom of a claim (``claims``) is a number of the results; a rule (``verdicts``) makes it a state on every model,
and of the states of the primary one the claim's headline.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from classifier_emergence.errors import InputError
from classifier_emergence.reading.layers import layer_at, layer_row
from classifier_emergence.results import lookup, read_result, write_result
from classifier_emergence.statistics import newcombe_difference, wilson
from experiments.params import load_params
from experiments.report import verdicts
from experiments.report.claims import LEDGER, PREDICTIONS, Atom, Claim, Where, load_claims
from experiments.report.verdicts import FEWEST_MODELS, Bounds, Headline, Number, State, decide
from experiments.shared.stage import RESULTS, STAGES, TRAINING, exit_on_bad_input, result_path, results_of

DRAWS = 1000
"""Of trained numbers within their intervals, to see whether a headline hangs on one."""
Facts = Mapping[str, Mapping[str, Any]]
"""Model -> its result of stage fetch."""
Results = Mapping[str, Facts]
"""Stage -> model -> result."""


@dataclass(frozen=True)
class Piece:
    """An atom's number on one model."""

    atom: Atom
    model: str
    number: Number
    baseline: float | None
    result: dict[str, str]
    """``file`` and dotted ``key`` of the value."""


def measure(claim: Claim, results: Results, models: Sequence[str], confidence: float) -> list[Piece]:
    """The numbers of a claim's atoms on every model.

    Args:
        claim: An entry of the ledger.
        results: Stage -> model -> result; a stage that is absent has not been built yet, and a model that is absent
            from a stage is not judged by it.
        models: The models to judge.
        confidence: Of intervals that are made here.
    """
    pieces = []
    for atom in claim.atoms:
        for model in (model for model in models if model in results.get(atom.stage, {})):
            other = (atom.minus and atom.minus.model) or model
            if atom.model not in (None, model) or (atom.minus and other not in results.get(atom.minus.stage, {})):
                continue
            if not _measured(atom, results[atom.stage], model):
                continue
            number, key = _read(atom, results[atom.stage][model], confidence)
            if number is None:  # not measured on this model, so no evidence
                continue
            if atom.minus:
                number = _difference(number, _read(atom.minus, results[atom.minus.stage][other], confidence)[0])
            baseline = lookup(results[atom.stage][model], atom.baseline) if atom.baseline else None
            source = {"file": result_path(atom.stage, model).as_posix(), "key": key}
            pieces.append(Piece(atom, model, number, baseline, source))
    return pieces


def _measured(atom: Atom, results: Facts, model: str) -> bool:
    """Whether a model has the number; one that no model has is a mistake in the ledger, which reading it will tell."""
    having = [key for key, result in results.items() if _has(result, atom.key)]
    return model in having or not having


def _has(result: Mapping[str, Any], key: str) -> bool:
    try:
        lookup(result, key)
    except InputError:
        return False
    return True


def judge(claim: Claim, pieces: Sequence[Piece], confidence: float, facts: Facts) -> tuple[Headline, list[State]]:
    """The headline of a claim and the state of every piece of evidence.

    The primary test is one and decides alone, so it is taken as it is; of the other controlled tests one could pick, so
    they are corrected for being many.
    """
    decided = [_decide(piece, pieces, confidence, facts) for piece in pieces]
    states = [state for state, _ in decided]
    others = [i for i, piece in enumerate(pieces) if piece.atom.protocol == "controlled" and not piece.atom.primary]
    for i, state in zip(others, verdicts.corrected([decided[i] for i in others], confidence), strict=True):
        states[i] = state
    deciding = _deciding(claim, pieces)
    both = [(piece, state) for piece, state in zip(pieces, states, strict=True) if piece.model in deciding]
    primary = {piece.model: state for piece, state in both if piece.atom.primary}
    reported = [state for piece, state in both if piece.atom.protocol == "reported"]
    return verdicts.headline(primary, reported, away=_away(claim, pieces)), states


def evaluate(claim: Claim, pieces: Sequence[Piece], confidence: float, facts: Facts) -> dict[str, Any]:
    """The claim with its headline, what stands beside it, and the evidence."""
    headline, states = judge(claim, pieces, confidence, facts)
    both = list(zip(pieces, states, strict=True))
    others = [s for piece, s in both if not piece.atom.primary and piece.atom.protocol != "flaw ablation"]
    criterion = {
        **atom.model_dump(include={"what", "theirs", "why"}), "expected": atom.expected(confidence)
    } if (atom := next((atom for atom in claim.atoms if atom.primary), None)) else None  # fmt: skip
    return {
        **claim.model_dump(include={"claim", "source", "reported", "recommendation", "needs"}),
        "headline": headline,
        "primary": {p.model: state for p, state in both if p.atom.primary and p.model in _deciding(claim, pieces)},
        "criterion": criterion,
        "others": verdicts.tally(others),
        "reproduced": _reproduced(claim, [b for b in both if b[0].model in _deciding(claim, pieces)], confidence),
        "steady": sum(found == headline for found in repetitions(claim, pieces, confidence, facts)) / DRAWS,
        "evidence": [_evidence(piece, state, confidence) for piece, state in both],
    }


def repetitions(claim: Claim, pieces: Sequence[Piece], confidence: float, facts: Facts) -> list[Headline]:
    """Headlines where every trained number is drawn anew within its interval over seeds: ``DRAWS`` of them.

    Another machine rounds otherwise, so that each of its runs comes out as one of another seed might; prompts are the
    same. The number's own interval, over prompts, goes with it.
    """
    draw = random.Random(claim.claim)
    deciding = [piece for piece in pieces if piece.atom.primary or piece.atom.protocol == "reported"]
    trained = {id(p): p.number.over_seeds(confidence) for p in deciding if p.atom.stage in TRAINING}
    if not any(trained.values()):
        return [judge(claim, deciding, confidence, facts)[0]] * DRAWS
    found = []
    for _ in range(DRAWS):
        moves = [draw.uniform(*at) - p.number.value if (at := trained.get(id(p))) else 0.0 for p in deciding]
        moved = [replace(p, number=p.number.moved(by)) for p, by in zip(deciding, moves, strict=True)]
        found.append(judge(claim, moved, confidence, facts)[0])
    return found


def _away(claim: Claim, pieces: Sequence[Piece]) -> bool:
    """Whether a model that the claim speaks of has not been measured."""
    measured = {piece.model for piece in pieces if piece.atom.primary}
    return claim.needs is not None and not (claim.models and measured >= {*claim.models})


def _deciding(claim: Claim, pieces: Sequence[Piece]) -> set[str]:
    """The models that the headline is about: those that the claim speaks of, where they have been measured."""
    named = claim.models and not _away(claim, pieces)
    return {*claim.models} if named else {piece.model for piece in pieces}


def _decide(piece: Piece, pieces: Sequence[Piece], confidence: float, facts: Facts) -> tuple[State, float]:
    atom, number, bounds = piece.atom, piece.number, piece.atom.bounds(confidence)
    if atom.increasing:
        return _growth([other for other in pieces if other.atom is atom], confidence, facts)
    if atom.p_of:
        p = min(1.0, number.value * atom.p_of)
        return ("violated" if verdicts.significant(p, confidence) else "open"), p
    if piece.baseline is not None and bounds.hold(number.value) and bounds.hold(piece.baseline):
        return "void", 1.0
    return decide(number, bounds, confidence)


def _growth(pieces: Sequence[Piece], confidence: float, facts: Facts) -> tuple[State, float]:
    """Growth over models: few of them, or of several families, say nothing about it."""
    if len(pieces) < FEWEST_MODELS or len({facts[piece.model]["architecture"] for piece in pieces}) > 1:
        return "open", 1.0
    ordered = sorted(pieces, key=lambda piece: facts[piece.model]["parameters"])
    steps = [_difference(after.number, before.number) for before, after in pairwise(ordered)]
    states = [decide(step, Bounds(low=0.0), confidence) for step in steps]
    worst = max(states, key=lambda found: found[1])
    return worst if len({state for state, _ in states}) == 1 else ("open", 1.0)


def _reproduced(
    claim: Claim, both: Sequence[tuple[Piece, State]], confidence: float
) -> Literal["yes", "no", "not comparable"]:
    """Whether the reported protocol gives, on every model, what the write-up reports, and the untrained does not."""
    numbers = [
        piece.atom.bounds(confidence).hold(piece.number.value) for piece, state in both
        if piece.atom.protocol == "reported" and state != "void"
    ]  # fmt: skip
    away = _away(claim, [piece for piece, _ in both])
    return "not comparable" if away or not numbers else "yes" if all(numbers) else "no"


def _evidence(piece: Piece, state: State, confidence: float) -> dict[str, Any]:
    return {
        **piece.atom.model_dump(include={"what", "protocol", "primary"}),
        "model": piece.model,
        "value": piece.number.value,
        "interval": piece.number.shown(confidence),
        "n": piece.number.n,
        "expected": piece.atom.expected(confidence),
        "state": state,
        "result": piece.result,
    }


def _read(where: Where, result: Mapping[str, Any], confidence: float) -> tuple[Number | None, str]:
    """A number with what stands beside it, and its dotted key."""
    node, key, beside = lookup(result, where.key), where.key, {}
    if isinstance(node, dict):
        beside, name = node, next(each for each in ("value", "accuracy", "mean", "alignment") if each in node)
        key, node = f"{key}.{name}", node[name]
    if where.at is not None:
        row = _row(where.at, node, len(result["layers"]) - 1)
        key, node = f"{key}.{row}", node[row]
        if "interval" in beside:
            beside = {**beside, "interval": beside["interval"][row]}
    if node is None:
        return None, key
    by_seed = tuple(beside.get("by_seed", ()))
    above = lookup(result, where.key.rpartition(".")[0]) if "." in where.key else result
    n = beside.get("n", above.get("n") if beside and isinstance(above, dict) else None)
    interval = beside.get("interval")
    if where.n:
        n = lookup(result, where.n)
        ends = [wilson(round(share * n), n, confidence=confidence) for share in by_seed or (node,)]
        interval = min(low for low, _ in ends), max(high for _, high in ends)
    one_seed = where.stage in TRAINING and len(by_seed) < 2
    return Number(float(node), interval and tuple(interval), by_seed, n, one_seed), key


def _row(at: str | float, values: Sequence[float], n_layers: int) -> int:
    first = layer_row(0)
    if at == "first":
        return first
    if isinstance(at, float):
        return layer_row(layer_at(at, n_layers))
    pick = np.argmin if at == "min" else np.argmax
    return layer_row(int(pick(values[first:])))


def _difference(a: Number, b: Number | None) -> Number:
    """Of two numbers: Newcombe's interval, and the differences seed by seed."""
    assert b is not None
    interval = newcombe_difference(a.value, a.interval, b.value, b.interval) if a.interval and b.interval else None
    taken = b.by_seed if len(b.by_seed) == len(a.by_seed) else [b.value] * len(a.by_seed)
    by_seed = tuple(x - y for x, y in zip(a.by_seed, taken, strict=True))
    return Number(a.value - b.value, interval, by_seed, a.n, a.one_seed or b.one_seed)


def run() -> None:
    """Judge every claim and every prediction by the results of the models of the paper."""
    params = load_params()
    judged = list(dict.fromkeys([*params.models, *params.moe_models]))
    for ledger in (LEDGER, PREDICTIONS):
        claims = load_claims(ledger)
        results = {stage: results_of(stage, params) for stage in _tested(claims)}
        write_result(RESULTS / f"{ledger.stem}.json", judge_all(claims, results, judged, params.confidence))


def judge_all(
    claims: Mapping[str, Claim], results: Results, models: Sequence[str], confidence: float
) -> dict[str, Any]:
    """A whole ledger; ``results`` has stage fetch, and of the other stages what there is."""
    return {
        key: evaluate(claim, measure(claim, results, models, confidence), confidence, results["fetch"])
        for key, claim in claims.items()
    }


def judge_present(models: Sequence[str], confidence: float, path: Path) -> dict[str, Any]:
    """Judge every claim by those results of the models that there are, write the ledger to ``path`` and return it."""
    claims = load_claims(LEDGER)
    results = {
        stage: {model: read_result(file) for model in models if (file := result_path(stage, model)).exists()}
        for stage in _tested(claims)
    }
    write_result(path, verdict := judge_all(claims, results, models, confidence))
    return verdict


def _tested(claims: Mapping[str, Claim]) -> list[str]:
    """The stages that claims read, and the one with the facts of models."""
    read = {at.stage for claim in claims.values() for atom in claim.atoms for at in (atom, atom.minus) if at}
    return [stage for stage in STAGES if stage in read | {"fetch"}]


if __name__ == "__main__":
    exit_on_bad_input(run)
