import copy
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from classifier_emergence.errors import InputError
from experiments.params import load_params

ROOT = Path(__file__).resolve().parents[2]
RAW = yaml.safe_load((ROOT / "params.yaml").read_text())


def written(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    raw = copy.deepcopy(RAW)
    change(raw)
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("name", ["params.yaml", "params.tiny.yaml"])
def test_the_shipped_parameters_are_valid(name: str) -> None:
    assert load_params(ROOT / name).models


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda raw: raw["probing"].update(shufles=3),
            "probing.shufles: unknown parameter; did you mean 'shuffles'?",
        ),
        (lambda raw: raw.update(modles=[]), "modles: unknown parameter; did you mean 'models'?"),
        (
            lambda raw: raw["bank"].update(pairs="many"),
            "bank.pairs: input should be a valid integer (found 'many')",
        ),
        (
            lambda raw: raw["bank"].update(pairs=2.0),
            "bank.pairs: input should be a valid integer (found 2.0)",
        ),
        (lambda raw: raw["probing"].update(C=-1.0), "probing.C: input should be greater than 0 (found -1.0)"),
        (lambda raw: raw["bank"].update(pairs=800), "bank: pairs is 800, but 2..13 gives 144 pairs"),
        (lambda raw: raw["bank"].pop("seed"), "bank.seed: field required"),
        (
            lambda raw: raw["models"].append("gemma-3-270"),
            "params.yaml: models: unknown key 'gemma-3-270'; did you mean 'gemma-3-270m'?",
        ),
        (
            lambda raw: raw["trained_models"].append("olmoe-1b-7b"),
            "trained_models: 'olmoe-1b-7b' is not among supervised_models",
        ),
        (
            lambda raw: raw["reinforcement_models"].append("olmoe-1b-7b"),
            "reinforcement_models: 'olmoe-1b-7b' is not among grpo_models",
        ),
        (
            lambda raw: raw["moe_models"].append("olmo-1b-7b"),
            "moe_models: unknown key 'olmo-1b-7b'; did you mean 'olmoe-1b-7b'?",
        ),
        (
            lambda raw: raw["moe_routers"].update(batch_size=12),
            "moe_routers.batch_size: input should be a multiple of 5 (found 12)",
        ),
        (lambda raw: raw["at_size"].pop("gemma-3-270m"), "at_size: give one entry for each of supervised_models"),
        (
            lambda raw: raw["at_size"]["gemma-3-270m"].update(lora_sft={"stepps": 3}),
            "at_size.gemma-3-270m.lora_sft.stepps: Extra inputs are not permitted",
        ),
        (
            lambda raw: raw["at_size"]["gemma-3-270m"].update(grpo={"steps": 3}),
            "at_size.gemma-3-270m.grpo: no such section; known: dual_reward, lora_sft, cot_alignment",
        ),
        (
            lambda raw: raw["at_size"]["gemma-3-270m"].update(replication={"seeds": {"grpo": [3, 4]}}),
            "at_size.gemma-3-270m.replication: 'gemma-3-270m' is not among replication_models",
        ),
        (
            lambda raw: raw["dual_reward"].update(clas_weight=0.3),
            "dual_reward.clas_weight: unknown parameter; did you mean 'class_weight'?",
        ),
        (
            lambda raw: raw["registry"]["gemma-3-270m"].update(sha256="abc"),
            "registry.gemma-3-270m.sha256: string should match pattern '^[0-9a-f]{64}$' (found 'abc')",
        ),
    ],
)
def test_a_mistake_is_named_in_one_line(change: Callable[..., object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_params(written(tmp_path, change))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "models: [", ""])
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"params.yaml: "):
        load_params(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing.yaml: cannot be read"):
        load_params(tmp_path / "nothing.yaml")


@pytest.mark.filterwarnings("ignore:.* found in sys.modules")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "gemma-3-270"],
            "error: model: unknown key 'gemma-3-270'; did you mean 'gemma-3-270m'?\n",
        ),
        (["--model", "gemma-3-270m", "--params", "none.yaml"], "error: none.yaml: cannot be read"),
    ],
)
def test_stages_exit_with_2_and_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["probing", *arguments])
    with pytest.raises(SystemExit) as exited:
        runpy.run_module("experiments.stages.probing", run_name="__main__", alter_sys=True)
    assert exited.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(message)
    assert told.count("\n") == 1
