from pathlib import Path
from typing import Any

import pytest

from classifier_emergence.errors import InputError
from classifier_emergence.results import lookup, read_result
from experiments.report.ledger import Claim, Criterion, evaluate, load_claims

ROOT = Path(__file__).resolve().parents[3]
LAYERS = ["emb", "L0", "L1", "L2", "L3"]
RESULTS: dict[str, dict[str, dict[str, Any]]] = {
    "probing": {
        "small": {
            "layers": LAYERS,
            "a": [0.0, 0.5, 0.9, 1.0, 0.7],
            "i": [[x, x + 0.1] for x in range(5)],
            "n": 8,
        },
        "large": {
            "layers": LAYERS,
            "a": [0.0, 0.4, 0.3, 0.2, 0.1],
            "i": [[x, x + 0.1] for x in range(5)],
            "n": 8,
        },
    }
}
PARAMETERS = {"small": 1, "large": 2}


def judged(**test: Any) -> dict[str, Any]:
    entry = {"what": "w", "protocol": "reported", "stage": "probing", "key": "a", **test}
    claim = Claim(claim="c", source="s", reported="r", tests=[Criterion.model_validate(entry)])
    return evaluate(claim, RESULTS, ["small", "large"], PARAMETERS)


@pytest.mark.parametrize(
    ("test", "values"),
    [
        ({"at": "min", "at_least": 0}, [0.5, 0.1]),
        ({"at": "max", "at_least": 0}, [1.0, 0.4]),
        ({"at": "first", "at_least": 0}, [0.5, 0.4]),
        ({"at": 0.55, "at_least": 0}, [1.0, 0.2]),  # int(0.55 * 4) is L2, row 3
        ({"key": "a.1", "at_least": 0}, [0.5, 0.4]),
    ],
)
def test_a_test_reads_the_layer_that_it_names_and_never_the_embedding(
    test: dict[str, Any], values: list[float]
) -> None:
    assert [item.value for item in judged(**test)["evidence"]] == values


@pytest.mark.parametrize(
    ("test", "verdict"),
    [
        ({"at": "first", "at_least": 0.4}, "holds"),
        ({"at": "first", "at_least": 0.5}, "holds in part"),
        ({"at": "first", "at_least": 0.6}, "does not hold"),
        ({"at": "max", "at_most": 0.3}, "does not hold"),
        ({"at": "max", "across": "spread", "at_least": 0.5}, "holds"),
        ({"at": "max", "across": "spread", "at_least": 0.7}, "does not hold"),
        ({"at": "max", "interval": "i", "across": "increasing"}, "does not hold"),
    ],
)
def test_the_verdict_follows_from_the_evidence(test: dict[str, Any], verdict: str) -> None:
    assert judged(**test)["verdict"] == verdict


def test_growth_needs_intervals_apart() -> None:
    apart = {"layers": LAYERS, "a": [0, 0.9, 0, 0, 0], "i": [[0, 0], [0.8, 1.0], [0, 0], [0, 0], [0, 0]]}
    below = {"layers": LAYERS, "a": [0, 0.5, 0, 0, 0], "i": [[0, 0], [0.4, 0.6], [0, 0], [0, 0], [0, 0]]}
    touching = {**apart, "i": [[0, 0], [0.55, 1.0], [0, 0], [0, 0], [0, 0]]}
    test = Criterion(what="w", protocol="controlled", stage="p", key="a", at="first", interval="i", across="increasing")
    claim = Claim(claim="c", source="s", reported="r", tests=[test])
    for large, verdict in ((apart, "holds"), (touching, "does not hold")):
        done = evaluate(claim, {"p": {"small": below, "large": large}}, ["large", "small"], PARAMETERS)
        assert done["verdict"] == verdict
    assert evaluate(claim, {"p": {"large": apart}}, ["large"], PARAMETERS)["verdict"] == "does not hold"


def test_interval_n_and_source_go_with_the_value() -> None:
    item = judged(at="max", interval="i", n="n", at_least=0)["evidence"][0]
    assert (item.interval, item.n) == ([3, 3.1], 8)
    assert item.result == {"file": "results/probing/small.json", "key": "a.3"}


