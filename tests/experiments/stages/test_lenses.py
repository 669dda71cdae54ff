"""The stage on lenses: what its lenses are fitted on, what is chosen on what, and that it goes on where it was."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from classifier_emergence.errors import InputError
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.lens_maps import LensMaps
from classifier_emergence.results import read_result
from classifier_emergence.tasks.arithmetic import STYLES
from classifier_emergence.tasks.problems import NEUTRAL
from classifier_emergence.training.adapters import Adapter, adapted
from classifier_emergence.training.modules import VO
from experiments.params import Params
from experiments.shared.lens_fits import selected
from experiments.stages import lenses, logit_lens, residuals, trained_words, word_lenses
from experiments.stages.lenses import LensStudy, adapters_of, chosen, untrained_twin

KEY = "tiny-llama"


@pytest.fixture
def study(params: Params) -> LensStudy:
    return LensStudy(params, KEY)


def on_the_whole_bank(params: Params) -> Params:
    return params.model_copy(update={"lenses": params.lenses.model_copy(update={"pairs": params.bank.pairs})})


def with_adapters(params: Params, study: LensStudy) -> None:
    residuals.run(params, KEY)
    for name in ("dual_reward", "cot_alignment"):
        for seed, folder in enumerate(adapters_of(study, name)):
            with adapted(study.lm, Adapter(VO, 2, 2.0, (0, 1)), seed=seed) as wrapped:
                for parameter in wrapped.parameters():
                    if parameter.requires_grad:
                        torch.nn.init.normal_(parameter, std=0.3)
                wrapped.save_pretrained(str(folder))


def test_the_stage_reads_every_lens_and_goes_on_after_an_interrupt(
    params: Params, study: LensStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_adapters(params, study)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lenses, "held_out_divergence", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lenses.run(params, KEY)
    with monkeypatch.context() as patch:
        patch.setattr(lenses, "write_texts", interrupted)
        patch.setattr(lenses, "tuned_maps", interrupted)
        lenses.run(params, KEY)
    result = read_result(f"results/lenses/{KEY}.json")
    layers, n = len(result["layers"]), 4 * params.lenses.pairs
    assert {name: len(found["symbol"]["fits"]) for name, found in result["untrained"].items()} == {
        "logit": 1, "jacobian": 2, "tuned": 2,
    }  # fmt: skip
    for found in result["untrained"].values():
        for style in STYLES:
            assert found[style]["selected"]["n"] == n
            assert all(len(fit["alignment"]) == layers for fit in found[style]["fits"])
            # Under every lens the last layer is the model's own output.
            last = [
                found[style]["fits"][0]["alignment"][-1],
                result["untrained"]["logit"][style]["fits"][0]["alignment"][-1],
            ]
            assert last[0] == pytest.approx(last[1], rel=1e-4)
    assert result["divergence"]["tuned"][0]["mean"][-1] == pytest.approx(0, abs=1e-5)
    for name, seeds in (("dual_reward", 2), ("cot_alignment", 1)):
        after = result["trained"][name]["after"]
        assert set(after) == {"logit", "jacobian", "tuned", "jacobian_after"}
        assert len(after["logit"]["symbol"]["choice"]["by_seed"]) == seeds
        assert (
            after["logit"]["symbol"]["alignment"] != result["trained"][name]["before"]["logit"]["symbol"]["alignment"]
        )
    assert LensMaps.load(Path(f"data/lenses/{KEY}/jacobian-1.safetensors")).weight.shape == (layers, 48, 48)


def test_a_lens_is_judged_at_no_state_that_it_was_fitted_on(study: LensStudy) -> None:
    texts = lenses.write_texts(study, Path())["texts"]
    train, held = texts[:12], texts[12:]  # every opening occurs in both
    seen = {fed.ids[: at + 1] for fed in study.fed(train) for at in fed.read}
    anew = [fed.ids[: at + 1] for fed in study.fed_anew(held) for at in fed.read]
    assert len(anew) > len(held)
    assert seen.isdisjoint(anew)
    assert not seen.isdisjoint(fed.ids[: at + 1] for fed in study.fed(held) for at in fed.read)


def test_the_logit_lens_is_that_of_its_own_stage(params: Params) -> None:
    study = LensStudy(on_the_whole_bank(params), KEY)
    residuals.run(params, KEY)
    logit_lens.run(params, KEY)
    there = read_result(f"results/logit_lens/{KEY}.json")["controlled"]["word"]["word"]
    here, _ = lenses.words_in(study, study.lm, study.states(study.lm, "word"), study.bank["word"])
    for name in ("alignment", "rank", "log_contrast"):
        assert here[name] == pytest.approx(there[name], rel=1e-4)
    assert here["null"]["p"] == pytest.approx(there["null"]["p"])
    assert here["choice"]["accuracy"] == pytest.approx(there["choice"]["accuracy"])


def test_the_words_alone_choose_as_whole_maps_do(params: Params) -> None:
    study = LensStudy(on_the_whole_bank(params), KEY)
    residuals.run(params, KEY)
    word_lenses.run(params, KEY)
    found = read_result(f"results/word_lenses/{KEY}.json")
    states, asked = study.states(study.lm, "word"), study.bank["word"]
    for fit, table in enumerate(found["styles"]["word"]["jacobian"]["fits"]):
        mapped = study.jacobians(study.lm, NEUTRAL[fit : 2 * params.lenses.word_texts : 2], "test")(states)
        logits = torch.stack([study.lm.readout.logits(row) for row in mapped])
        best = torch.stack([logits[..., word.ids].amax(-1) for word in asked.words], -1)
        right = (best.argmax(-1) == asked.own).double().mean(-1)
        assert table["accuracy"][1:] == pytest.approx(right[1:].tolist())
    assert found["styles"]["symbol"]["jacobian"]["selected"]["n"] == 4 * params.bank.pairs


def test_trained_words_are_read_by_both_lenses_and_a_stopped_stage_goes_on(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trained_words, "train_grpo_together", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained_words.run(params, KEY)
    with monkeypatch.context() as patch:
        for done in ("trained_arms", "train_to_write"):
            patch.setattr(trained_words, done, interrupted)
        trained_words.run(params, KEY)
    result = read_result(f"results/trained_words/{KEY}.json")
    for found in result["ways"].values():
        assert {*found["after"]} == {"logit", "jacobian", "jacobian_after"}
        (run,) = found["runs"]
        for lens, read in found["after"].items():
            assert read["selected"]["n"] == params.lenses.problems
            # Under every lens the last layer is the model's own output.
            assert run[lens]["by_layer"]["accuracy"][-1] == run["logit"]["by_layer"]["accuracy"][-1]
            was = found["before"]["jacobian" if lens == "jacobian_after" else lens]
            for place in trained_words.PLACES:
                now = run[lens][place]["accuracy"]
                assert read["change"][place]["value"] == pytest.approx(now - was[place]["accuracy"])
                less = now - run["logit"][place]["accuracy"]
                assert read["minus_logit"][place]["value"] == pytest.approx(less)


def test_a_missing_adapter_is_named(study: LensStudy) -> None:
    folder = adapters_of(study, "cot_alignment")[0]
    with pytest.raises(InputError, match=r"chain_of_thought-0: no adapter_config\.json"), lenses.trained(study, folder):
        pass


def test_layers_are_chosen_on_other_clusters() -> None:
    clusters = ["a", "b", "c", "d"]
    right = np.zeros((5, 4), dtype=bool)
    right[1, [0, 2]] = right[3, [1, 3]] = True  # each layer knows one half, which chooses it for the other half
    right[[0, 4]] = True  # the embedding and the last layer are no candidates
    hits, rows = selected(right, clusters)
    assert rows == [3, 1]
    assert not hits.any()


def test_choice_needs_no_vocabulary(study: LensStudy, seeded: Callable[..., torch.Tensor]) -> None:
    states, asked = 3 * seeded(5, 7, 48), study.bank["symbol"]
    expected = lens_scores(states, study.lm.readout, [word.ids for word in asked.words]).log_alignment.argmax(-1)
    assert torch.equal(chosen(study.lm, states, asked.words), expected)


def test_random_weights_repeat_and_are_none_of_the_models(study: LensStudy) -> None:
    one, again, other = (untrained_twin(study.lm, seed) for seed in (0, 0, 1))
    weights = [lm.model.get_output_embeddings().weight for lm in (one, again, other, study.lm)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].shape == weights[3].shape
