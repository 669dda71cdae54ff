"""The whole matrix: ``python -m tests.faults``, in two processes side by side, for two cores; arguments go to pytest.

What says what it tried comes when both have ended: a table of each.
"""

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
PARTS = (("test_files.py", "test_bad_input.py"), ("test_processes.py", "test_imports.py"))


def main() -> int:
    """The largest of their exit codes."""
    environment = {**os.environ, "FAULTS": "whole", "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-m", "pytest", *(str(FOLDER / name) for name in names)] for names in PARTS]
    second = subprocess.Popen(
        [*commands[1], *sys.argv[1:]], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        first = subprocess.run([*commands[0], *sys.argv[1:]], env=environment)
        print(second.communicate()[0])  # noqa: T201
    finally:
        second.terminate()
    return max(first.returncode, second.returncode)


if __name__ == "__main__":
    sys.exit(main())
