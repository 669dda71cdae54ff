"""Routing on anyone's texts: planted routing is found, readings agree with the trace, and hostile text survives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from classifier_emergence.errors import InputError
from classifier_emergence.instruments import routing as instrument_routing
from classifier_emergence.instruments.routing import routing_usage, trace_texts
from classifier_emergence.mixtures.routing import Routing, trace
from classifier_emergence.models.loading import load
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.results import read_result, write_result

TEXTS = [f"{a} * {b} =" for a, b in ((7, 8), (12, 5), (3, 9), (6, 7), (4, 4), (9, 2))]
TEXTS += [f"{a} + {b} =" for a, b in ((7, 8), (12, 5), (3, 9), (6, 7), (4, 4), (9, 2))]
LABELS = ["times"] * 6 + ["plus"] * 6
HOSTILE = ["[bold]x[/bold]\n", "=cmd|' /C calc'!A0", "שלום $x_1^2$", "_a \x1b[31m \u202e 👩‍🔬"]


@pytest.fixture
def moe(mixture: Path) -> LanguageModel:
    return load(str(mixture), {})


def test_both_readings_are_those_of_the_trace(moe: LanguageModel) -> None:
    ids = [list(moe.tokenizer(text)["input_ids"]) for text in TEXTS]
    routing = trace(moe, ids)
    reading = trace_texts(moe, TEXTS, layers=["L1"])
    assert reading.layers == ("L1",)
    at = 0
    for item, tokens in zip(reading.texts, ids, strict=True):
        assert "".join(item.tokens) == item.text
        assert np.array_equal(item.experts[0], routing.experts[1, at : at + len(tokens)])
        assert np.allclose(item.weights[0], routing.weights[1, at : at + len(tokens)])
        at += len(tokens)
    used = routing_usage(moe, TEXTS, LABELS, shuffles=19)
    shares = routing.shares()
    assert np.allclose(used.usage.load, shares.mean(1))
    of_class = torch.tensor([LABELS[i] == "plus" for i in routing.text])
    assert used.classes == ("times", "plus")
    assert np.allclose(used.class_load[1], shares[:, of_class].mean(1))


def test_texts_pass_through_the_chat_template_and_notices_are_kept(moe: LanguageModel) -> None:
    moe.tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|says|>"
    reading = trace_texts(moe, ["7 * 8 ="], chat=True, system="Be brief.")
    assert "".join(reading.texts[0].tokens) == "<|system|>Be brief.<|user|>7 * 8 =<|says|>"
    assert reading.texts[0].experts.shape[1] == len(reading.texts[0].tokens)
    used = routing_usage(moe, ["7 * 8 =<eos> 1", "2 + 3 ="], shuffles=19)
    assert "holds the end token '<eos>'" in used.notices[0]
    chats = routing_usage(moe, ["7 * 8 =", "2 + 3 ="], shuffles=19, chat=True)
    assert chats.n_tokens > used.n_tokens


def test_experts_that_go_by_the_class_are_found_and_others_are_not(
    moe: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(model: Any, texts: list[list[int]], **_: Any) -> Routing:
        """Layer 0: one expert a class. Layer 1: an expert at random. The same whenever it is read."""
        text = torch.arange(len(texts)).repeat_interleave(torch.tensor([len(t) for t in texts]))
        token = torch.tensor([i for t in texts for i in t])
        position = torch.cat([torch.arange(len(t)) for t in texts])
        random = torch.randint(4, (len(text),), generator=torch.Generator().manual_seed(0))
        experts = torch.stack([(text >= 6).long(), random])[..., None]
        return Routing((0, 1), experts, torch.ones(experts.shape), 4, token, text, position)

    monkeypatch.setattr(instrument_routing, "trace", planted)
    reading = routing_usage(moe, TEXTS, LABELS)
    assert reading.label is not None
    assert reading.label.bits[0] == pytest.approx(reading.label.label_bits)
    assert reading.label.p[0] == pytest.approx(1 / 201, rel=2)  # few permutations of twelve labels give the same halves
    assert reading.label.p[1] > 0.05
    assert reading.context is not None
    assert reading.context.change[0] > 0.3  # the same token under both classes
    assert reading.context.repeated.tolist() == [0, 0]


def test_readings_export_and_draw_hostile_texts(moe: LanguageModel, tmp_path: Path) -> None:
    labels = [HOSTILE[0], HOSTILE[0], HOSTILE[1], HOSTILE[1]]
    used = routing_usage(moe, HOSTILE, labels, shuffles=19)
    readings = [trace_texts(moe, HOSTILE), used]
    for i, reading in enumerate(readings):
        write_result(tmp_path / f"{i}.json", reading.to_dict())
        assert read_result(tmp_path / f"{i}.json")["model"] == "moe"
        assert len({tuple(row) for row in reading.rows()}) == 1  # the same columns everywhere
        assert isinstance(reading.plot(), Figure)
        reading.save(tmp_path / f"{i}.png")
    assert used.rows()[0]["load"] == used.usage.load[0, 0]


def test_a_long_trace_still_fits_a_page(moe: LanguageModel, tmp_path: Path) -> None:
    reading = trace_texts(moe, [*["7 * 8 ="] * 7, "7 * 8 = 56, " * 40, *["7 * 8 ="] * 4])
    reading.save(tmp_path / "long.png")
    assert (tmp_path / "long.png").stat().st_size
    shown = [len(axis.get_yticks()) for axis in reading.plot().axes]
    assert len(shown) == 8
    assert max(shown) == shown[-1] == 64 < len(reading.texts[7].tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "texts: none given"),
        ({"texts": ["a", " "]}, "text 2: empty"),
        ({"texts": ["a", "b"], "labels": ["x"]}, "labels: 1 for 2 texts"),
        ({"texts": ["a", "b"], "labels": ["x", "x"]}, "labels: all are equal"),
    ],
)
def test_what_cannot_be_read_is_refused(moe: LanguageModel, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        routing_usage(moe, **arguments)


def test_a_layer_without_a_router_is_refused(moe: LanguageModel) -> None:
    with pytest.raises(InputError, match=r"layer 'L9': moe has routers in 2 layers, L0 to L1"):
        trace_texts(moe, ["a"], layers=["L9"])
