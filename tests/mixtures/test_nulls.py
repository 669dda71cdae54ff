"""What experts say, against chance: planted words are found, random rows are not, tokens are classed by rule."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mixtures.test_routers import E, openai, write
from scipy.stats import hypergeom, kstest
from torch import Tensor
from torch.nn.functional import normalize

from classifier_emergence.errors import InputError
from classifier_emergence.mixtures.nulls import (
    NEAREST,
    category,
    coherence,
    equal_frequency,
    false_discovery,
    found_if_planted,
    judge_coherence,
    judge_maxima,
    judge_words,
    maxima_p,
    rank_p,
    token_class,
    token_pool,
    word_p,
)
from classifier_emergence.mixtures.projection import (
    controlled,
    planted,
    project_routers,
    random_routers,
    random_rows,
    token_directions,
)
from classifier_emergence.mixtures.routers import RouterWeights, load_routers

WIDTH, VOCABULARY = 96, 3000
unit = partial(normalize, dim=-1)


def maxima(*shape: int, seed: int) -> np.ndarray:
    """Largest of 3000 normals."""
    random = np.random.default_rng(seed)
    return random.normal(size=(int(np.prod(shape)), VOCABULARY)).max(-1).reshape(shape)


# --- Maxima ---


def test_p_values_of_maxima_are_even_under_the_null_and_nothing_is_found() -> None:
    observed = maxima(6, 50, seed=1)
    found = judge_maxima(observed, maxima(6, 300, seed=2))
    assert kstest(found.p.ravel(), "uniform").pvalue > 0.01
    assert (found.q > 0.05).all()
    assert found.null_n == 1800
    assert found.null_mean < found.null_95 < found.null_largest


def test_a_maximum_beyond_chance_is_found_among_hundreds() -> None:
    observed = maxima(6, 50, seed=1)
    observed[4, 7] = 9
    found = judge_maxima(observed, maxima(6, 100, seed=2))
    assert found.q[4, 7] < 0.001  # which the 1 / 101 of counting could never show
    assert (found.q <= 0.05).sum() == 1


def test_too_small_a_null_is_refused() -> None:
    with pytest.raises(InputError, match="null: 19 random directions a layer"):
        judge_maxima(maxima(2, 2, seed=0), maxima(2, 19, seed=0))


def test_false_discovery_is_that_of_benjamini_and_hochberg() -> None:
    p = np.array([[0.01, 0.04], [0.03, 0.5]])
    np.testing.assert_allclose(false_discovery(p), [[0.04, 0.04 * 4 / 3], [0.04 * 4 / 3, 0.5]])


# --- Coherence ---


def test_coherence_is_the_mean_over_pairs() -> None:
    rows = unit(torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)))
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = torch.stack([(rows[:, i] * rows[:, j]).sum(-1) for i, j in pairs]).mean(0)
    torch.testing.assert_close(coherence(rows), expected)
    torch.testing.assert_close(coherence(rows[:, :1].expand(-1, 4, -1)), torch.ones(3))
    with pytest.raises(InputError, match="rows: 1 of them"):
        coherence(rows[:, :1])


def test_equally_frequent_tokens_are_near_in_number_and_never_the_token_itself() -> None:
    pool = torch.tensor(token_pool(VOCABULARY, 600))
    ids = torch.stack([pool[::29], pool[::29] + 1]).clamp(max=VOCABULARY - 1)
    at = equal_frequency(ids, pool, 200, seed=0)
    assert at.shape == (200, *ids.shape)
    assert (pool[at] != ids).all()
    assert ((at - torch.searchsorted(pool, ids)).abs() <= NEAREST).all()
    assert at.unique(dim=0).shape[0] == 200
    assert torch.equal(at, equal_frequency(ids, pool, 200, seed=0))
    with pytest.raises(InputError, match="pool: 3 tokens"):
        equal_frequency(ids, pool[:3], 1, seed=0)


@pytest.mark.parametrize("vocabulary", [50, 3000, 201088])
def test_the_pool_is_dense_where_tokens_are_frequent(vocabulary: int) -> None:
    pool = token_pool(vocabulary)
    assert pool == sorted(set(pool))
    assert (pool[0], pool[-1]) == (0, vocabulary - 1)
    assert len(pool) <= 4096
    assert set(range(50)) <= set(pool)


# --- Words ---


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_rank_p_is_hypergeometric(tokens: int) -> None:
    ranks = np.array([1, 2, 40, 99, 100])
    # The best of m random tokens ranks r or better unless none of the m lies among the first r.
    expected = 1 - hypergeom.pmf(0, 100, ranks, tokens)
    np.testing.assert_allclose(rank_p(ranks, tokens, 100), expected, atol=1e-12)


# --- The null, and planted rows ---


def dominated(seed: int, layers: int = 6, experts: int = 5) -> Tensor:
    """Rows, most of whose length lies in three dimensions."""
    rows = torch.randn(layers, experts, WIDTH, generator=torch.Generator().manual_seed(seed))
    return rows * torch.tensor([20.0] * 3 + [1.0] * (WIDTH - 3))


def test_random_rows_have_the_norm_and_the_covariance_of_the_rows() -> None:
    rows = dominated(0)
    null = random_rows(100 * rows + 7, 400, seed=1)  # neither scale nor what all experts share matters
    assert null.shape == (6, 400, WIDTH)
    assert null.square().sum(-1).mean() == pytest.approx(1, abs=0.1)
    share = null[..., :3].square().sum() / null.square().sum()
    seen = unit(rows - rows.mean(1, keepdim=True))[..., :3].square().sum(-1).mean()
    assert float(share) == pytest.approx(float(seen), abs=0.15)
    isotropic = random_rows(torch.randn(6, 5, WIDTH, generator=torch.Generator().manual_seed(3)), 400, seed=1)
    assert isotropic[..., :3].square().sum() / isotropic.square().sum() < 0.1
    with pytest.raises(InputError, match="experts: 1: a null needs at least 2"):
        random_rows(rows[:, :1], 9, seed=0)


def test_the_null_knows_of_dominating_dimensions_where_the_formula_does_not() -> None:
    """Rows and tokens that share large dimensions: a cosine is large by chance, and nothing is found."""
    head = dominated(1, 1, VOCABULARY)[0]
    rows = dominated(2)
    maxima = [(unit(each) @ unit(head).T).amax(-1).numpy() for each in (rows, random_rows(rows, 60, seed=3))]
    assert np.median(maxima[0]) > 1.3 * np.sqrt(2 * np.log(VOCABULARY) / WIDTH)
    assert (judge_maxima(*maxima).q > 0.05).all()


def test_planted_rows_have_the_cosine_and_keep_the_rest_of_the_row() -> None:
    rows, tokens = dominated(4).flatten(0, 1), dominated(5).flatten(0, 1)
    directions = planted(rows, tokens, [0.1, 0.5, 1.0])
    assert directions.gains
    cosine = (unit(directions.rows) * unit(tokens)).sum(-1)
    torch.testing.assert_close(cosine, torch.tensor([0.1, 0.5, 1.0])[:, None].expand_as(cosine))
    across = [each - (each * unit(tokens)).sum(-1, keepdim=True) * unit(tokens) for each in (directions.rows[0], rows)]
    torch.testing.assert_close(unit(across[0]), unit(across[1]), atol=1e-5, rtol=1e-4)


def test_a_planted_row_is_judged_among_the_others() -> None:
    p = np.array([[0.5], [0.04], [0.9], [0.8]])
    low = np.array([0.001, 0.02, 0.3]).reshape(3, 1, 1)
    assert found_if_planted(p, low, [0], [0], 0.05)[:, 0].tolist() == [True, False, False]  # 0.02 is too much for four
    assert found_if_planted(p, low, [1], [0], 0.05)[:, 0].tolist() == [True, False, False]
    twice = np.array([[0.5, 0.01], [0.9, 0.8]])
    assert found_if_planted(twice, np.array([[[0.02, 0.9]]]), [1], [0], 0.05).all()  # the other word helps it
    assert not found_if_planted(twice, np.array([[[0.03, 0.9]]]), [1], [0], 0.05).any()


def test_power_grows_with_the_cosine(tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, planted=False)
    rows, null = controlled(weights), controlled(random_routers(weights, 60, seed=3))
    words, at = [[40, 41], [11]] * 4, list(range(8))
    directions = planted(rows.rows.flatten(0, 1), token_directions(weights, [word[0] for word in words]), [0.05, 0.9])
    (seen, chance, turned), _ = project_routers(weights, [rows, null, directions], words=words)
    among = chance.z.numpy()
    p = maxima_p(seen.z.numpy(), among), maxima_p(turned.z.T.numpy(), among[np.array(at) // E]).T
    found = found_if_planted(p[0].reshape(-1, 1), p[1][..., None], at, [0] * 8, 0.05)
    assert found.mean(-1).tolist() == [0, 1]
    assert (turned.rank[1, at, at] == 1).all()
    by_word = word_p(turned, words, VOCABULARY)
    assert by_word.shape == (2, 8, 8)
    assert by_word[1, 1, 1] == pytest.approx(1 / VOCABULARY)


# --- Planted and random routers ---


def checkpoint(folder: Path, planted: bool) -> RouterWeights:
    """Two layers of four random rows; topics of ten similar tokens. Planted: expert 2 of layer 1 reads topic 7."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    topics = normal(VOCABULARY // 10, WIDTH)
    head = topics.repeat_interleave(10, dim=0) + normal(VOCABULARY, WIDTH)
    head = head[torch.randperm(VOCABULARY, generator=generator)]
    topic = unit(head) @ unit(topics[7])
    final, gain = torch.rand(WIDTH) + 0.5, torch.rand(WIDTH) + 0.5
    tensors = openai() | {"unembedding.weight": head, "norm.scale": final}
    for n in range(2):
        router = normal(E, WIDTH)
        if planted and n == 1:
            router[2] = 5 * topics[7] / final / gain
        tensors |= {f"block.{n}.mlp.gate.weight": router, f"block.{n}.mlp.norm.scale": gain.clone()}
    (folder / "topic.txt").write_text(" ".join(map(str, topic.topk(10).indices.tolist())))
    return load_routers(write(folder, tensors))


