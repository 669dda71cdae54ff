"""Effects of training, against plain computations on the model's full logits."""

from collections.abc import Iterator

import pytest
import torch
from architectures import language_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from torch.nn import functional

from classifier_emergence.errors import InputError
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.readout import Readout
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.reading.vocabulary import WordTokens, word_tokens
from classifier_emergence.tasks.arithmetic import OPERATIONS
from classifier_emergence.tasks.problems import NEUTRAL
from classifier_emergence.training.adapters import Adapter, adapted
from classifier_emergence.training.evaluation import (
    alignment,
    answers,
    divergence,
    generate,
    random_basis,
    subspace_removed,
    word_basis,
    words_interchanged,
)
from classifier_emergence.training.modules import VO

PROMPTS = ["7 * 8 =", "What is 12 plus 5?", "(89 - 34) =", "If you divide 81 by 9, you get", "6 * 7 ="]
WANTED = [" 56", " 17", " 55", " 9", " 42"]
OWN = [0, 1, 2, 3, 0]


def words(lm: LanguageModel) -> list[WordTokens]:
    return [word_tokens(operation, lm.tokenizer) for operation in OPERATIONS]


def logits(lm: LanguageModel, text: str) -> Tensor:
    """(positions, vocabulary)."""
    with torch.no_grad():
        return lm.model(input_ids=torch.tensor([lm.tokenizer(text)["input_ids"]])).logits[0]


def generated(lm: LanguageModel, prompt: str, n: int) -> list[int]:
    """Greedily, by ``generate``."""
    ids = torch.tensor([lm.tokenizer(prompt)["input_ids"]])
    never = {"eos_token_id": -1, "pad_token_id": lm.tokenizer.pad_token_id}
    out = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, **never)
    return out[0, ids.shape[1] :].tolist()


@pytest.fixture
def wrapped(lm: LanguageModel) -> Iterator[PeftModel]:
    with adapted(lm, Adapter(VO, rank=4, scale=2.0, layers=(1, 2)), seed=0) as wrapped:
        yield wrapped


def shake(wrapped: PeftModel, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)


# --- Answers ---


def test_answers_are_as_probable_as_in_the_full_logits(lm: LanguageModel) -> None:
    found = answers(lm, PROMPTS, WANTED)
    for i, (prompt, wanted) in enumerate(zip(PROMPTS, WANTED, strict=True)):
        ids, start = lm.tokenizer(prompt + wanted)["input_ids"], len(lm.tokenizer(prompt)["input_ids"])
        log_p = logits(lm, prompt + wanted).log_softmax(-1)
        each = torch.stack([log_p[k - 1, ids[k]] for k in range(start, len(ids))])
        torch.testing.assert_close(found.log_prob[i], each.sum())
        torch.testing.assert_close(found.per_token[i], each.mean())


def test_an_answer_is_exact_if_greedy_decoding_gives_it(lm: LanguageModel) -> None:
    # Beside the right answers, what the model says itself: one, two and three tokens of it.
    prompts, wanted = list(PROMPTS), list(WANTED)
    for prompt in PROMPTS:
        said = generated(lm, prompt, 3)
        for n in (1, 2, 3):
            text = lm.tokenizer.decode(said[:n])
            if lm.tokenizer(prompt + text)["input_ids"] == lm.tokenizer(prompt)["input_ids"] + said[:n]:
                prompts.append(prompt)
                wanted.append(text)
    truth = []
    for prompt, answer in zip(prompts, wanted, strict=True):
        ids = lm.tokenizer(prompt + answer)["input_ids"][len(lm.tokenizer(prompt)["input_ids"]) :]
        *said, after = generated(lm, prompt, len(ids) + 1)
        truth.append(said == ids and not lm.tokenizer.decode([after])[:1].isdigit())
    assert len(set(truth)) == 2
    assert answers(lm, prompts, wanted).exact.tolist() == truth


