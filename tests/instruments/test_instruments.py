"""Instruments: planted signals are found, random ones are not, and two ways of computing agree."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from classifier_emergence.errors import InputError
from classifier_emergence.instruments import direction as instrument_direction
from classifier_emergence.instruments import probe as instrument_probe
from classifier_emergence.instruments.direction import direction
from classifier_emergence.instruments.drawing import check_ending
from classifier_emergence.instruments.lens import lens
from classifier_emergence.instruments.probe import _permuted, fit, folds_of, probe
from classifier_emergence.models.loading import load
from classifier_emergence.reading.estimator import LayerProbes
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.results import read_result, write_result

Random = Callable[..., Tensor]
PROMPTS = [f"{a} * {b} =" for a, b in ((7, 8), (12, 5), (3, 9), (6, 7), (4, 4), (9, 2))]
PROMPTS += [f"{a} + {b} =" for a, b in ((7, 8), (12, 5), (3, 9), (6, 7), (4, 4), (9, 2))]
LABELS = ["times"] * 6 + ["plus"] * 6
HOSTILE = [
    "[bold]x[/bold]",
    "=cmd|' /C calc'!A0",
    "a\nb",
    "\x1b[31mred",
    "שלום",
    "👩‍🔬 ok",
    "#",
    "|",
    "$x_1^2$",
    "_a",
    "\u202ea",
    "\x00",
]


@pytest.fixture(scope="module")
def llama(tiny_models: Path) -> LanguageModel:
    return load(str(tiny_models / "tiny-llama"), {})


def planted(monkeypatch: pytest.MonkeyPatch, module: object, states: Tensor) -> None:
    """Let an instrument read these states instead of a model's."""
    monkeypatch.setattr(module, "read_states", lambda *_, rows=slice(None), **__: states[rows])


# --- Probe ---


