from pathlib import Path
from typing import Any

import pytest

from classifier_emergence.errors import InputError
from classifier_emergence.results import lookup, read_result
from classifier_emergence.statistics import newcombe_difference, student_interval, wilson
from experiments.report.claims import LEDGER, PREDICTIONS, Atom, Claim, load_claims
from experiments.report.ledger import Piece, evaluate, judge, measure

ROOT = Path(__file__).resolve().parents[3]
LAYERS = ["emb", "L0", "L1", "L2", "L3"]
CURVE = {"accuracy": [0.0, 0.5, 0.9, 1.0, 0.7], "interval": [[x, x + 0.1] for x in range(5)], "n": 8}
OTHER = {**CURVE, "accuracy": [0.0, 0.4, 0.3, 0.2, 0.1]}
SEEDS = {"value": 0.5, "by_seed": [0.4, 0.5, 0.6], "interval": [0.35, 0.62], "n": 40}
RESULTS: dict[str, dict[str, dict[str, Any]]] = {
    "probing": {"small": {"layers": LAYERS, "a": CURVE}, "large": {"layers": LAYERS, "a": OTHER}},
    "grpo": {"small": {"x": SEEDS, "y": {**SEEDS, "by_seed": [0.1, 0.2, 0.3], "value": 0.2},
                       "one": {**SEEDS, "by_seed": [0.5]},
                       "share": {"value": 0.9, "by_seed": [0.8, 1.0]}, "p": 0.01, "none": None, "before": 0.7}},
}  # fmt: skip
FACTS = {model: {"parameters": i, "architecture": "llama"} for i, model in enumerate(["small", "large", *"abc"])}
ATOM = {"what": "w", "protocol": "controlled", "stage": "probing", "key": "a", "why": "y", "theirs": "t"}


def claim_of(**atom: Any) -> Claim:
    return Claim(claim="c", source="s", reported="r", atoms=[Atom.model_validate({**ATOM, "primary": True, **atom})])


def pieces_of(**atom: Any) -> list[Piece]:
    return measure(claim_of(**atom), RESULTS, ["small", "large"], 0.95)


def judged(results: Any = RESULTS, models: tuple[str, ...] = ("small", "large"), **atom: Any) -> dict[str, Any]:
    claim = claim_of(**atom)
    return evaluate(claim, measure(claim, results, models, 0.95), 0.95, FACTS)


@pytest.mark.parametrize(
    ("atom", "values"),
    [
        ({"at": "min"}, [0.5, 0.1]),
        ({"at": "max"}, [1.0, 0.4]),
        ({"at": "first"}, [0.5, 0.4]),
        ({"at": 0.55}, [1.0, 0.2]),  # int(0.55 * 4) is L2, row 3
        ({"key": "a.accuracy.1"}, [0.5, 0.4]),
    ],
)
def test_an_atom_reads_the_layer_that_it_names_and_never_the_embedding(
    atom: dict[str, Any], values: list[float]
) -> None:
    assert [piece.number.value for piece in pieces_of(at_least=0, **atom)] == values


def test_interval_n_and_source_go_with_the_value() -> None:
    item = judged(at="max", at_least=0)["evidence"][0]
    assert (item["interval"], item["n"], item["state"]) == ((3, 3.1), 8, "met")
    assert item["result"] == {"file": "results/probing/small.json", "key": "a.accuracy.3"}


def trained(**atom: Any) -> dict[str, Any]:
    return judged(stage="grpo", **{"key": "x", **atom})["evidence"][0]


def test_an_interval_is_the_stored_one_or_that_of_shares_or_that_over_seeds() -> None:
    assert trained(at_least=0)["interval"] == (0.35, 0.62)
    low, high = wilson(32, 40, confidence=0.95)[0], wilson(40, 40, confidence=0.95)[1]
    assert trained(key="share", n="x.n", at_least=0)["interval"] == (low, high)
    assert trained(key="share", at_least=0)["interval"] == student_interval([0.8, 1.0], confidence=0.95)


def test_a_training_that_was_run_once_is_described() -> None:
    assert (trained(at_least=0.1)["state"], trained(key="one", at_least=0.1)["state"]) == ("met", "descriptive")


def test_a_contrast_is_taken_seed_by_seed() -> None:
    item = pieces_of(stage="grpo", key="x", minus={"stage": "grpo", "key": "y"}, at_least=0)[0].number
    assert (item.value, item.by_seed) == (pytest.approx(0.3), pytest.approx((0.3, 0.3, 0.3)))
    assert item.interval == newcombe_difference(0.5, [0.35, 0.62], 0.2, [0.35, 0.62])


def test_what_the_untrained_model_does_as_well_is_void() -> None:
    assert trained(at_least=0.1, baseline="before")["state"] == "void"
    assert trained(at_most=0.9, baseline="before")["state"] == "void"
    assert trained(at_least=0.9, baseline="before")["state"] == "violated"  # it does not do as well


def test_a_p_value_may_refute_that_there_is_nothing_and_never_prove_it() -> None:
    assert [trained(key="p", p_of=n)["state"] for n in (1, 4, 6)] == ["violated", "violated", "open"]


def test_all_of_so_many_establish_a_limit() -> None:
    atom = Atom.model_validate({**ATOM, "all_of": 16})
    assert atom.bounds(0.95).low == wilson(16, 16, confidence=0.95)[0]
    assert atom.expected(0.95) == "at least 0.806 (all of 16)"
    assert Atom.model_validate({**ATOM, "none_of": 8}).bounds(0.95).high == wilson(0, 8, confidence=0.95)[1]


