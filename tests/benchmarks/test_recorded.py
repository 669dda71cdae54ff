"""What the guide says of bfloat16, memory and time is what was measured, and the measuring works."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import lens, precision, recorded, size
from benchmarks.peers import LENSES
from benchmarks.size import LARGER, Point, error, features, fit
from classifier_emergence import open_model

ROOT = Path(__file__).resolve().parents[2]
GUIDE = " ".join((ROOT / "docs" / "guide.md").read_text(encoding="utf-8").split())


@pytest.fixture(autouse=True)
def _in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", ["precision", "size"])
def test_the_tables_of_the_guide_are_those_of_the_measurements(name: str) -> None:
    made = {"precision": precision, "size": size}[name].as_table(recorded.kept(name))
    assert made in recorded.GUIDE.read_text(encoding="utf-8")
    assert recorded.shown(name, made) == recorded.GUIDE.read_text(encoding="utf-8")


def test_the_table_of_the_readme_is_that_of_the_measurements() -> None:
    assert recorded.shown("bench", recorded.comparisons(), recorded.README) == recorded.README.read_text("utf-8")
    every = [
        found
        for models in recorded.kept(recorded.PEERS).values()
        for works in models.values()
        for found in works.values()
    ]
    assert len(every) >= 10  # pieces of work
    assert all(of["n"] >= 7 for found in every for of in found["seconds"].values())


def test_ours_is_compared_with_the_fastest_other_package() -> None:
    seconds = {"ours": [2.0, 1.0, 3.0], "slow": [9.0], "fast": [4.0, 5.0, 3.0]}
    found = recorded.compared(
        seconds, 1e-6, gigabytes={"ours": 1.0, "slow": 1.0, "fast": 2.0}, operations=8e9, limit=1e10
    )
    assert found["summary"] == {
        "ratio_to_best_peer": 2.0, "best_peer": "fast", "memory_ratio": 0.5, "fraction_of_limit": 0.4,
        "outputs_equal_within": 1e-6,
    }  # fmt: skip
    assert found["seconds"]["ours"] == {"median": 2.0, "least": 1.0, "largest": 3.0, "n": 3}
    assert recorded.compared(seconds, 0.0)["summary"]["fraction_of_limit"] is None


def test_packages_read_the_same_lens_and_are_measured_in_a_process_of_their_own(tiny_models: Path) -> None:
    job = {"texts": ["7 * 8 =", "12 - 5 ="], "prompts": [[1, 2, 3], [4, 5]], "wanted": [7, 8]}
    lm = open_model(str(tiny_models / "tiny-llama"))
    job["prompts"] = lm.tokenizer(job["texts"])["input_ids"]
    folder, read = str(tiny_models / "tiny-llama"), []
    worker = lens.Worker("ours", Path(folder), job)
    assert worker.measure()["seconds"] > 0
    worker.end()
    for package in ("ours", "plain Transformers"):
        read.append(LENSES[package](folder)(job).detach())
    assert read[0].shape == (2, lm.n_layers, 2)
    torch.testing.assert_close(*read)


def test_bfloat16_is_within_the_tolerances_that_the_guide_states() -> None:
    said = re.search(
        r"within ([\d.]+) nats and their ranks within a factor of ([\d.]+), and .* every layer within ([\d.]+)\.", GUIDE
    )
    assert said
    assert [float(number) for number in said.groups()] == [*precision.TOLERANCES.values()]
    assert {
        model: wrong for model, found in recorded.kept("precision").items() if (wrong := precision.beyond(found))
    } == {}


def test_precision_is_measured_of_any_model(tiny_models: Path) -> None:
    found = precision.measure(str(tiny_models / "tiny-llama"), 12)
    assert [part["prompts"] for part in found.values()] == [48, 48]
    for part in found.values():
        assert (
            0 < part["log_alignment"]["median"] <= part["log_alignment"]["95"] <= part["log_alignment"]["largest"] < 1
        )
        assert 1 <= part["rank"]["95"] < 2
    assert precision.beyond(found | {"word": found["word"] | {"accuracy": 0.5}})[-1] == "word prompts, accuracy: 0.5"


def test_a_measurement_that_is_repeated_replaces_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recorded.keep("size", "a", 1)
    recorded.keep("size", "b", 2)
    assert recorded.keep("size", "a", 3) == recorded.kept("size") == {"a": 3, "b": 2}


def points(law: list[float]) -> list[Point]:
    sizes = [(1.3e8, 49_000), (2.7e8, 262_000), (4.9e8, 152_000), (1.5e9, 152_000)]
    empty = [Point("lens", n, int(p), v, 0.0, 0.0) for p, v in sizes for n in (32, 128)]
    told = [
        sum(a * b for a, b in zip(law, features(p.parameters, p.vocabulary, p.prompts), strict=True)) for p in empty
    ]
    return [replace(point, seconds=y, gigabytes=y) for point, y in zip(empty, told, strict=True)]


def test_a_law_of_the_form_that_is_fitted_is_found_and_its_error_is_none() -> None:
    law = [0.7, 4e-9, 0.0, 0.0, 2e-11, 3e-8]
    found = points(law)
    assert fit(found, "seconds")(*LARGER["8 billion"], 64) == pytest.approx(
        sum(a * b for a, b in zip(law, features(*LARGER["8 billion"], 64), strict=True)), rel=1e-6
    )
    assert error(found, "gigabytes") == pytest.approx(1, abs=1e-6)


def test_the_error_is_that_of_the_largest_model_told_by_the_others() -> None:
    found = points([0.7, 4e-9, 0.0, 0.0, 0.0, 0.0])
    worse = [replace(point, seconds=3 * point.seconds) if point.parameters == 1.5e9 else point for point in found]
    assert error(worse, "seconds") == pytest.approx(3)


def test_the_table_tells_of_larger_models_from_three_on() -> None:
    found = [vars(point) for point in points([0.7, 4e-9, 0.0, 0.0, 0.0, 0.0])]
    machine = {"threads": 2, "vectors": "AVX2"}
    every = {f"model-{i}": {**machine, "points": found[2 * i : 2 * i + 2]} for i in range(4)}
    assert "| lens | 32 | 1.22 GB, 1.2 s | 1.78 GB, 1.8 s | 2.66 GB, 2.7 s | 6.7 GB, 6.7 s | 32.7 GB, 33 s |" in (
        size.as_table(every)
    )
    two = size.as_table({name: every[name] for name in ("model-0", "model-1")})
    assert "| lens | 32 | 1.22 GB, 1.2 s | 1.78 GB, 1.8 s | – | – | – |" in two


@pytest.mark.parametrize(("instrument", "n"), [("load", 0), ("probe", 16), ("direction", 16), ("training step", 2)])
def test_an_instrument_is_measured(instrument: str, n: int, tiny_models: Path) -> None:
    point = size.one(str(tiny_models / "tiny-llama"), instrument, n)
    assert point.seconds > 0
    assert point.gigabytes > 0.1
    assert (point.instrument, point.prompts) == (instrument, n)