def test_what_cannot_be_tested_says_so() -> None:
    untested = Claim(claim="c", source="s", reported="r")
    assert evaluate(untested, RESULTS, ["small"], PARAMETERS)["verdict"] == "not tested yet"
    unbuilt = Criterion(what="w", protocol="reported", stage="grpo", key="a", at_least=0)
    waiting = Claim(claim="c", source="s", reported="r", tests=[unbuilt])
    assert evaluate(waiting, RESULTS, ["small"], PARAMETERS)["verdict"] == "not tested yet"
    away = Claim(claim="c", source="s", reported="r", needs="Granite", tests=[Criterion.model_validate(TRUE)])
    assert evaluate(away, RESULTS, ["small"], PARAMETERS)["verdict"] == "not testable offline"


def test_a_flaw_that_gives_the_reported_number_does_not_make_the_claim_hold() -> None:
    flaw = Criterion.model_validate({**TRUE, "protocol": "flaw ablation"})
    wrong = Criterion.model_validate({**TRUE, "at_least": 100})
    for tests, verdict in (([flaw, wrong], "does not hold"), ([flaw], "not tested yet")):
        claim = Claim(claim="c", source="s", reported="r", tests=tests)
        assert evaluate(claim, RESULTS, ["small"], PARAMETERS)["verdict"] == verdict


def test_a_stage_that_runs_on_some_models_judges_those() -> None:
    claim = Claim(claim="c", source="s", reported="r", tests=[Criterion.model_validate(TRUE)])
    done = evaluate(claim, RESULTS, ["absent", "small"], PARAMETERS)
    assert [item.model for item in done["evidence"]] == ["small"]


def test_a_number_that_was_not_measured_is_no_evidence() -> None:
    claim = Claim(claim="c", source="s", reported="r", tests=[Criterion.model_validate(TRUE | {"at": None})])
    results = {"probing": {"small": {"a": None}, "large": {"a": 1.0}}}
    done = evaluate(claim, results, ["small", "large"], PARAMETERS)
    assert [(item.model, item.met) for item in done["evidence"]] == [("large", True)]
    assert evaluate(claim, results, ["small"], PARAMETERS)["verdict"] == "not tested yet"


TRUE = {"what": "w", "protocol": "reported", "stage": "probing", "key": "a", "at": "max", "at_least": 0}


def test_a_missing_key_is_named() -> None:
    with pytest.raises(InputError, match="nothing"):
        judged(key="nothing", at_least=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("C01: {claim: c, source: s}", r"C01\.reported"),
        (
            "C01: {claim: c, source: s, reported: r, tests: [{what: w, protocol: reported, stage: p, key: k}]}",
            "cannot fail",
        ),
        ("C01: {claim: c, source: s, reported: r, tets: []}", r"C01\.tets"),
        ("C01: [", "YAML"),
        ("[]", "the ledger: Input should be a valid dictionary"),
    ],
)
def test_a_mistake_in_the_ledger_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_claims(tmp_path / "claims.yaml")


def test_the_ledger_has_every_claim() -> None:
    assert list(load_claims(ROOT / "paper" / "claims.yaml")) == [f"C{i:02}" for i in range(1, 27)]


def test_committed_evidence_resolves_to_the_committed_results() -> None:
    ledger = read_result(ROOT / "results" / "claims.json")
    checked = 0
    for claim in ledger.values():
        assert set(claim) == {"claim", "source", "reported", "verdict", "evidence"}
        for item in claim["evidence"]:
            assert lookup(read_result(ROOT / item["result"]["file"]), item["result"]["key"]) == item["value"]
            checked += 1
    assert checked > 50


def test_claims_whose_stages_exist_have_verdicts() -> None:
    ledger = read_result(ROOT / "results" / "claims.json")
    now = {"C01", "C02", "C03", "C04", "C05", "C06", "C07", "C22", "C25", "C26"}  # models as they are
    now |= {"C08", "C09", "C10", "C11", "C12", "C20", "C21", "C24"}  # supervised training
    now |= {"C13", "C14", "C15", "C16", "C17", "C23"}  # reinforcement learning
    now |= {"C18", "C19"}  # mixtures of experts
    assert {key for key, claim in ledger.items() if claim["verdict"] != "not tested yet"} == now
    offline = {"C03", "C05", "C12", "C25"}
    assert {key for key, claim in ledger.items() if claim["verdict"] == "not testable offline"} == offline
