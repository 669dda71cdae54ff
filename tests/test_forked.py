"""Stages in forks behave as in processes of their own."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import forked

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stages are forked on Linux alone")
STAGES = {
    "good": "import os, sys; print(__name__, sys.argv[1:], os.getcwd()); print('seen', file=sys.stderr)",
    "refused": "import sys; sys.exit(2)",
    "told": "import sys; sys.exit('it was so')",
    "broken": "raise ValueError('of no use')",
    "killed": "import os; os.abort()",
}


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A folder with stages that are imported when the server starts, and its environment."""
    folder = tmp_path_factory.mktemp("forked")
    (folder / "experiments").mkdir()
    (folder / "experiments" / "__init__.py").touch()
    shutil.copy(forked.__file__, folder / "experiments")
    for name, code in STAGES.items():
        (folder / "experiments" / f"{name}.py").write_text(f"if __name__ == '__main__':\n    {code}\n")
    with forked.serving(folder, dict(os.environ)) as environment:
        yield folder, environment


def run(forks: tuple[Path, dict[str, str]], command: str) -> subprocess.CompletedProcess[str]:
    folder, environment = forks
    return subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_arguments_folder_and_streams_are_those_of_the_command(forks: tuple[Path, dict[str, str]]) -> None:
    done = run(forks, "python -m experiments.good --model 'a b' ü")
    assert done.stdout == f"__main__ ['--model', 'a b', 'ü'] {forks[0]}\n"
    assert (done.returncode, done.stderr) == (0, "seen\n")
    assert run(forks, "mkdir -p deep && cd deep && python -m experiments.good").stdout.endswith("/deep\n")


@pytest.mark.parametrize(
    ("stage", "code", "message"), [("refused", 2, ""), ("broken", 1, "ValueError: of no use\n"), ("killed", 1, "")]
)
def test_a_failure_keeps_its_exit_code(stage: str, code: int, message: str, forks: tuple[Path, dict[str, str]]) -> None:
    done = run(forks, f"python -m experiments.{stage}")
    assert done.returncode == code
    assert done.stderr.endswith(message)
    assert run(forks, "python -m experiments.good").returncode == 0  # the next one runs


def test_the_message_of_an_exit_is_shown(forks: tuple[Path, dict[str, str]]) -> None:
    done = run(forks, "python -m experiments.told")
    assert (done.returncode, done.stderr) == (1, "it was so\n")