def test_a_longer_number_is_no_exact_answer(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = PROMPTS[0]
    said = lm.tokenizer.decode(generated(lm, prompt, 1))
    assert answers(lm, [prompt], [said]).exact.item()
    after = generated(lm, prompt, 2)[1]
    monkeypatch.setattr(type(lm.tokenizer), "decode", lambda _, ids, **__: "5" if ids == [after] else "")
    assert not answers(lm, [prompt], [said]).exact.item()


def test_answers_follow_the_order_of_their_prompts(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    order = [3, 0, 4, 2, 1]
    whole = answers(lm, PROMPTS, WANTED)
    monkeypatch.setattr("classifier_emergence.reading.tree.BATCH_TOKENS", 20)  # several batches
    permuted = answers(lm, [PROMPTS[i] for i in order], [WANTED[i] for i in order])
    torch.testing.assert_close(permuted.log_prob, whole.log_prob[order], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(permuted.per_token, whole.per_token[order], atol=1e-5, rtol=1e-4)
    assert torch.equal(permuted.exact, whole.exact[order])


def test_answers_behind_shared_tokens_are_those_of_each_prompt(
    lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, wanted = (
        [f"4 * 6 = 24\n15 - 6 = 9\n{p}" for p in ("7 * 8 =", "12 + 35 =", "6 - 5 =")],
        [" 56", " 47", " 1"],
    )
    together = answers(lm, prompts, wanted)
    monkeypatch.setattr("classifier_emergence.reading.tree.LARGEST_TREE", 0)
    apart = answers(lm, prompts, wanted)
    torch.testing.assert_close(together.log_prob, apart.log_prob, atol=1e-4, rtol=1e-4)
    assert torch.equal(together.exact, apart.exact)


def test_a_prompt_that_its_answer_runs_into_is_refused(lm: LanguageModel) -> None:
    with pytest.raises(InputError, match="'What is 12 tim': the tokenizer splits it"):
        answers(lm, ["What is 12 tim"], ["es"])


# --- Divergence ---


def test_a_fresh_adapter_does_not_diverge(lm: LanguageModel, wrapped: PeftModel) -> None:
    assert divergence(lm, wrapped, NEUTRAL[:3]).tolist() == [0, 0, 0]


def test_divergence_is_torchs_on_full_logits(lm: LanguageModel, wrapped: PeftModel) -> None:
    shake(wrapped, 0.5)
    found = divergence(lm, wrapped, NEUTRAL[:3])
    assert (found > 1e-4).all()
    for value, text in zip(found, NEUTRAL, strict=False):
        new = logits(lm, text).log_softmax(-1)
        with wrapped.disable_adapter():
            old = logits(lm, text).log_softmax(-1)
        plain = functional.kl_div(new, old, log_target=True, reduction="batchmean")
        torch.testing.assert_close(value, plain, atol=1e-6, rtol=1e-4)


@given(size=st.floats(1e-4, 1.0))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
def test_divergence_is_never_negative(lm: LanguageModel, wrapped: PeftModel, size: float) -> None:
    shake(wrapped, size)
    assert (divergence(lm, wrapped, NEUTRAL[:2]) >= 0).all()


# --- Alignment ---


def test_alignment_is_a_sum_of_the_lens_probabilities(lm: LanguageModel) -> None:
    found = alignment(lm, PROMPTS, OWN, words(lm))
    states = residual_stream(lm, PROMPTS)
    probability = torch.stack([lm.readout.logits(layer) for layer in states]).softmax(-1)
    every = torch.stack([probability[..., word.ids].sum(-1) for word in words(lm)], dim=-1)
    for prompt, k in enumerate(OWN):
        torch.testing.assert_close(found.own_word[:, prompt], every[:, prompt, k])
        torch.testing.assert_close(found.strict[:, prompt], probability[:, prompt, words(lm)[k].strict_id])
    assert torch.equal(found.choice, every.argmax(-1))
    assert torch.equal(found.top_id, probability.argmax(-1))
    torch.testing.assert_close(found.top_probability, probability.amax(-1))


def test_the_top_token_counts_if_it_is_any_form_of_the_own_word(lm: LanguageModel) -> None:
    states = residual_stream(lm, PROMPTS[:1])
    top = int(lm.readout.logits(states[2]).argmax())
    other = WordTokens("other", {"other": 5}, {}, 5)
    said = WordTokens("said", {"a": 6, "b": top}, {}, 6)
    found = alignment(lm, [PROMPTS[0]] * 2, [0, 1], [other, said])
    assert found.is_top[2].tolist() == [False, True]
    assert torch.equal(found.is_top[:, 1], (found.top_id[:, 1] == top) | (found.top_id[:, 1] == 6))


def test_alignment_follows_the_order_of_the_prompts(lm: LanguageModel) -> None:
    order = [3, 0, 4, 2, 1]
    whole = alignment(lm, PROMPTS, OWN, words(lm))
    permuted = alignment(lm, [PROMPTS[i] for i in order], [OWN[i] for i in order], words(lm))
    torch.testing.assert_close(permuted.own_word, whole.own_word[:, order], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(permuted.strict, whole.strict[:, order], atol=1e-6, rtol=1e-4)
    assert torch.equal(permuted.top_id, whole.top_id[:, order])
    assert torch.equal(permuted.choice, whole.choice[:, order])


def test_chosen_rows_are_those_of_all(lm: LanguageModel) -> None:
    whole = alignment(lm, PROMPTS, OWN, words(lm))
    some = alignment(lm, PROMPTS, OWN, words(lm), rows=[3, 1])
    torch.testing.assert_close(some.own_word, whole.own_word[[3, 1]])
    assert torch.equal(some.is_top, whole.is_top[[3, 1]])


# --- Directions taken out ---


def after_block(lm: LanguageModel, layer: int) -> Tensor:
    """(positions, d); what the next block reads."""
    kept: list[Tensor] = []
    handle = lm.blocks[layer + 1].register_forward_pre_hook(lambda _, args: kept.append(args[0][0]))
    try:
        logits(lm, PROMPTS[1])
    finally:
        handle.remove()
    return kept[0]


def directions(readout: Readout, ids: list[int]) -> Tensor:
    rows = readout.weight[ids]
    return rows * readout.gain if readout.projection is None else rows @ readout.projection


def test_the_word_basis_is_orthonormal_and_holds_the_words_directions(lm: LanguageModel) -> None:
    readout = lm.readout
    basis = word_basis(words(lm), readout)
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), atol=1e-5, rtol=0)
    rows = directions(readout, [i for word in words(lm) for i in word.ids])
    torch.testing.assert_close(rows @ basis.T @ basis, rows, atol=1e-5, rtol=1e-4)


def test_a_removed_word_cannot_be_read_at_any_position(lm: LanguageModel) -> None:
    readout = lm.readout
    basis = word_basis(words(lm), readout)
    before = after_block(lm, 1)
    with subspace_removed(lm, 1, basis):
        states = after_block(lm, 1)
    assert (before @ basis.T).abs().amin(-1).max() > 1e-4
    torch.testing.assert_close(states @ basis.T, torch.zeros(len(states), len(basis)), atol=1e-5, rtol=0)
    others = torch.eye(basis.shape[1]) - basis.T @ basis
    torch.testing.assert_close(states @ others, before @ others, atol=1e-5, rtol=1e-4)
    ids = [i for word in words(lm) for i in word.ids]
    torch.testing.assert_close(readout.logits(states)[:, ids], torch.zeros(len(states), len(ids)), atol=1e-4, rtol=0)


def test_a_control_takes_out_as_much_in_other_directions(lm: LanguageModel) -> None:
    basis = word_basis(words(lm), lm.readout)
    along = random_basis(basis, seed=0)
    torch.testing.assert_close(along @ along.T, torch.eye(len(along)), atol=1e-5, rtol=0)
    before = after_block(lm, 1)
    with subspace_removed(lm, 1, basis):
        change = after_block(lm, 1) - before
    with subspace_removed(lm, 1, basis, along):
        control = after_block(lm, 1) - before
    torch.testing.assert_close(control.norm(dim=-1), change.norm(dim=-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(control @ along.T @ along, control, atol=1e-5, rtol=1e-4)
    assert (control - change).norm() > 0.1 * change.norm()


def test_interchanged_words_are_read_in_each_others_place(lm: LanguageModel) -> None:
    readout = lm.readout
    pair = [words(lm)[0].ids[0], words(lm)[1].ids[0]]
    rows = directions(readout, pair)
    before = after_block(lm, 1)
    with words_interchanged(lm, 1, pair):
        states = after_block(lm, 1)
    torch.testing.assert_close(states @ rows.T, (before @ rows.T).flip(-1), atol=1e-4, rtol=1e-3)
    span = torch.linalg.qr(rows.T).Q
    rest = torch.eye(len(span)) - span @ span.T  # what is not of the two words stays
    torch.testing.assert_close(states @ rest, before @ rest, atol=1e-5, rtol=1e-4)
    with words_interchanged(lm, 1, pair, seed=0):
        control = after_block(lm, 1) - before
    torch.testing.assert_close(control.norm(dim=-1), (states - before).norm(dim=-1), atol=1e-5, rtol=1e-3)
    assert (control - (states - before)).norm() > 0.1 * control.norm()


def test_random_directions_follow_their_seed(seeded) -> None:
    like = seeded(3, 20)
    assert torch.equal(random_basis(like, seed=1), random_basis(like, seed=1))
    assert not torch.equal(random_basis(like, seed=1), random_basis(like, seed=2))


def test_nothing_stays_removed(lm: LanguageModel) -> None:
    basis = word_basis(words(lm), lm.readout)
    before, hooks = logits(lm, PROMPTS[0]), len(lm.blocks[1]._forward_hooks)

    def break_off() -> None:
        with subspace_removed(lm, 1, basis):
            assert not torch.equal(logits(lm, PROMPTS[0]), before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert torch.equal(logits(lm, PROMPTS[0]), before)
    assert len(lm.blocks[1]._forward_hooks) == hooks


def test_words_are_acted_on_through_a_projection() -> None:
    lm = language_model("opt-projected")  # whose states are wider than its unembedding
    test_the_word_basis_is_orthonormal_and_holds_the_words_directions(lm)
    test_interchanged_words_are_read_in_each_others_place(lm)


# --- Generation ---


def test_prompts_of_a_batch_are_gone_on_with_as_each_alone(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [text for prompt in PROMPTS for text in generate(lm, [prompt], new_tokens=4)]
    monkeypatch.setattr(lm.tokenizer, "padding_side", "right")  # as many tokenizers have it
    assert generate(lm, PROMPTS, new_tokens=4) == alone
