"""A kept probe says what the probe said, in a new process's place and inside the model."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.kept_probe import KeptProbe
from classifier_emergence.instruments.probe import probe
from classifier_emergence.models.loading import load, open_model
from classifier_emergence.reading.model import LanguageModel

PROMPTS = ["7 * 8 =", "12 * 5 =", "3 * 9 =", "7 + 8 =", "12 + 5 =", "3 + 9 ="]
NEW = ["11 * 12 =", "4 + 4 ="]


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 1, 1], [True] * 3 + [False] * 3, ["x"] * 3 + ["y"] * 3])
def test_a_kept_probe_says_what_the_probe_said(labels: list[object], lm: LanguageModel, tmp_path: Path) -> None:
    reading = probe(lm, PROMPTS, labels, test=NEW, shuffles=2, position=-2, output=tmp_path / "kept")
    assert reading.classes == tuple(map(str, dict.fromkeys(labels)))
    kept = KeptProbe.load(tmp_path / "kept")
    assert (kept.card.layer, kept.card.position, kept.card.n) == (reading.peak.layer, -2, 6)
    shares = kept.predict_proba(kept.states(lm, NEW))
    for said, share in zip(reading.predictions, shares, strict=True):
        assert kept.card.classes[int(share.argmax())] == said.label
        assert float(share.max()) == pytest.approx(said.probability, rel=1e-3)
    hooks = lm.blocks[lm.layers.index(kept.card.layer) - 1]._forward_hooks
    before = dict(hooks)  # libraries leave some of their own
    with kept.routing(lm) as routed:
        lm.model(torch.tensor([lm.tokenizer(NEW[0])["input_ids"]]))
    assert len(routed) == 1
    torch.testing.assert_close(routed[0][0, -2].softmax(-1), shares[0], rtol=1e-3, atol=1e-5)
    cost = kept.cost(lm, NEW[0], passes=3)
    assert (cost.passes, cost.tokens) == (3, len(lm.tokenizer(NEW[0])["input_ids"]))
    assert 0 < cost.routed < 20 * cost.alone
    assert hooks == before
    with pytest.raises(InputError, match="exists already"):
        probe(lm, PROMPTS, labels, output=tmp_path / "kept")


def test_a_probe_is_kept_whole_or_not_at_all_and_after_its_result(
    lm: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    written: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr("classifier_emergence.instruments.kept_probe.write_result", full)  # the second file
        with pytest.raises(InputError, match="kept: cannot be written"):
            probe(lm, PROMPTS, [0, 0, 0, 1, 1, 1], shuffles=1, output=tmp_path / "kept", write=written.append)
    assert len(written) == 1
    assert not list(tmp_path.iterdir())


def test_labels_that_are_none_are_refused_by_row(lm: LanguageModel) -> None:
    for labels, message in (
        ([0, None, 0, 1, 1, 1], "label 2: None is no class"),
        ([0.5, 1, 0, 1, 1, 1], "label 1: 0.5 is no class"),
        ("aaabbb", "labels: one text; pass a list"),
    ):
        with pytest.raises(InputError, match=message):
            probe(lm, PROMPTS, labels)


def test_a_folder_or_model_that_does_not_fit_is_refused(lm: LanguageModel, tiny_models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not what probe --output wrote"):
        KeptProbe.load(tiny_models / "tiny-llama")
    probe(lm, PROMPTS, [0, 0, 0, 1, 1, 1], shuffles=1, output=tmp_path / "kept")
    kept = KeptProbe.load(tmp_path / "kept")
    narrow = KeptProbe(kept.weight[:, :5], kept.bias, kept.card)
    with pytest.raises(InputError, match="states of width 48, but the probe reads 5"):
        narrow.states(lm, NEW)


def test_an_adapter_that_holds_the_embeddings_is_read(tiny_models: Path, tmp_path: Path) -> None:
    model = str(tiny_models / "tiny-llama")
    base = load(model, {})
    wrapped = get_peft_model(load(model, {}).model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    adapted = open_model(model, adapter=tmp_path / "adapter")
    ids = torch.tensor([base.tokenizer("7 * 8 =")["input_ids"]])
    with torch.no_grad():
        expected, found, before = (m(ids).logits for m in (wrapped, adapted.model, base.model))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, before, rtol=1e-3, atol=1e-4)
