import pytest
import torch

from classifier_emergence.errors import InputError
from classifier_emergence.reading.layers import layer_at, layer_labels, layer_row
from classifier_emergence.reading.lens import check_lens
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.training.flaws import scaled_attention, scaled_embeddings

PROMPTS = [
    "7 * 8 =",
    "What is 12 divided by 4?",
    "Anna had 12 pens and Ben took 4 pens. How many pens does Anna have?",
]


def test_the_lens_at_the_last_layer_is_the_models_own_output(lm: LanguageModel) -> None:
    assert check_lens(lm) < 1e-4


def test_a_second_norm_is_noticed(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import classifier_emergence.reading.lens as lens

    honest = residual_stream
    norm = lm.readout.norm
    monkeypatch.setattr(lens, "residual_stream", lambda *args: norm(honest(*args)))
    with pytest.raises(InputError, match="misses the model's own log-probabilities"):
        check_lens(lm)


def test_rows_are_hidden_states_before_the_final_norm(lm: LanguageModel) -> None:
    states = residual_stream(lm, PROMPTS[:1])
    ids = torch.tensor([lm.tokenizer(PROMPTS[0])["input_ids"]])
    hidden = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(states) == len(hidden) == lm.n_layers + 1
    for row in range(len(states) - 1):
        torch.testing.assert_close(states[row, 0], hidden[row][0, -1])
    torch.testing.assert_close(lm.readout.norm(states[-1])[0], hidden[-1][0, -1])


def test_batching_changes_nothing(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    together = residual_stream(lm, PROMPTS)
    monkeypatch.setattr("classifier_emergence.reading.tree.BATCH_TOKENS", 1)
    torch.testing.assert_close(together, residual_stream(lm, PROMPTS), atol=1e-5, rtol=1e-4)


def test_what_prompts_begin_with_passes_once_and_changes_nothing(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"4 * 6 = 24\n15 - 6 = 9\n{prompt}" for prompt in PROMPTS]
    passed: list[int] = []
    handle = lm.model.get_input_embeddings().register_forward_hook(lambda _, args, __: passed.append(args[0].numel()))
    together = residual_stream(lm, prompts)
    handle.remove()
    assert sum(passed) < sum(len(ids) for ids in lm.tokenizer(prompts)["input_ids"])
    monkeypatch.setattr("classifier_emergence.reading.tree.LARGEST_TREE", 0)
    torch.testing.assert_close(together, residual_stream(lm, prompts), atol=1e-5, rtol=1e-4)


def test_chosen_rows_need_no_later_block(lm: LanguageModel) -> None:
    whole = residual_stream(lm, PROMPTS)
    ran: list[int] = []
    handles = [block.register_forward_hook(lambda _, __, ___, i=i: ran.append(i)) for i, block in enumerate(lm.blocks)]
    for rows in ([2], [0], [3, 0]):
        ran.clear()
        assert torch.equal(residual_stream(lm, PROMPTS, rows=rows), whole[rows])
        assert max(ran) == max(*rows, 1) - 1
    for handle in handles:
        handle.remove()


def test_without_the_causal_mask_earlier_positions_see_later_ones(lm: LanguageModel) -> None:
    # The last position sees everything either way; what reaches it changes through the earlier ones, after a block.
    causal = residual_stream(lm, PROMPTS)
    flawed = residual_stream(lm, PROMPTS, causal=False)
    torch.testing.assert_close(causal[:2], flawed[:2], atol=1e-5, rtol=1e-4)
    assert (causal[2:] - flawed[2:]).abs().max() > 1e-3


def test_without_the_causal_mask_other_texts_stay_hidden(lm: LanguageModel) -> None:
    together = residual_stream(lm, PROMPTS, causal=False)
    alone = residual_stream(lm, PROMPTS[:1], causal=False)
    torch.testing.assert_close(together[:, :1], alone, atol=1e-5, rtol=1e-4)


def test_attention_scaled_to_nothing_leaves_the_last_token_alone(lm: LanguageModel) -> None:
    with scaled_attention(lm, 0.0):
        states = residual_stream(lm, ["7 * 8 =", "12 + 5 ="])
    torch.testing.assert_close(states[:, 0], states[:, 1])
    assert not torch.equal(*residual_stream(lm, ["7 * 8 =", "12 + 5 ="])[-1])


def test_attention_scaled_by_one_changes_nothing(lm: LanguageModel) -> None:
    with scaled_attention(lm, 1.0):
        scaled = residual_stream(lm, PROMPTS)
    assert torch.equal(scaled, residual_stream(lm, PROMPTS))


def test_scaled_embeddings_scale_what_the_blocks_read(lm: LanguageModel) -> None:
    with scaled_embeddings(lm, 0.5):
        scaled = residual_stream(lm, PROMPTS)
    sound = residual_stream(lm, PROMPTS)
    torch.testing.assert_close(scaled[0], sound[0] / 2)
    assert not torch.allclose(scaled[-1], sound[-1])


def test_no_hook_outlives_a_failure(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def hooks() -> int:  # transformers keeps some of its own
        return sum(len(block._forward_hooks) + len(block._forward_pre_hooks) for block in lm.blocks)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before = hooks()
    monkeypatch.setattr(type(lm.model.get_decoder()), "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        residual_stream(lm, PROMPTS)
    assert hooks() == before


@pytest.mark.parametrize("prompts", [[""], ["7 * 8 =", ""]])
def test_a_prompt_without_tokens_is_refused_by_name(lm: LanguageModel, prompts: list[str]) -> None:
    with pytest.raises(InputError, match=r"prompt '': tokenises to nothing"):
        residual_stream(lm, prompts)


def test_no_prompts_are_refused(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="none given"):
        residual_stream(lm, [])


@pytest.mark.parametrize("part", ["norm", "lm_head"])
def test_a_model_without_a_known_readout_is_refused_by_name(lm: LanguageModel, part: str) -> None:
    holder = lm.model.get_decoder() if part == "norm" else lm.model
    taken = getattr(holder, part)
    try:
        delattr(holder, part)
        with pytest.raises((InputError, AttributeError), match=type(lm.model).__name__):
            _ = lm.readout
    finally:
        setattr(holder, part, taken)


def test_layer_names_follow_the_sources() -> None:
    assert layer_labels(2) == ["emb", "L0", "L1"]
    assert layer_labels(16)[layer_row(8)] == "L8"
    # The layers that the originals read at 55 %: Llama, TinyLlama, Granite.
    assert [layer_at(0.55, n) for n in (16, 22, 40)] == [8, 12, 22]
