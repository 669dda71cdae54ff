"""Two processes that train one model end with one adapter, that of one process; what cannot be shared is refused."""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import launch as launcher
from safetensors.torch import load_file, save_file

from classifier_emergence.cli.app import run as program
from classifier_emergence.errors import InputError
from classifier_emergence.instruments.finetune import sft
from classifier_emergence.processes import rank
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.tasks.classification import get_task
from classifier_emergence.training.adapters import Start, adapted_together, parameters_of
from classifier_emergence.training.sharding import _SHARDING
from classifier_emergence.training.supervised import Member, train_together
from tests.training.test_supervised import ADAPTER, DUAL, HEADED, SCHEDULE, examples

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
MEMBERS = {"dual": DUAL, "head": HEADED}


def run(lm: LanguageModel, work: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    starts = {name: Start(ADAPTER, 0, objective.classes) for name, objective in MEMBERS.items()}
    with adapted_together(lm, starts) as wrapped:
        members = {name: Member(examples(lm, objective), objective, 3) for name, objective in MEMBERS.items()}
        trained = train_together(lm, wrapped, members, SCHEDULE, work=work)
        weights = {full: p.detach().clone() for name in MEMBERS for full, p in parameters_of(wrapped, name).items()}
    return {name: asdict(one) for name, one in trained.items()}, weights


def told(i: int) -> dict[str, str]:
    """What the launcher tells a process of two, but for where they meet."""
    return {"RANK": f"{i}", "LOCAL_RANK": f"{i}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


def in_two(work: Callable[[int], object], folder: Path) -> str:
    """Let two copies of this process, which has imported everything, work in a folder; their standard output."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        met = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{server.getsockname()[1]}"}
    copies = []
    for i in range(2):
        if process := os.fork():
            copies.append(process)
            continue
        code = 1
        try:
            signal.alarm(300)  # ends it, should the two wait for one another
            os.chdir(folder)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # not those that pytest captures
            os.environ |= told(i) | met
            AcceleratorState._reset_state(reset_partial_state=True)  # of what was trained here before
            code = int(bool(work(i)))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in copies]
    assert codes == [0, 0], (folder / "err").read_text()
    return (folder / "out").read_text()


def test_the_launcher_tells_processes_what_their_copies_are_told(tmp_path: Path) -> None:
    (tmp_path / "tell.py").write_text(
        "import json, os, pathlib\npathlib.Path(os.environ['RANK']).write_text(json.dumps({**os.environ}))\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "tell.py"]
    subprocess.run(launcher, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    for i in range(2):
        found = json.loads((tmp_path / f"{i}").read_text())
        assert told(i).items() <= found.items()
        assert {"MASTER_ADDR", "MASTER_PORT"} <= found.keys()


forked = pytest.mark.skipif(not hasattr(os, "fork"), reason="the copies are forks")


@forked
@pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)
def test_two_processes_train_what_one_does(lm: LanguageModel, tmp_path: Path) -> None:
    def work(i: int) -> None:
        found, trained = run(lm, tmp_path / "work")
        assert rank() == i
        save_file(trained, tmp_path / f"{i}.safetensors")
        (tmp_path / f"{i}.json").write_text(json.dumps(found))

    in_two(work, tmp_path)
    first, second = (load_file(tmp_path / f"{i}.safetensors") for i in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first | second)
    losses, weights = run(lm, tmp_path / "alone")
    for name, values in weights.items():
        torch.testing.assert_close(first[name], values, rtol=1e-2, atol=1e-3)
    shared = json.loads((tmp_path / "0.json").read_text())
    for name in MEMBERS:
        for a, b in zip(shared[name]["losses"], losses[name]["losses"], strict=True):
            assert a == pytest.approx(b, rel=1e-3)
    assert not list((tmp_path / "work").glob("*.tmp"))


@forked
def test_dual_reward_on_the_command_line_is_shared_and_reported_once(tiny_models: Path, tmp_path: Path) -> None:
    words = ["dual-reward", "-m", str(tiny_models / "tiny-llama"), "--steps", "2"]
    out = in_two(lambda _: program([*words, "--output", "adapter", "--json", "found.json"]), tmp_path)
    assert out.count("adapter: adapter") == 1
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "found.json").read_text())["method"] == "dual reward"


@pytest.mark.parametrize(
    ("words", "message"), [("grpo", "error: processes: GRPO"), ("dual-reward --batch-size 1", "error: batch_size: ")]
)
def test_what_cannot_be_shared_is_refused(
    words: str, message: str, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")  # as the launcher sets it
    assert program([*words.split(), "-m", str(tiny_models / "tiny-llama"), "--steps", "2"]) == 2
    assert message in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)
@pytest.mark.parametrize(("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepS")])
def test_shards_are_refused_before_anything_is_trained(
    lm: LanguageModel, variable: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(InputError, match=f"^processes: {name}"):
        sft(lm, get_task("arithmetic"), tmp_path / "out", steps=1)
    assert not [*tmp_path.iterdir()]


def test_the_variables_are_those_that_the_launcher_sets() -> None:
    text = Path(launcher.__file__).read_text()
    assert all(f'current_env["{variable}"] = "true"' in text for variable in _SHARDING)
