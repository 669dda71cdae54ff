import pytest
import torch
from architectures import language_model

from classifier_emergence.errors import InputError
from classifier_emergence.reading.directions import project
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import row_norms

WORDS = [[3], [5, 6, 7], [0, 800]]


def test_scores_equal_the_plain_computation(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    states = residual_stream(lm, ["7 * 8 =", "12 + 4 =", "Find 3 times 9"])
    readout = lm.readout
    monkeypatch.setattr("classifier_emergence.reading.lens.CHUNK_ROWS", 4)
    monkeypatch.setattr("classifier_emergence.reading.lens.CHUNK_TOKENS", 160)  # leaves an incomplete last block
    scores = lens_scores(states, readout, WORDS)
    logits = torch.stack([readout.logits(layer) for layer in states])
    probability = logits.softmax(-1)
    for w, ids in enumerate(WORDS):
        torch.testing.assert_close(scores.log_alignment[..., w].exp(), probability[..., ids].sum(-1))
        best = logits[..., ids].amax(-1, keepdim=True)
        assert torch.equal(scores.rank[..., w], 1 + (logits > best).sum(-1))
    assert torch.equal(scores.top_id, logits.argmax(-1))
    torch.testing.assert_close(scores.top_prob, probability.amax(-1))


def test_ranks_of_chosen_words_follow_their_prompt(lm: LanguageModel) -> None:
    states = residual_stream(lm, ["7 * 8 =", "12 + 4 ="])
    every = lens_scores(states, lm.readout, WORDS)
    some = lens_scores(states, lm.readout, WORDS, ranked=[[2], [1]])
    assert torch.equal(some.rank[:, 0, 0], every.rank[:, 0, 2])
    assert torch.equal(some.rank[:, 1, 0], every.rank[:, 1, 1])


def test_alignment_survives_tiny_probabilities(lm: LanguageModel) -> None:
    states = 1e4 * residual_stream(lm, ["7 * 8 ="])
    assert lens_scores(states, lm.readout, WORDS).log_alignment.isfinite().all()


def test_a_word_without_tokens_is_refused(lm: LanguageModel) -> None:
    states = residual_stream(lm, ["7 * 8 ="])
    with pytest.raises(InputError, match="word 1: no single-token form"):
        lens_scores(states, lm.readout, [[3], []])


def test_a_planted_word_is_found_and_a_random_direction_is_not(lm: LanguageModel, seeded) -> None:
    readout = lm.readout
    planted = (readout.weight[7] * readout.gain)[None]
    found = project(planted, readout, [[7], [9]], cosine=True)
    assert found.rank[0, 0] == 1
    assert found.score[0, 0] == pytest.approx(1.0, abs=1e-5)
    random = seeded(200, readout.weight.shape[1])
    ranks = project(random, readout, [[7]], cosine=True).rank.double() / len(readout.weight)
    assert 0.4 < float(ranks.mean()) < 0.6


def test_projection_equals_the_plain_computation(lm: LanguageModel, seeded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("classifier_emergence.reading.directions.CHUNK_ROWS", 100)
    readout, directions = lm.readout, seeded(3, lm.readout.weight.shape[1])
    dot = project(directions, readout, WORDS, cosine=False)
    plain = directions @ readout.weight.T
    for w, ids in enumerate(WORDS):
        best = plain[:, ids].amax(-1)
        torch.testing.assert_close(dot.score[:, w], best)
        assert torch.equal(dot.rank[:, w], 1 + (plain > best[:, None]).sum(-1))
    cosine = torch.nn.functional.cosine_similarity(directions[:, None], (readout.weight * readout.gain)[None], dim=-1)
    assert torch.equal(project(directions, readout, WORDS, cosine=True).top_ids[:, 0], cosine.argmax(-1))


def test_the_gain_is_what_the_norm_multiplies_by(lm: LanguageModel, seeded) -> None:
    readout = lm.readout
    state = seeded(1, readout.weight.shape[1])
    rms = state.pow(2).mean().sqrt()
    torch.testing.assert_close(readout.norm(state), state / rms * readout.gain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(row_norms(readout), (readout.weight * readout.gain).norm(dim=-1))
    projected = language_model("opt-projected").readout
    assert projected.projection is not None
    torch.testing.assert_close(row_norms(projected), (projected.weight @ projected.projection).norm(dim=-1))
