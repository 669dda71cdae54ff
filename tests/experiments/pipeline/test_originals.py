"""The originals' profile, without the hub: a server on this machine, and a folder like the hub's cache."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from architectures import build, save_as_mxfp4
from local_hub import COMMIT, as_cache, served

from classifier_emergence.errors import InputError
from classifier_emergence.results import read_result, write_result
from experiments.params import load_params
from experiments.pipeline.originals import CLAIMS, PINNED, left, load_profile
from experiments.report.claims import LEDGER, load_claims
from experiments.report.ledger import judge_all

PROFILE = Path("params.originals.yaml")
ROOT = Path(__file__).resolve().parents[3]
READ = ["fetch", "residuals", "probing", "logit_lens"]
TRAIN, ROUTE = ["fetch", "dual_reward", "dual_reward_long"], ["fetch", "moe_routers"]
MODELS = {
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", "llama", {"tie_word_embeddings": True}),
    "llama-3.2-1b-instruct": ("meta-llama/Llama-3.2-1B-Instruct", "llama", {"rms_norm_eps": 1e-5}),
    "granite-3.1-2b": ("ibm-granite/granite-3.1-2b-base", "granite", {"tie_word_embeddings": True}),
    "olmoe-1b-7b": ("allenai/OLMoE-1B-7B-0924", "olmoe", {}),
    "gpt-oss-20b": ("openai/gpt-oss-20b", "gpt-oss", {"intermediate_size": 32}),
}
GATED = MODELS["llama-3.2-1b"][0]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random models of the originals' architectures, in ``owner/name`` folders."""
    folder, tokenizer = tmp_path_factory.mktemp("hub"), tiny.tokenizer(tiny.corpus(), bos=True)
    for repo, name, changes in MODELS.values():
        model = build(name, vocab_size=len(tokenizer) + 5, **changes)
        if name == "gpt-oss":
            save_as_mxfp4(model, folder / repo)
        else:
            model.save_pretrained(folder / repo)
        tokenizer.save_pretrained(folder / repo)
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the ledger, tiny parameters and a profile; Granite's commit is not pinned."""
    shutil.copytree(ROOT / "paper", tmp_path / "paper", ignore=shutil.ignore_patterns("paper.pdf", "tables", "figures"))
    base = yaml.safe_load((ROOT / tiny.PARAMS).read_text())
    base |= {
        key: ["llama-3.2-1b"]
        for key in (
            "models",
            "supervised_models",
            "trained_models",
            "lens_models",
            "teachers",
            "tuning_models",
            "grpo_models",
            "replication_models",
            "reinforcement_models",
            "moe_models",
        )
    } | {"at_size": {"llama-3.2-1b": {}}, "tuning": base["tuning"] | {"teacher": "llama-3.2-1b"}}
    base["registry"] = {
        key: {"source": "hub", "repo": repo, "revision": COMMIT, "licence": "MIT"}
        for key, (repo, *_) in MODELS.items() if key != "granite-3.1-2b"
    }  # fmt: skip
    entry = {"memory_gb": 1, "minutes": {"cpu": 1, "gpu": 1}}
    profile = {
        "base": "params.yaml", "models": {key: {"stages": READ, **entry} for key in MODELS},
        "unpinned": {"granite-3.1-2b": {"repo": MODELS["granite-3.1-2b"][0], "licence": "Apache-2.0"}},
    }  # fmt: skip
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / PROFILE).write_text(yaml.safe_dump(profile))
    return tmp_path


