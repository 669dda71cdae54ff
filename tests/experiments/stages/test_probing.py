"""The stages of probes and lens: the originals' instrument, nulls that are nulls, and Granite's slips."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression

from classifier_emergence.reading.layers import layer_row
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.probes import fit_probes
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import word_tokens
from classifier_emergence.results import plain
from classifier_emergence.tasks.arithmetic import LENS, OPERATIONS, labelled
from experiments.params import load_params
from experiments.report.tables import arithmetic
from experiments.report.tables.table import Table
from experiments.shared.lens import p_over_layers
from experiments.shared.probing import as_reported
from experiments.shared.summaries import paired
from experiments.stages import logit_lens, probing, residuals

ROOT = Path(__file__).resolve().parents[3]
PARAMS = load_params(ROOT / "params.tiny.yaml")
ONE_MODEL = pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)


def states(n: int, classes: int, *, scale: float, layers: int = 2, d: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a weak class signal."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(classes).repeat_interleave(n // classes)
    signal = torch.randn(classes, d, generator=generator)
    return scale * (0.3 * signal[y] + torch.randn(layers, n, d, generator=generator)), y


@pytest.mark.parametrize("classes", [2, 4])
def test_the_reported_instrument_is_scikit_learns(classes: int) -> None:
    x, y = states(16, classes, scale=3.0)
    found, optimum = as_reported(x, y), fit_probes(x, y)
    for layer in range(len(x)):
        peer = LogisticRegression(max_iter=1000).fit(x[layer].double().numpy(), y.numpy())
        expected = peer.predict_proba(x[layer].double().numpy())
        np.testing.assert_allclose(found.predict_proba(x)[layer], expected, atol=1e-9)
    gap = found.objective / optimum.objective - 1
    assert (gap > -1e-9).all()
    assert (gap < 0.05).all()


def test_on_states_of_large_norm_it_stops_above_the_minimum() -> None:
    x, y = states(12, 4, scale=3000.0)
    assert (as_reported(x, y).objective > 1.01 * fit_probes(x, y).objective).all()


def test_every_relabelling_is_fitted_and_no_renaming_is_one() -> None:
    x, _ = states(16, 4, scale=1.0, layers=3, d=12)
    y = torch.arange(4).repeat_interleave(4)
    folds = probing.stratified_folds(y, 4)
    peaks = probing.relabelled_peaks(x, y, folds, 1.0)
    ways = list(itertools.permutations(range(4)))
    assert peaks.shape == (24, 24, 24)
    for chosen in ((0, 0, 0), (0, 0, 5), (3, 17, 8), (23, 1, 12)):
        labels = y.clone()
        for way, (_, test) in zip(chosen, folds[1:], strict=True):
            labels[test] = torch.tensor(ways[way])[y[test]]
        hits = torch.zeros(len(x), len(y))
        for train, test in folds:
            hits[:, test] = (fit_probes(x[:, train], labels[train]).predict(x[:, test]) == labels[test]).float()
        assert float(peaks[chosen]) == pytest.approx(float(hits[layer_row(0) :].mean(-1).max()))


def test_a_paired_difference_knows_its_clusters() -> None:
    generator = np.random.default_rng(0)
    after, before = generator.random((2, 3, 24)) < 0.7
    clusters = np.repeat(range(8), 3)
    found = paired(after, before, 0.95, clusters)
    by_cluster = (after * 1.0 - before).reshape(3, 8, 3).mean(-1)
    expected = stats.t.interval(0.95, 7, by_cluster.mean(-1), by_cluster.std(-1, ddof=1) / np.sqrt(8))
    np.testing.assert_allclose(found["interval"], np.stack(expected, -1))
    assert (found["n"], found["clusters"]) == (24, 8)
    same = paired(after, after, 0.95, clusters)
    assert (same["mean"] == 0).all()
    assert (same["interval"][:, 1] > 0.1).all()  # that eight frames agree does not prove that all do


def test_the_largest_score_over_layers_is_judged_as_a_largest() -> None:
    generator = np.random.default_rng(0)
    layers = np.geomspace(1, 100, 12)[:, None]
    null = layers * generator.standard_normal((12, 400))
    p = [p_over_layers(layers[:, 0] * generator.standard_normal(12), null) for _ in range(200)]
    assert 0.4 < np.mean(p) < 0.6
    assert 0.02 < np.mean(np.array(p) < 0.1) < 0.2
    planted = layers[:, 0] * generator.standard_normal(12)
    planted[0] = 6.0  # at the layer with the smallest scores
    assert p_over_layers(planted, null) == pytest.approx(1 / 401)


def test_labels_are_permuted_within_their_groups() -> None:
    y, groups = torch.arange(4).repeat(6), [i // 4 for i in range(24)]
    shuffles = probing.permuted_within(y, groups, 50, seed=0)
    assert (shuffles.view(50, 6, 4).sort(-1).values == torch.arange(4)).all()
    assert len(shuffles.unique(dim=0)) == 50
    means = torch.nn.functional.one_hot(shuffles).double().mean(0)
    assert (means - 0.25).abs().max() < 0.25


@ONE_MODEL
def test_directions_of_permuted_labels_are_a_null_of_the_largest_cosine(lm: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(0)
    d = lm.readout.weight.shape[1]
    permuted = torch.randn(30, 4, d, generator=generator)
    ordinary = probing.largest_cosine(lm, torch.randn(4, d, generator=generator), permuted)
    assert ordinary["p"] > 0.05
    token = lm.readout.directions(torch.tensor([300, 301, 302, 303]))
    found = probing.largest_cosine(lm, token, permuted)
    assert found["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["p"] == pytest.approx(1 / 31)


def test_the_choice_of_the_lens_is_that_of_its_alignments(lm: LanguageModel) -> None:
    x = residual_stream(lm, labelled(LENS)[0])
    words = [word_tokens(operation, lm.tokenizer).ids for operation in OPERATIONS]
    expected = lens_scores(x[2:3], lm.readout, words).log_alignment[0].argmax(-1)
    assert torch.equal(probing.lens_choice(lm, x[2]), expected)


def test_the_stages_run_and_show_granites_slips(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept: dict[str, dict[str, object]] = {}
    for stage in (residuals, probing, logit_lens):
        monkeypatch.setattr(stage, "load", lambda key, registry: lm)
        if stage is not residuals:
            monkeypatch.setattr(stage, "write_result", lambda path, result: kept.update({path.parent.name: result}))
        stage.run(PARAMS, "m")
    flaws = kept["logit_lens"]["reported"]["flaws"]
    assert flaws["no_divisor"]["top_tokens"] == flaws["sound"]["top_tokens"]
    assert (flaws["no_divisor"]["top_probabilities"] > flaws["sound"]["top_probabilities"]).all()
    assert not torch.equal(flaws["no_embedding_multiplier"]["top_probabilities"], flaws["sound"]["top_probabilities"])
    assert not torch.equal(flaws["as_granite"]["top_probabilities"], flaws["no_divisor"]["top_probabilities"])
    for style in ("symbol", "word", "story"):
        held_out, lens = (kept[s]["controlled"][style] for s in ("probing", "logit_lens"))
        assert held_out["held_out_operands"]["clusters"] == held_out["held_out_operands"]["n"] / 4
        assert held_out["held_out_templates"]["selected_minus_lens"]["clusters"] == 8
        assert lens["word"]["choice"]["clusters"] == lens["clusters"] == 8
    word = kept["probing"]["reported"]["word"]
    assert (word["excess"] > -1e-6).all()
    assert word["optimum"]["peak"]["p"] >= 1 / (1 + PARAMS.probing.reported_shuffles)
    assert kept["probing"]["directions"]["word"]["probe"]["over_layers"]["smallest_p"] > 0
    for each in vars(arithmetic).values():
        if isinstance(each, Table) and each.stage in kept:
            rows = list(each.rows(plain(kept[each.stage])))
            assert {len(row) + 1 for row in rows} == {len([each.first, *each.columns.split(" | ")])}
