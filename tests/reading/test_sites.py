"""Inside a block: the parts add up to the block, and are what the block's own modules give."""

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Olmo2Config, Olmo2ForCausalLM

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.lens import lens
from classifier_emergence.instruments.probe import probe
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.positions import feed, read_states

PROMPTS = ["7 * 8 =", "What is 12 plus 5?"]
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}


def reads(lm: LanguageModel, site: str) -> Tensor:
    rows = range(0 if site == "resid" else 1, len(lm.layers))
    return read_states(lm, feed(lm.tokenizer, PROMPTS, position="all"), rows=rows, site=site)


@pytest.fixture(params=["lm", "olmo2"])
def model(request: pytest.FixtureRequest, lm: LanguageModel) -> LanguageModel:
    """The tiny models, and one whose norms stand behind the parts of a block."""
    if request.param == "lm":
        return lm
    torch.manual_seed(0)
    config = Olmo2Config(vocab_size=len(lm.tokenizer), **SIZE)
    return LanguageModel("olmo2", Olmo2ForCausalLM(config).eval(), lm.tokenizer)


def test_the_parts_of_a_block_add_up_to_it(model: LanguageModel) -> None:
    resid, mid, attention, mlp = (reads(model, site) for site in ("resid", "resid_mid", "attn_out", "mlp_out"))
    torch.testing.assert_close(resid[:-1] + attention, mid, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mid + mlp, resid[1:], rtol=1e-4, atol=1e-5)


def test_the_parts_are_what_the_modules_give(model: LanguageModel) -> None:
    block = model.blocks[1]
    behind = hasattr(block, "post_feedforward_layernorm")  # what is added has gone through a norm
    modules = {
        "attn_out": block.post_attention_layernorm if behind else block.self_attn,
        "mlp_out": block.post_feedforward_layernorm if behind else block.mlp,
    }
    (fed,) = feed(model.tokenizer, PROMPTS[:1], position="all")
    for site, module in modules.items():
        given: list[Tensor] = []
        handle = module.register_forward_hook(
            lambda _, __, output, given=given: given.append(output[0] if isinstance(output, tuple) else output)
        )
        with torch.no_grad():
            model.model(torch.tensor([fed.ids]))
        handle.remove()
        torch.testing.assert_close(reads(model, site)[1, : len(fed.ids)], given[0][0], rtol=1e-3, atol=1e-5)


def test_blocks_whose_parts_run_side_by_side_have_nothing_between(lm: LanguageModel) -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(vocab_size=len(lm.tokenizer), use_parallel_residual=True, **SIZE)
    parallel = LanguageModel("parallel", GPTNeoXForCausalLM(config).eval(), lm.tokenizer)
    with pytest.raises(InputError, match="GPTNeoXForCausalLM run attention and MLP side by side"):
        reads(parallel, "attn_out")


def test_instruments_read_inside_of_blocks(lm: LanguageModel) -> None:
    reading = lens(lm, PROMPTS, ["add"], null_words=0, site="attn_out")
    assert reading.site == "attn_out"
    assert reading.layers == ("L0", "L1", "L2", "L3")
    assert reading.alignment.shape == (1, 4, 2)
    prompts = ["7 * 8 =", "12 * 5 =", "7 + 8 =", "12 + 5 ="]
    assert probe(lm, prompts, [1, 1, 0, 0], shuffles=2, site="mlp_out").layers == reading.layers
    with pytest.raises(InputError, match="layer 'emb': no block, so it has no attn_out"):
        lens(lm, PROMPTS, layers=["emb"], site="attn_out")
    with pytest.raises(InputError, match="site 'head': unknown; choose one of resid"):
        lens(lm, PROMPTS, site="head")
