"""Texts that pass as one row get the states that each has alone."""

import pytest
import torch
from torch import Tensor

from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.tree import Tree, batches, last_states, one_pass

TEXTS = ["4 * 6 = 24", "4 * 6 =", "4 * 6 = 25", "17 + 3 = 20", "4 * 6 = 24"]


def alone(lm: LanguageModel, text: list[int]) -> Tensor:
    return lm.model.get_decoder()(input_ids=torch.tensor([text])).last_hidden_state[0]


def test_a_tree_gives_every_text_the_states_that_it_has_alone(lm: LanguageModel) -> None:
    texts = lm.tokenizer(TEXTS)["input_ids"]
    tree = Tree(texts)
    assert len(tree.ids) < sum(map(len, texts[2:]))
    states = last_states(tree.inputs(lm.model), lm.model)
    for text, path in zip(texts, tree.paths, strict=True):
        assert [tree.ids[node] for node in path] == text
        torch.testing.assert_close(states[path], alone(lm, text), atol=1e-5, rtol=1e-4)


def test_one_pass_says_where_every_token_stands(lm: LanguageModel, as_tree: bool) -> None:
    texts = lm.tokenizer(TEXTS)["input_ids"]
    inputs, places = one_pass(texts, lm.model)
    assert ("attention_mask" in inputs) == as_tree
    states = lm.model.get_decoder()(**inputs).last_hidden_state.flatten(0, 1)
    for text, place in zip(texts, places, strict=True):
        assert inputs["input_ids"].flatten()[place].tolist() == text
        torch.testing.assert_close(states[place], alone(lm, text), atol=1e-5, rtol=1e-4)


def test_a_text_beyond_the_models_window_or_mask_is_no_tree(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    config, texts = lm.model.config, [[5, 6, 7], [5, 6, 8]]
    for name, value, fits in (
        ("sliding_window", 3, True),
        ("sliding_window", 2, False),
        ("_attn_implementation_internal", "flash_attention_2", False),
        ("layer_types", ["full_attention", "linear_attention"], False),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(config, name, value, raising=False)
            assert Tree(texts).fits(lm.model) == fits


def test_batches_hold_every_text_once_and_no_more_nodes_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("classifier_emergence.reading.tree.BATCH_TOKENS", 6)
    texts = [[1, 2, 3], [9] * 8, [1, 2, 4], [1, 2, 3], [1, 2], [7, 7, 7, 7], [1, 5, 5]]
    found = list(batches(texts))
    assert sorted(i for batch in found for i in batch) == list(range(len(texts)))
    sizes = [len(Tree([texts[i] for i in batch]).ids) for batch in found]
    assert sizes == [6, 4, 8]  # what begins with 1; the sevens; one that is too long by itself
    assert list(batches([])) == []