def grown(values: list[float], models: str = "abc") -> list[str]:
    names = ["small", "large", *models][: len(values)]
    found = {name: {"a": {"mean": x, "interval": [x - 0.05, x + 0.05]}} for name, x in zip(names, values, strict=True)}
    return [e["state"] for e in judged({"probing": found}, tuple(names[::-1]), increasing=True)["evidence"]]


def test_growth_over_models_needs_five_of_one_family_and_intervals_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {*grown([0.1, 0.3, 0.5, 0.7, 0.9])} == {"met"}
    assert {*grown([0.9, 0.7, 0.5, 0.3, 0.1])} == {"violated"}
    assert {*grown([0.1, 0.3, 0.5, 0.7])} == {*grown([0.1, 0.3, 0.5, 0.7, 0.71])} == {"open"}
    monkeypatch.setitem(FACTS["a"], "architecture", "gemma")
    assert {*grown([0.1, 0.3, 0.5, 0.7, 0.9])} == {"open"}


def test_what_cannot_be_tested_says_so() -> None:
    empty = Claim(claim="c", source="s", reported="r")
    assert judge(empty, [], 0.95, FACTS)[0] == "untested"
    assert judged(stage="fetch", at_least=0)["headline"] == "untested"  # not built
    away = claim_of(at_least=0, at="max").model_copy(update={"needs": "Granite"})
    found = evaluate(away, measure(away, RESULTS, ["small"], 0.95), 0.95, FACTS)
    assert (found["headline"], found["primary"], found["reproduced"]) == (
        "untested",
        {"small": "met"},
        "not comparable",
    )


def test_a_number_that_was_not_measured_is_no_evidence() -> None:
    assert pieces_of(stage="grpo", key="none", at_least=0) == []
    assert [piece.model for piece in pieces_of(stage="grpo", key="x", at_least=0)] == ["small"]
    other = {**RESULTS, "grpo": {**RESULTS["grpo"], "large": {"p": 0.5}}}  # without the arm that has x
    assert [piece.model for piece in measure(claim_of(stage="grpo", key="x", at_least=0), other, [*FACTS], 0.95)] == [
        "small"
    ]


@pytest.mark.parametrize(("reported", "said"), [([0.5], "yes"), ([0.5, 0.6], "no"), ([], "not comparable")])
def test_a_number_is_reproduced_if_the_reported_protocol_gives_it(reported: list[float], said: str) -> None:
    atoms = [
        Atom.model_validate({**ATOM, "protocol": "reported", "key": "a.accuracy.1", "at_least": x}) for x in reported
    ]
    claim = claim_of(at="max", at_least=0)
    claim = claim.model_copy(update={"atoms": [*claim.atoms, *atoms]})
    assert evaluate(claim, measure(claim, RESULTS, ["small"], 0.95), 0.95, FACTS)["reproduced"] == said


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InputError, match="nothing"):
        pieces_of(key="nothing", at_least=0)


FIELDS = "what: w, protocol: controlled, stage: p, key: k, why: y"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("C01: {claim: c, source: s}", r"C01\.reported"),
        (f"C01: {{claim: c, source: s, reported: r, atoms: [{{{FIELDS}}}]}}", "cannot fail"),
        (f"C01: {{claim: c, source: s, reported: r, atoms: [{{{FIELDS}, at_least: 1}}]}}", "exactly one"),
        (f"C01: {{claim: c, source: s, reported: r, atoms: [{{{FIELDS}, at_least: 1, primary: true}}]}}", "theirs"),
        ("C01: {claim: c, source: s, reported: r, atmos: []}", r"C01\.atmos"),
        ("C01: [", "YAML"),
        ("[]", "the ledger: Input should be a valid dictionary"),
    ],
)
def test_a_mistake_in_the_ledger_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_claims(tmp_path / "claims.yaml")


def test_the_ledger_has_every_claim_in_one_sentence() -> None:
    ledger = load_claims(ROOT / "paper" / "claims.yaml")
    assert list(ledger) == [f"C{i:02}" for i in range(1, 34)]
    assert all(claim.claim.count(". ") == 0 and claim.claim.endswith(".") for claim in ledger.values())
    assert {key for key, claim in ledger.items() if claim.recommendation} == {"C23", "C24", "C33"}
    for claim in ledger.values():  # by which ``compare`` knows them
        assert len({(atom.protocol, atom.what) for atom in claim.atoms}) == len(claim.atoms)


def test_committed_evidence_resolves_to_the_committed_results() -> None:
    committed, ledger = read_result(ROOT / "results" / "claims.json"), load_claims(ROOT / "paper" / "claims.yaml")
    checked = 0
    for key, claim in committed.items():
        contrasts = {atom.what for atom in ledger[key].atoms if atom.minus}
        for item in claim["evidence"]:
            if item["what"] not in contrasts:
                assert lookup(read_result(ROOT / item["result"]["file"]), item["result"]["key"]) == item["value"]
                checked += 1
    assert checked > 100


def test_committed_verdicts_are_of_all_claims_and_all_predictions() -> None:
    for ledger in (LEDGER, PREDICTIONS):
        claims = load_claims(ROOT / ledger)
        committed = read_result(ROOT / "results" / f"{ledger.stem}.json")
        assert {key: claim.claim for key, claim in claims.items()} == {k: v["claim"] for k, v in committed.items()}


def test_what_is_out_of_reach_is_untested() -> None:
    committed = read_result(ROOT / "results" / "claims.json")
    away = {"C03", "C05", "C12", "C18", "C19", "C25", "C27", "C28", "C29"}
    assert {key for key, claim in committed.items() if claim["needs"]} == away
    assert {key for key, claim in committed.items() if claim["headline"] == "untested"} == away