@pytest.mark.parametrize("planted", [True, False])
def test_an_expert_that_reads_a_topic_is_found_and_random_experts_are_not(planted: bool, tmp_path: Path) -> None:
    weights = checkpoint(tmp_path, planted)
    topic = [int(i) for i in (tmp_path / "topic.txt").read_text().split()]
    words, pool = [topic[:2], [11], [1234, 77, 2500]], token_pool(VOCABULARY)
    sets = [controlled(weights), controlled(random_routers(weights, 60, seed=3))]
    (found, null), tokens = project_routers(weights, sets, words=words, keep=pool)
    z = judge_maxima(found.z.numpy(), null.z.numpy())
    own, chance = (coherence(tokens.of(each.top_ids)).numpy() for each in (found, null))
    together = judge_coherence(own, chance)
    evidence = judge_words(found, sets[0], words, tokens, pool, vocabulary=VOCABULARY, draws=199, seed=0)
    # Top tokens of a random direction are more alike than random tokens: that is no topic yet.
    drawn = torch.tensor(pool)[torch.randint(len(pool), (50, 10), generator=torch.Generator().manual_seed(0))]
    random_sets = coherence(tokens.of(drawn))
    assert chance.mean() > 3 * random_sets.abs().mean() > 0
    if planted:
        assert set(found.top_ids[1, 2].tolist()) == set(topic)
        assert np.argwhere(z.q <= 0.05).tolist() == [[1, 2]]
        assert together.value[1, 2] > chance[1].max()
        assert np.argwhere(evidence.q <= 0.05).tolist() == [[1, 2, 0]]
        assert evidence.rank[1, 2, 0] <= 2
        assert evidence.p_equal_frequency[1, 2, 0] == pytest.approx(1 / 200)
    else:
        assert (z.q > 0.05).all()
        assert (together.q > 0.05).all()
        assert (evidence.q > 0.05).all()


