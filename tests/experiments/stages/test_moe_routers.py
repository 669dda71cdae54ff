"""Stage moe_routers on tiny models: upcycling that is cut short and goes on, and a mixture that is read as it is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from classifier_emergence.models.registry import PathSource
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.results import read_result, write_result
from classifier_emergence.tasks.arithmetic import OPERATIONS
from experiments.params import Params, load_params
from experiments.report.figures import mixtures as figures
from experiments.report.names import upcycled
from experiments.report.tables import mixtures as tables
from experiments.shared.mixtures import DOMAINS, MixtureStudy
from experiments.stages import moe_routers

ROOT = Path(__file__).resolve().parents[3]
ONE_MODEL = pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)


@pytest.fixture
def params(tmp_path: Path, tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> Params:
    """Of the tiny pipeline with one seed, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(tiny_models)
    write_result("results/fetch/tiny-llama.json", {"sha256": "a"})
    tiny = load_params(ROOT / "params.tiny.yaml")
    return tiny.model_copy(update={"moe_routers": tiny.moe_routers.model_copy(update={"seeds": [0]})})


def numbers(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [x for value in tree.values() for x in numbers(value)]
    if isinstance(tree, list):
        return [x for value in tree for x in numbers(value)]
    return [tree] if isinstance(tree, int | float) and not isinstance(tree, bool) else []


def test_a_run_that_was_cut_short_goes_on_and_every_measure_is_there(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> Any:
        raise KeyboardInterrupt

    def again(*_: object, **__: object) -> Any:
        raise AssertionError("what was done is done again")

    with monkeypatch.context() as cut:
        cut.setattr(moe_routers, "twin", stop)
        with pytest.raises(KeyboardInterrupt):
            moe_routers.run(params, "tiny-llama")
    assert not Path("results/moe_routers").exists()
    with monkeypatch.context() as rest:
        for name in ("self_generated", "branch", "mixture"):  # done, and not to be done again
            rest.setattr(moe_routers, name, again)
        moe_routers.run(params, "tiny-llama")
    result = read_result("results/moe_routers/tiny-llama.json")
    assert (result["kind"], result["experts"]) == ("upcycled", list(DOMAINS))
    assert np.isfinite(numbers(result)).all()
    (mixture,) = result["mixtures"]
    summary = result["summary"]
    assert summary["context_change"]["value"] == mixture["after"]["routing"]["context"]["overall"]
    assert summary["largest_cosine"]["value"] == mixture["after"]["projection"]["reported"]["largest"]
    written, twin = (run["after"]["written"]["word"] for run in (mixture, result["twins"][0]))
    gap = np.subtract(*(each["at_depth"]["alignment"]["mean"] for each in (written, twin)))
    assert result["written_minus_twin"]["word"]["mean"] == pytest.approx(gap)
    assert written["layers"] == ["L1", "L3"]
    assert written["at_depth"]["layer"] == "L1"  # the last with experts before 55 % of four
    assert summary["written"]["word"]["alignment"]["value"] == written["at_depth"]["alignment"]["mean"]
    spoken = mixture["after"]["projection"]["written"]
    assert np.shape(spoken["own_words"]["rank"]) == (2, len(OPERATIONS))
    assert summary["own_words_smallest_q"]["least"] == np.min(spoken["own_words"]["q"])
    assert summary["written_found"]["n"] == 2 * len(DOMAINS)
    found = mixture["after"]["projection"]["power"]["found"]
    assert (found["n"], summary["planted"]["at_30"]["value"]) == (12, found["accuracy"][1])
    path = mixture["after"]["routing"]["prompts"]["word"]["path"]
    assert path["beyond_layer"]["mean"] == pytest.approx(path["path"]["mean"] - path["layer"]["mean"])
    assert path["token"]["clusters"] <= 8
    for table in (tables.router_found, tables.router_rows, tables.written_alignment, tables.router_paths):
        table.write({"tiny-llama": result})
    for figure in (figures.router_power, figures.written_words):
        assert figure.draw({"tiny-llama": result}).axes
    assert mixture["before"]["projection"] != mixture["after"]["projection"]
    assert mixture["before"]["routing"] != mixture["after"]["routing"]
    for measured in (result["base"], mixture["before"], mixture["after"], result["twins"][0]["after"]):
        assert set(measured["losses"]) == set(DOMAINS)
        assert len(measured["lens"]["word"]["alignment"]) == len(result["layers"]) == 5
        assert "by_prompt" not in json.dumps(measured)
        assert measured["probe"]["word"]["n"] == 4 * params.moe_routers.test_problems
    projection = mixture["after"]["projection"]
    assert projection["layers"] == mixture["after"]["routing"]["layers"] == ["L1", "L3"]  # every second block
    assert np.allclose(np.sum(mixture["after"]["routing"]["by_domain"], axis=-1), 1)
    assert np.shape(mixture["after"]["routing"]["by_domain"]) == (len(DOMAINS), 2, len(DOMAINS))
    assert len(projection["reported"]["q"]) == 2
    assert len(projection["reported"]["top_tokens"][0]) == len(DOMAINS)
    assert sum(projection["reported"]["categories"].values()) == 2 * len(DOMAINS)
    assert {row["word"] for row in projection["words"]} >= set(OPERATIONS) - set(projection["words_without_token"])
    # Experts know the operation that they were trained on better than the base model does. (Of text that the base model
    # wrote itself nobody can know more.)
    own = [result["branches"][operation]["test_losses"][operation] for operation in OPERATIONS]
    assert np.mean(own) < np.mean([result["base"]["losses"][operation]["mean"] for operation in OPERATIONS])
    kept = {path.name for path in Path("data/adapters/moe_routers/tiny-llama").iterdir()}
    assert kept == {*DOMAINS, "all", "mixture-0.safetensors", "twin-0.safetensors", "manifest.json"}
    assert not Path("data/runs/moe_routers/tiny-llama").exists()


@ONE_MODEL
def test_a_mixture_is_read_as_it_is(lm: LanguageModel, params: Params, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config: Any = lm.model.config
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocab_size, hidden_size=48, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    model.save_pretrained(tmp_path / "moe")
    lm.tokenizer.save_pretrained(tmp_path / "moe")
    registry = {**params.registry, "moe": PathSource(source="path", path=str(tmp_path / "moe"))}
    moe_routers.run(params.model_copy(update={"registry": registry}), "moe")
    result = read_result("results/moe_routers/moe.json")
    assert (result["kind"], result["on_hub"]) == ("mixture", False)
    assert result["bytes_read"] < result["total_bytes"]
    assert result["projection"]["layers"] == result["routing"]["layers"] == ["L0", "L1"]
    assert result["projection"]["controlled"]["found"] == 0  # routers that were never trained
    assert np.isfinite(numbers(result)).all()
    assert result["summary"]["experts"] == 8
    assert result["summary"]["controlled_found"]["value"] == 0
    assert Path("data/adapters/moe_routers/moe").is_dir()
    assert result["summary"]["planted"]["at_50"]["n"] == 12
    assert result["summary"]["own_words_smallest_q"]["value"] is None  # nobody knows what its experts are for
    assert result["summary"]["paths"]["word"]["beyond_layer"]["value"] is not None
    # It goes through the tables and figures that show published mixtures beside those that are made here.
    read = {"moe": result}
    for table in (tables.router_found, tables.router_rows, tables.router_words, tables.router_paths):
        table.write(read)
    found, rows = (Path(f"paper/tables/router_{name}.csv").read_text().splitlines() for name in ("found", "rows"))
    assert found[1].startswith("moe,as published,–,8,")
    assert len(rows) == 1 + 3 * tables.SHOWN
    assert upcycled(read) == {}
    assert figures.router_maxima.draw(read).axes
    assert figures.router_power.draw(read).axes


@ONE_MODEL
def test_no_operand_pair_is_trained_and_tested(lm: LanguageModel, params: Params) -> None:
    data = MixtureStudy(lm, params, [f"{n} swallows return to the barn" for n in range(12)])
    tested = {problem.operands for problem in data.problems.test}
    trained = {problem.operands for problems in data.problems.train.values() for problem in problems}
    assert tested.isdisjoint(trained)
    assert {domain: len(data.test[domain]) for domain in DOMAINS} == {**dict.fromkeys(OPERATIONS, 12), "text": 8}
    assert not any(text in data.train["text"] for text in data.test["text"])
    for style in ("symbol", "word"):
        assert len(data.prompts(style)) == len(data.own) == 4 * params.moe_routers.test_problems