def test_a_planted_class_is_told_apart_and_its_layer_is_found(
    llama: LanguageModel, seeded: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = seeded(5, 13, 48)
    sign = torch.tensor([1.0] * 6 + [-1.0] * 6 + [1.0])
    states[3] += 6 * sign[:, None] * seeded(48, seed=1)
    planted(monkeypatch, instrument_probe, states)
    reading = probe(llama, PROMPTS, LABELS, test=["new"])
    assert reading.peak.layer == "L2"
    assert reading.peak.accuracy == 1.0
    assert reading.peak.p <= 0.05
    assert reading.verdict.startswith("told apart")
    assert reading.predictions[0].label == "times"
    assert reading.predictions[0].by_layer[3] == "times"


def test_labels_that_mean_nothing_are_not_told_apart(
    llama: LanguageModel, seeded: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = []
    for seed in range(6):
        planted(monkeypatch, instrument_probe, seeded(5, 12, 48, seed=seed))
        verdicts.append(probe(llama, PROMPTS, LABELS, shuffles=30, seed=seed).verdict)
    assert sum(verdict.startswith("told apart") for verdict in verdicts) <= 1


def test_too_few_examples_are_said_to_be_too_few(
    llama: LanguageModel, seeded: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = seeded(5, 4, 48) + 50 * torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    planted(monkeypatch, instrument_probe, states)
    reading = probe(llama, PROMPTS[:2] + PROMPTS[-2:], ["a", "a", "b", "b"])
    assert reading.folds == 2
    assert reading.peak.accuracy == 1.0
    assert reading.peak.least_p > 0.05
    assert "too few examples to tell" in reading.verdict


def test_every_prediction_is_held_out(llama: LanguageModel, seeded: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """States of their own for every prompt and no signal: a probe that saw its test prompt would be right."""
    n = 40
    planted(monkeypatch, instrument_probe, 100 * torch.eye(n).repeat(5, 1, 1))
    reading = probe(llama, [f"prompt {i}" for i in range(n)], ["a", "b"] * (n // 2), shuffles=1)
    assert reading.accuracy.max() <= 0.6


def test_a_class_with_one_example_and_other_bad_labels_are_refused(llama: LanguageModel) -> None:
    with pytest.raises(InputError, match="class 'b': one example"):
        probe(llama, PROMPTS[:3], ["a", "a", "b"])
    with pytest.raises(InputError, match="at least two"):
        probe(llama, PROMPTS[:3], ["a", "a", "a"])
    with pytest.raises(InputError, match="2 for 3 prompts"):
        probe(llama, PROMPTS[:3], ["a", "b"])
    with pytest.raises(InputError, match="label 2: empty"):
        probe(llama, PROMPTS[:2], ["a", " "])
    with pytest.raises(InputError, match="one group"):
        probe(llama, PROMPTS[:4], ["a", "a", "b", "b"], groups=[0, 0, 1, 2])


def test_groups_stay_together_and_folds_follow_the_scarcest_class() -> None:
    y = torch.tensor([0] * 12 + [1] * 6)
    groups = [i // 2 for i in range(18)]
    folds = folds_of(y, ["a", "b"], groups, limit=5)
    assert len(folds) == 3
    for train, test in folds:
        assert not {groups[i] for i in train.tolist()} & {groups[i] for i in test.tolist()}
    assert sorted(i for _, test in folds for i in test.tolist()) == list(range(18))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.booleans())
def test_permutations_keep_the_classes_of_every_fold_and_whole_groups(seed: int, shared: bool) -> None:
    random = np.random.default_rng(seed)
    groups = [g for g in range(12) for _ in range(1 + g % 3)]
    y = torch.tensor([g % 2 if shared else int(random.integers(2)) for g in groups])
    y[:2] = torch.tensor([0, 1]) if not shared else y[:2]
    folds = [(torch.tensor([i for i, g in enumerate(groups) if g % 3 != k]),
              torch.tensor([i for i, g in enumerate(groups) if g % 3 == k])) for k in range(3)]  # fmt: skip
    sets = _permuted(y, folds, groups, 5, seed)
    for _, test in folds:
        assert all(row[test].sum() == y[test].sum() for row in sets)
    if all(len({int(y[i]) for i, h in enumerate(groups) if h == g}) == 1 for g in groups):
        for row in sets:
            assert all(len({int(row[i]) for i, h in enumerate(groups) if h == g}) == 1 for g in groups)


def test_one_example_of_a_class_gives_scikit_learns_probe(seeded: Random) -> None:
    x, y = seeded(1, 5, 7), torch.tensor([0, 0, 0, 0, 1])
    scaled = (x[0] - x[0].mean(0)) / x[0].std(0, unbiased=False)
    peer = LogisticRegression(C=0.5, tol=1e-10, max_iter=10000).fit(scaled.numpy(), y.numpy())
    ours = fit(x, y, C=0.5).logits(x)[0]
    assert np.allclose((ours[:, 1] - ours[:, 0]).numpy(), peer.decision_function(scaled.numpy()), atol=0.01)


# --- Lens ---


def test_the_lens_at_the_last_layer_is_the_model(lm: LanguageModel) -> None:
    prompts = ["7 * 8 =", "What is 12 plus 5?"]
    reading = lens(lm, prompts, ["multiply", "add"], null_words=5)
    for j, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = lm.model(torch.tensor([lm.tokenizer(prompt)["input_ids"]])).logits[0, -1].double()
        for t, target in enumerate(reading.targets):
            ids = word_tokens(target, lm.tokenizer).ids
            assert reading.alignment[t, -1, j] == pytest.approx(logits.softmax(-1)[ids].sum().item(), rel=1e-3)
            assert reading.rank[t, -1, j] == 1 + int((logits > logits[ids].max()).sum())
        assert reading.top_probability[-1, j] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-3)


def test_peaks_and_nulls_of_the_lens(lm: LanguageModel) -> None:
    reading = lens(lm, PROMPTS[:3], ["multiply", "add"], null_words=30)
    assert reading.peak_alignment == pytest.approx(reading.alignment[:, 1:].max(1))
    assert reading.null_words == (30, 30)
    assert all(0 < p <= 1 for row in reading.p for p in row if p is not None)
    alone = lens(lm, PROMPTS[:3], ["multiply"], null_words=100_000)
    assert alone.null_words == (0,)
    assert alone.p == ((None, None, None),)


def test_picked_layers_are_those_of_the_whole_reading(llama: LanguageModel) -> None:
    whole = lens(llama, PROMPTS[:2], ["add"], null_words=0)
    part = lens(llama, PROMPTS[:2], ["add"], layers=["L2", 0, "emb"], null_words=0)
    assert part.layers == ("emb", "L0", "L2")
    assert np.array_equal(part.alignment, whole.alignment[:, [0, 1, 3]])
    with pytest.raises(InputError, match=r"layer 'L9': tiny-llama has emb and L0 to L3"):
        lens(llama, PROMPTS[:1], layers=["L9"])


def test_words_that_are_no_single_token_are_refused_with_their_pieces(llama: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"'xqzxqz': no single token of tiny-llama in any form \('x"):
        lens(llama, PROMPTS[:1], ["xqzxqz"])
    pointing = direction(llama, PROMPTS, ["xqzxqz"] * 6 + ["add"] * 6, layers=["L1"], shuffles=5)
    assert pointing.directions[0].word_rank is None
    assert pointing.directions[1].word_rank is not None


def test_a_model_in_half_precision_in_memory_reads_nearly_the_same(tiny_models: Path) -> None:
    exact = load(str(tiny_models / "tiny-gemma"), {})
    half = load(str(tiny_models / "tiny-gemma"), {})
    half.model.to(torch.bfloat16)
    readings = [lens(replace(lm, key="mine"), PROMPTS[:3], ["add"], null_words=0) for lm in (exact, half)]
    assert readings[0].alignment == pytest.approx(readings[1].alignment, rel=0.2)
    assert probe(half, PROMPTS, LABELS, shuffles=2).n == 12


# --- Direction ---


def test_a_planted_word_is_the_direction_and_random_states_have_none(
    llama: LanguageModel, seeded: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    readout = llama.readout
    token = word_tokens("multiply", llama.tokenizer).forms[" multiply"]
    noise = seeded(5, 40, 48)
    word = readout.weight[token] * readout.gain
    sign = torch.tensor([1.0] * 20 + [-1.0] * 20)
    prompts, labels = [f"prompt {i}" for i in range(40)], ["multiply"] * 20 + ["river"] * 20
    planted(monkeypatch, instrument_direction, noise + 4 * sign[:, None] * word / word.norm())
    found = direction(llama, prompts, labels, layers=["L1"]).directions[0]
    assert found.top_tokens[0] == " multiply"
    assert found.word_rank == 1
    assert found.p_word is not None
    assert found.p_word < 0.03
    assert found.p_top < 0.03
    planted(monkeypatch, instrument_direction, noise)
    found = direction(llama, prompts, labels, layers=["L1"]).directions[0]
    assert found.p_top > 0.03


def test_a_layer_where_all_prompts_are_alike_has_no_direction(llama: LanguageModel) -> None:
    with pytest.raises(InputError, match="layer emb: all prompts have the same state there"):
        direction(llama, PROMPTS, LABELS, layers=["emb"])


# --- All of them ---


def test_prompts_that_cannot_be_read_are_refused(llama: LanguageModel) -> None:
    context = llama.model.config.max_position_embeddings
    for prompts, message in (
        ([], "none given"),
        (["7 * 8 =", ""], "prompt 2: empty"),
        (["a\ud800"], "prompt 1: not valid Unicode"),
        (["7 " * context], rf"prompt 1: \d+ tokens, but tiny-llama reads at most {context}"),
    ):
        with pytest.raises(InputError, match=message):
            lens(llama, prompts)


@settings(
    max_examples=5, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.text(min_size=1, max_size=30) | st.sampled_from(HOSTILE), min_size=1, max_size=3))
def test_hostile_prompts_survive_json_and_figures(llama: LanguageModel, tmp_path: Path, prompts: list[str]) -> None:
    try:
        reading = lens(llama, prompts, null_words=0)
    except InputError as error:
        assert "\n" not in str(error)  # noqa: PT017  # a clear refusal is an answer, too
        return
    write_result(tmp_path / "lens.json", reading.to_dict())
    assert read_result(tmp_path / "lens.json")["prompts"] == prompts
    reading.save(tmp_path / "lens.svg")
    assert (tmp_path / "lens.svg").stat().st_size


def test_readings_export_and_draw_hostile_labels(llama: LanguageModel, tmp_path: Path) -> None:
    labels = [HOSTILE[0]] * 6 + [HOSTILE[4]] * 6
    readings = [
        probe(llama, PROMPTS, labels, shuffles=3, test=[HOSTILE[1]]),
        direction(llama, PROMPTS, labels, shuffles=3, layers=["L1", "L2"], top=3),
        lens(llama, HOSTILE[:4], ["add", "coins"], null_words=3),
    ]
    pytest.importorskip("pandas")
    for i, reading in enumerate(readings):
        write_result(tmp_path / f"{i}.json", reading.to_dict())
        assert read_result(tmp_path / f"{i}.json")["model"] == "tiny-llama"
        frame = reading.to_frame()
        assert len(frame) == len(reading.rows())
        assert list(frame.columns) == list(reading.rows()[0])
        assert isinstance(reading.plot(), Figure)
        reading.save(tmp_path / f"{i}.png")


def test_a_plot_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown ending; name a file that ends in .png, .svg, .pdf, .html"):
        check_ending(tmp_path / "x.gif")


def test_layer_probes_fit_predict_and_score_like_scikit_learn(seeded: Random) -> None:
    from sklearn.base import clone

    x = seeded(3, 30, 6).numpy()
    y = np.array(["b", "a", "c"] * 10)
    x[1, :, 0] += 10 * (y == "a") - 10 * (y == "b")
    probes = clone(LayerProbes(C=2.0, standardise=False)).fit(x, y)
    assert probes.get_params() == {"C": 2.0, "standardise": False}
    assert probes.classes_.tolist() == ["a", "b", "c"]
    assert probes.score(x, y)[1] == 1.0
    peer = LogisticRegression(C=2.0, tol=1e-8, max_iter=5000).fit(x[0], y)
    assert np.allclose(probes.predict_proba(x)[0], peer.predict_proba(x[0]), atol=1e-3)
    with pytest.raises(InputError, match=r"pass \(layers, examples, features\)"):
        probes.predict(x[0])
