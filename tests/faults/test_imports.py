"""Programs that are ended while they import their libraries, at any import: one line, no traceback."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.damage import SEED, WHOLE, tried

ROOT = Path(__file__).resolve().parents[2]
SHARE = 0.04
"""Of a program's imports, of which there are a thousand to some thousands."""
ALL = [
    ("classifier-emergence", "lens", "-m", "none", "x"),
    ("classifier_emergence", "models", "show", "none"),
    ("experiments.pipeline", "list"),
    ("experiments.report.ledger",),
    ("experiments.report.figures",),
    ("experiments.stages.dual_reward", "--model", "none"),
]
PROGRAMS = [(SHARE, each) for each in ALL] if WHOLE else [(0.004, ALL[0]), (0.01, ALL[3])]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the copies are forks")
@pytest.mark.parametrize(("share", "program"), PROGRAMS, ids=[" ".join(program) for _, program in PROGRAMS])
def test_a_program_that_is_ended_while_it_imports_says_so_in_one_line(
    share: float, program: tuple[str, ...], tmp_path: Path
) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.faults.importing", str(SEED), str(share), *program]
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(ROOT / "src"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr  # there is no such model, and no pipeline here
    copies = [json.loads(line) for line in done.stdout.splitlines()]
    assert copies
    for ending, module, code, said in copies:
        if ending == "SIGTERM":
            assert (code, said) == (-signal.SIGTERM, ""), module
        elif code != 2 or said not in ("", done.stderr):  # whose work was done, and told here or before the fork
            assert (code, said.count("\n"), said.split(";")[0]) == (130, 1, "interrupted"), (module, code, said)
        tried[program[0], ending, "one line" if code == 130 else "is gone"] += 1
