"""Every family that is promised: its states, its lens, and what it is refused for by name."""

from typing import Any

import pytest
import torch
from architectures import CONFIGS, LAYERS, language_model

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.lens import lens
from classifier_emergence.instruments.lens_map import lens_map
from classifier_emergence.reading.lens import lens_scores
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.tree import follows_masks

PROMPTS = ["7 * 8 =", "7 * 8 + 12 =", "12 / 4 =", "1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9 ="]
PADDED = {"gpt-neo", "bloom", "falcon-alibi", "mpt", "mamba", "lfm2", "recurrent-gemma", "qwen3-next"}
"""Families that pass padded: their layers are recurrent, or positions run along the row."""


@pytest.mark.filterwarnings("ignore")  # of the libraries, about kernels that are not installed
@pytest.mark.parametrize("name", CONFIGS)
def test_every_row_is_that_of_an_unhooked_pass_and_the_last_gives_the_logits(name: str) -> None:
    lm = language_model(name)
    states = residual_stream(lm, PROMPTS)
    assert len(states) == LAYERS + 1
    readout = lm.readout
    for column, prompt in enumerate(PROMPTS):
        ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
        output = lm.model(input_ids=ids, output_hidden_states=True, use_cache=False)
        *rows, last = (hidden[0, -1] for hidden in output.hidden_states)
        if name == "mamba":  # leaves the embedding out, and gives the last state with and without its norm
            rows.insert(0, lm.model.get_input_embeddings()(ids)[0, -1])
        torch.testing.assert_close(states[: len(rows), column], torch.stack(rows), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(readout.norm(states[-1:, column])[0], last, atol=1e-4, rtol=1e-4)
        seen = readout.logits(states[-1:, column])[0]
        torch.testing.assert_close(seen, output.logits[0, -1], atol=1e-4, rtol=1e-4)
    assert follows_masks(lm.model) == (name not in PADDED)


def test_a_readout_of_another_form_is_refused_when_it_is_asked_for_and_states_are_not() -> None:
    lm = language_model("llama")
    lm.model.forward = lambda *args, forward=lm.model.forward, **kw: scaled(forward(*args, **kw))
    assert residual_stream(lm, PROMPTS).isfinite().all()
    with pytest.raises(InputError, match="LlamaForCausalLM: the lens at the last layer misses"):
        _ = lm.readout
    bare = language_model("llama")
    del bare.model.model.norm
    assert residual_stream(bare, PROMPTS).isfinite().all()
    with pytest.raises(InputError, match="LlamaForCausalLM: no final norm"):
        _ = bare.readout


def test_a_model_in_memory_is_checked_on_first_use_and_once() -> None:
    lm, passes = language_model("cohere"), []
    lm.model.register_forward_hook(lambda *_: passes.append(1))
    reading = lens(lm, ["7 * 8 ="])
    checked = len(passes)
    assert checked >= 1
    lens(lm, ["7 * 8 ="])
    assert len(passes) == checked
    own = lm.model(torch.tensor([lm.tokenizer("7 * 8 =")["input_ids"]])).logits[0, -1].softmax(-1)
    assert float(reading.top_probability[-1, 0]) == pytest.approx(float(own.max()), rel=1e-4)


def scaled(output: Any) -> Any:
    output.logits = output.logits * 3
    return output


def test_a_token_that_was_added_without_resizing_is_refused_by_its_number() -> None:
    lm = language_model("llama")
    lm.tokenizer.add_tokens([f"new{i}" for i in range(20)])
    assert len(lm.tokenizer) > 200
    with pytest.raises(
        InputError, match=r"token 212: the model's vocabulary has 200 tokens; .*resize_token_embeddings"
    ):
        residual_stream(lm, ["7 * new19"])
    for ask in (
        lambda: lens(lm, ["7 * new19"]),
        lambda: lens(lm, ["7 * 8 ="], ["new19"]),
        lambda: lens_map(lm, "7 * 8 =", ["new19"]),
        lambda: lens_map(lm, "7 * new19", generate=2),
    ):
        with pytest.raises(InputError, match=r"^token 212: the model's vocabulary has 200 tokens; .*resize"):
            ask()
    states = residual_stream(lm, PROMPTS)
    with pytest.raises(InputError, match=r"word 1: token 212, but the readout has 200"):
        lens_scores(states, lm.readout, [[7], [212]])


def test_a_recurrent_model_cannot_see_later_tokens_and_says_what_it_is() -> None:
    with pytest.raises(InputError, match="MambaForCausalLM: goes through a text from left to right"):
        residual_stream(language_model("mamba"), PROMPTS, causal=False)
