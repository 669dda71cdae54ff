"""Every family that is promised: its states, its lens, and what it is refused for by name."""

import pytest
import torch
from architectures import CONFIGS, LAYERS, language_model

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
