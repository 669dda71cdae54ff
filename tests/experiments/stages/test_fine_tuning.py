"""The scores of the write-ups on plain and chain-of-thought fine-tuning, against the model's full output."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from classifier_emergence.reading.layers import layer_labels
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import token_text
from classifier_emergence.tasks.problems import COT_REPORTED, Problem
from classifier_emergence.training.evaluation import generate, parse_number
from experiments.params import load_params
from experiments.stages import cot_alignment, lora_sft

PARAMS = load_params(Path(__file__).resolve().parents[3] / "params.tiny.yaml")


def lens(lm: LanguageModel, prompt: str) -> Tensor:
    """(layers from L0 on, vocabulary) probabilities, with no code of the studies."""
    states = residual_stream(lm, [prompt])[1:, 0]
    readout = lm.readout
    with torch.no_grad():
        return torch.stack([readout.logits(state[None])[0] for state in states]).softmax(-1)


# --- What a model writes ---


def test_generation_takes_the_most_probable_token_every_time(lm: LanguageModel) -> None:
    prompts = ["7 * 8 =", "What is 12 plus 5?"]
    found = generate(lm, prompts, new_tokens=4)
    for prompt, text in zip(prompts, found, strict=True):
        ids = lm.tokenizer(prompt)["input_ids"]
        start = len(ids)
        for _ in range(4):
            with torch.no_grad():
                ids = [*ids, int(lm.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == lm.tokenizer.eos_token_id:
                break
        assert text == lm.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_generation_does_not_depend_on_the_batch(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = ["7 * 8 =", "What is 12 plus 5?", "(89 - 34) =", "6 * 7 ="]
    together = generate(lm, prompts, new_tokens=4)
    monkeypatch.setattr("classifier_emergence.training.evaluation.GENERATED_TOGETHER", 1)
    assert generate(lm, prompts, new_tokens=4) == together


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 56", "56"),
        (" multiply: 56", "56"),
        ("3: multiply: -4 and 5", "-4"),
        ("multiply:", None),
        ("56: nothing", None),
        ("", None),
        ("07", "07"),
    ],
)
def test_the_originals_rule_reads_the_first_number_after_the_last_colon(text: str, number: str | None) -> None:
    assert parse_number(text) == number


@given(st.text(), st.integers(-999, 999), st.text().filter(lambda text: not any(c.isdigit() or c == ":" for c in text)))
def test_a_number_after_a_colon_is_found_whatever_stands_around_it(before: str, value: int, after: str) -> None:
    assert parse_number(f"{before}: {value} {after}") == str(value)


# --- Plain fine-tuning ---


def test_the_plain_score_is_what_the_full_lens_gives(lm: LanguageModel) -> None:
    top = 20
    found = lora_sft.reported_score(lm, top)
    own: list[float] = []
    other: list[float] = []
    for text, hit in zip(lora_sft.PROMPTS, found["hits"], strict=True):
        problem = Problem.parse(text)
        shares = lens(lm, f"{problem.symbol} ")
        first: dict[str, list[float]] = {}
        for row in shares:
            for operation, wanted in lora_sft.SUBSTRINGS.items():
                # The first of the layer's top tokens that contains one of the words is the most probable such token.
                hits = [float(row[i]) for i in row.argsort(descending=True)[:top].tolist()
                        if any(word in token_text(lm.tokenizer, i).lower() for word in wanted)]  # fmt: skip
                first.setdefault(operation, []).extend(hits[:1])
        if first[problem.operation]:
            own.append(max(first[problem.operation]))
            assert hit["probability"] == pytest.approx(own[-1], rel=1e-4)
            layer = layer_labels(len(shares))[1:].index(hit["layer"])
            assert any(token_text(lm.tokenizer, i) == hit["hit_token"] and float(p) == pytest.approx(own[-1], rel=1e-4)
                       for i, p in enumerate(shares[layer]))  # fmt: skip
        else:
            assert hit["layer"] is None
        other += [max(hits) for operation, hits in first.items() if operation != problem.operation and hits]
    mean: Callable[[list[float]], float] = lambda found: sum(found) / len(found) if found else 0.0  # noqa: E731
    assert found["score"] == pytest.approx(mean(own), rel=1e-4)
    assert found["control"] == pytest.approx(mean(other), rel=1e-4)
    assert found["excess"] == found["score"] - found["control"]


def test_the_plain_score_is_that_of_a_planted_word(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that reads "multiply" at every layer scores as certain on products, and controls only elsewhere."""
    readout = lm.readout
    token = int(lm.tokenizer.encode(" multiply", add_special_tokens=False)[-1])
    wanted = torch.nn.functional.one_hot(torch.tensor(token), len(readout.weight)).float()
    planted = torch.linalg.lstsq(readout.weight, wanted[:, None]).solution[:, 0] / readout.gain
    states = (1000 * planted).expand(5, len(lora_sft.PROMPTS), -1)
    monkeypatch.setattr(lora_sft, "residual_stream", lambda *_: states)
    found = lora_sft.reported_score(lm, 1)
    assert found["prompts_with_hit"] == sum("*" in prompt for prompt in lora_sft.PROMPTS)
    assert found["score"] == pytest.approx(found["control"])  # it says multiply on sums, too


# --- Chain of thought ---


@pytest.fixture(params=["tiny-llama", "tiny-gemma"])
def chain(tiny_models: Path, request: pytest.FixtureRequest) -> cot_alignment.ChainOfThoughtStudy:
    return cot_alignment.ChainOfThoughtStudy(PARAMS, str(tiny_models / request.param))


def test_the_chain_score_is_what_the_full_lens_gives(chain: cot_alignment.ChainOfThoughtStudy) -> None:
    lm, found = chain.lm, cot_alignment.reported_score(chain)
    best: Any = []
    for text in COT_REPORTED:
        problem = Problem.parse(text)
        ids = {i for word in cot_alignment.SCORED[problem.operation] for i in lm.tokenizer.encode(word)}
        best.append(lens(lm, f"{problem.symbol} ")[:, sorted(ids)].amax(-1))
    means = torch.stack(best).mean(0)
    n = len(means)
    rows = [int(depth * n) for depth in PARAMS.cot_alignment.depths]
    torch.testing.assert_close(found["score_by_layer"], means[rows], rtol=1e-4, atol=1e-9)
    assert float(found["score"]) == pytest.approx(float(means[rows].max()), rel=1e-4)
    assert float(found["special"]) <= float(found["score"]) + 1e-9


def test_formats_are_compared_problem_by_problem(chain: cot_alignment.ChainOfThoughtStudy) -> None:
    def runs(share: float, *right: list[bool]) -> dict[str, Any]:
        return {
            "reported": {"answers": {"value": share}},
            "by_seed": [{"answers": {"correct": 3 * seed}} for seed in right],
        }

    words = runs(5 / 9, [True, False, True, True], [True, False, True, False])
    direct = runs(6 / 9, [True, True, False, False], [True, True, False, False])
    found = cot_alignment.against(chain, words, direct)
    assert found["reported"] == pytest.approx(-1 / 9)
    assert found["exact"]["by_seed"] == pytest.approx([(0 - 1 + 1 + 1) / 4, (0 - 1 + 1 + 0) / 4])
    assert found["exact"]["n"] == 12
