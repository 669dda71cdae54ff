"""Do the committed results belong to the committed code and parameters? Exit code 1 and the stale stages if not.

DVC compares the hashes in dvc.lock with the tree. ``dvc status`` exits with 0 also where things are stale, and ``dvc
repro --dry`` can fail on a missing file where a parameter changed; so both its exit code and its words are read.
"""

import re
import subprocess
import sys


def stale_stages() -> list[str]:
    """Stages that ``dvc repro`` would run; cached outputs that are merely absent do not count."""
    command = [sys.executable, "-m", "dvc", "repro", "--dry", "--allow-missing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    stale = re.findall(r"Running stage '([^']+)'", done.stdout)
    if done.returncode and not stale:
        return [f"(dvc itself failed) {done.stderr.strip()}"]
    return stale


if __name__ == "__main__":
    stale = stale_stages()
    if stale:
        sys.exit(f"results are older than the code or parameters; run `dvc repro`, then commit: {', '.join(stale)}")
    sys.stdout.write("every committed result belongs to the committed code and parameters\n")