# --- Categories ---


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("WHITESPACE", ["\n\n", "   ", "\t", ""]),
        ("MATH", ["7", " 42", "٣", "+", " ==", "÷", ">="]),
        ("PUNCTUATION", ["...", ' "', "!?", "--;\r\n", "((", "€"]),
        ("CODE", [" def", "nullptr", "foo_bar", "List<", "camelCase", "x=3", "func()"]),
        ("SHORT_TOKENS", ["给", "京", "制作", " of", "Q"]),
        ("GENERAL", ["ثير", "银河系", "CONST", " NATO", "Galaxy", " corporation", "hipó", "COVIDs", "ABc"]),
    ],
)
def test_tokens_are_classed_by_the_written_rules(name: str, texts: list[str]) -> None:
    assert {text: token_class(text) for text in texts} == dict.fromkeys(texts, name)


@pytest.mark.parametrize(
    ("expected", "texts"),
    [
        ("GENERAL", [" corporation", " Corporate", " Company"]),
        ("SHORT_TOKENS", ["给", "京", "制作"]),
        ("MATH", ["7", "+", "42", " word"]),
        ("GENERAL", ["7", "+", " two", " words"]),  # half is not more than half
        ("CODE", ["nullptr", "_x", " word"]),
    ],
)
def test_an_expert_has_the_category_of_most_of_its_tokens(expected: str, texts: list[str]) -> None:
    assert category(texts) == expected


def test_an_expert_without_tokens_has_no_category() -> None:
    with pytest.raises(InputError, match="texts: no top tokens"):
        category([])