def originals(place: Path, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """The documented command, in a process of its own."""
    ours = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1",
        "HF_HOME": str(place / "hf"), "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    without = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    command = [sys.executable, "-m", "experiments.pipeline", "originals", *arguments]
    return subprocess.run(
        command, cwd=place, env=without | ours | variables, capture_output=True, text=True, check=False, timeout=900
    )


def run_stages(place: Path, stages: list[str], models: Iterable[str] = MODELS) -> None:
    """Have the profile run these on some models."""
    profile = yaml.safe_load((place / PROFILE).read_text())
    for key in models:
        profile["models"][key]["stages"] = stages
    (place / PROFILE).write_text(yaml.safe_dump(profile))


@pytest.mark.tiny
def test_a_gated_model_names_page_and_token_and_the_same_command_goes_on(place: Path, repositories: Path) -> None:
    run_stages(place, READ[:1], ["llama-3.2-1b"])
    run_stages(place, [stage for stage in READ if stage != "probing"], ["gpt-oss-20b"])
    with served(repositories, gated=(GATED,)) as hub:
        refused = originals(place, "llama-3.2-1b", "granite-3.1-2b", HF_ENDPOINT=hub)
        said = f"error: llama-3.2-1b: {GATED} is gated; accept the licence on its page https://huggingface.co/{GATED}"
        assert said in refused.stderr, refused.stderr
        assert "HF_TOKEN" in refused.stderr
        assert "failed, with its message above: fetch@llama-3.2-1b;" in refused.stdout + refused.stderr
        assert "Traceback" not in refused.stderr
        assert refused.returncode == 1
        verdicts = read_result(place / CLAIMS)
        assert verdicts["C03"]["headline"] != "untested"
        assert [*verdicts["C03"]["primary"]] == ["granite-3.1-2b"]
        assert {verdicts[claim]["headline"] for claim in ("C05", "C12", "C25")} == {"untested"}
        assert load_params(place / PINNED).registry["granite-3.1-2b"].model_dump()["revision"] == COMMIT

        done = originals(place, "llama-3.2-1b", "granite-3.1-2b", "gpt-oss-20b", HF_ENDPOINT=hub, HF_TOKEN="hf_x")
    assert done.returncode == 0, done.stderr
    assert "probing@granite-3.1-2b" not in done.stderr  # it has its result
    verdicts = read_result(place / CLAIMS)
    assert [*verdicts["C25"]["primary"].items()] == [("gpt-oss-20b", "violated")]
    assert verdicts["C25"]["headline"] in ("contradicted", "reported protocol only")


@pytest.mark.tiny
def test_a_folder_in_the_layout_of_the_hubs_cache_needs_no_hub(place: Path, repositories: Path) -> None:
    as_cache(repositories, place / "hf" / "hub")
    run_stages(place, READ[:1])
    done = originals(place, "granite-3.1-2b", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert read_result(place / "results/fetch/granite-3.1-2b.json")["source"]["revision"] == COMMIT


@pytest.mark.tiny
def test_training_is_judged_once_both_models_were_trained(place: Path, repositories: Path) -> None:
    as_cache(repositories, place / "hf" / "hub")
    run_stages(place, TRAIN)
    done = originals(place, "llama-3.2-1b", "llama-3.2-1b-instruct", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert [*read_result(place / CLAIMS)["C12"]["primary"]] == ["llama-3.2-1b-instruct"]
    assert read_result(place / CLAIMS)["C12"]["headline"] != "untested"


@pytest.mark.tiny
def test_routers_of_both_mixtures_are_read_and_judged(place: Path, repositories: Path) -> None:
    as_cache(repositories, place / "hf" / "hub")
    run_stages(place, ROUTE)
    # Beside a dense model that is upcycled, as in the paper: some of the ledger's numbers are of such alone.
    done = originals(place, "llama-3.2-1b", "olmoe-1b-7b", "gpt-oss-20b", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    mixtures = {key: read_result(place / f"results/moe_routers/{key}.json") for key in ("olmoe-1b-7b", "gpt-oss-20b")}
    assert all((found["kind"], found["on_hub"]) == ("mixture", True) for found in mixtures.values())
    assert mixtures["olmoe-1b-7b"]["routing"]["layers"] == ["L0", "L1", "L2", "L3"]
    assert mixtures["gpt-oss-20b"]["routing_not_run"] == "the experts are quantised"
    verdicts = read_result(place / CLAIMS)
    assert {*verdicts["C18"]["primary"]} == {"gpt-oss-20b"}
    assert verdicts["C18"]["headline"] != "untested"
    assert verdicts["C19"]["headline"] == "untested"  # of GPT-OSS the rows alone are read


def test_every_stage_of_the_committed_profile_is_run_by_a_test() -> None:
    models = load_profile(ROOT / PROFILE, []).models.values()
    assert {stage for entry in models for stage in entry.stages} == {*READ, *TRAIN, *ROUTE}


def test_the_committed_profile_is_sound() -> None:
    profile, params = load_profile(ROOT / PROFILE, []), load_params(ROOT / "params.yaml")
    assert {*profile.models} <= {*params.registry, *profile.unpinned}
    assert not {*params.registry} & {*profile.unpinned}
    needed = {key for claim in load_claims(ROOT / LEDGER).values() for key in claim.models}
    assert needed <= {*profile.models}
    assert all("fetch" in entry.stages for entry in profile.models.values())
    with pytest.raises(InputError, match="no model of"):
        load_profile(ROOT / PROFILE, ["gpt-oss"])


def test_what_is_left_is_what_has_no_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    entry = load_profile(PROFILE, []).models["gpt-oss-20b"]
    assert left("gpt-oss-20b", entry) == READ
    write_result(Path("results/fetch/gpt-oss-20b.json"), {})
    assert left("gpt-oss-20b", entry) == READ[1:]


def curve(value: float, n: int = 480) -> dict[str, Any]:
    return {"accuracy": [value] * 5, "interval": [[value - 0.01, value + 0.01]] * 5, "n": n}


def lens(value: float) -> dict[str, Any]:
    word = {"alignment": [value] * 5, "interval": [[value - 0.01, value + 0.01]] * 5}
    return {"layers": LAYERS, "controlled": {"symbol": {"n": 480, "word": word}}}


LAYERS = ["emb", "L0", "L1", "L2", "L3"]


@pytest.mark.parametrize(
    ("claim", "values", "headline"),
    [
        ("C05", [0.9, 0.9, 0.6, 0.9], "supported"),
        ("C05", [0.9, 0.9, 0.9, 0.9], "mixed by model"),
        ("C05", [0.9, 0.5, 0.9, 0.9], "contradicted"),
        ("C05", [0.9, 0.9, 0.6], "untested"),
        ("C12", [0.8, 0.4], "supported"),
        ("C12", [0.4, 0.8], "contradicted"),
        ("C12", [0.8], "untested"),
        ("C25", [0.7], "supported"),
        ("C25", [0.0], "contradicted"),
        ("C25", [], "untested"),
    ],
)
def test_verdicts_come_of_the_originals_once_all_are_there(claim: str, values: list[float], headline: str) -> None:
    entry = load_claims(ROOT / LEDGER)[claim]
    primary = entry.model_copy(update={"atoms": [atom for atom in entry.atoms if atom.primary]})
    keys = {"C05": ["llama-3.2-1b", "llama-3.2-1b-instruct", "granite-3.1-2b", "granite-3.1-2b-instruct"],
            "C12": ["llama-3.2-1b", "llama-3.2-1b-instruct"], "C25": ["gpt-oss-20b"]}[claim]  # fmt: skip
    stage, made = {
        "C05": ("probing", lambda x: {"layers": LAYERS, "controlled": {"symbol": {"held_out_operands": curve(x)}}}),
        "C12": ("dual_reward_long", lambda x: {"main": {"symbol": {"alignment": {
            "value": x, "by_seed": [x, x], "interval": [x - 0.02, x + 0.02], "n": 240}}}}),
        "C25": ("logit_lens", lens),
    }[claim]  # fmt: skip
    found = {key: made(value) for key, value in zip(keys, values, strict=False)}
    facts = {key: {"architecture": "a", "parameters": 1} for key in keys}
    assert judge_all({claim: primary}, {"fetch": facts, stage: found}, keys, 0.95)[claim]["headline"] == headline
