"""Runs a program as its user does and ends a copy of it at many of its imports; says what became of each copy.

``python -m tests.faults.importing SEED SHARE PROGRAM ...``: at a share of the imports, drawn by the seed, the process
forks, and its child gets a signal. Standard output has a line of JSON for each: ``[signal, module, exit code, what it
said]``. A program is a module, as of ``python -m``, or ``classifier-emergence``, as its script.
"""

import json
import os
import random
import runpy
import signal
import sys
import tempfile
from typing import Any


def main(seed: str, share: str, program: str, *arguments: str) -> None:
    """Run it; its own output goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    chance, started, parent = random.Random(f"{seed} {program}"), False, os.getpid()

    def end_a_copy(event: str, args: tuple[Any, ...]) -> None:
        nonlocal started
        if event != "import" or os.getpid() != parent:
            return
        # What comes before a package's first lines is Python's own.
        started = started or hasattr(sys.modules.get("classifier_emergence.interrupts"), "_raise")
        if not started or chance.random() > float(share):
            return
        ending = chance.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM])
        with tempfile.TemporaryFile("w+") as said:
            process = os.fork()
            if not process:
                os.dup2(said.fileno(), 2)
                os.kill(os.getpid(), ending)
                return
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            said.seek(0)
            answers.write(json.dumps([ending.name, args[0], code, said.read()]) + "\n")
            answers.flush()

    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever started this
    sys.addaudithook(end_a_copy)
    script = program == "classifier-emergence"
    sys.argv = [f"bin/{program}" if script else "-m", *arguments]
    if script:
        from classifier_emergence.cli.app import main as run

        run()
    else:
        runpy._run_module_as_main(program)  # type: ignore[attr-defined]  # what python -m calls


if __name__ == "__main__":
    main(*sys.argv[1:])
