"""A second process of a stage, for runs side by side: it runs the same command and takes runs as the first one does."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HELPING = "CLASSIFIER_EMERGENCE_SECOND"


def helping(log: Path) -> bool:
    """Whether this is the second process that prints to ``log``."""
    return os.environ.get(HELPING) == str(log)


@contextmanager
def second_process(log: Path, *, needed: bool) -> Iterator[None]:
    """Within, a second process runs this stage's command, and each of the two has half of the threads.

    There is none where it could not help: with one thread, with a GPU, within another program (a test), or within the
    second process itself, which ends when the first one does.

    Args:
        log: Gets what the second process prints; it shows no bars.
        needed: Whether there is enough to do for two.
    """
    import torch  # late: stages tell bad input before the seconds that this takes

    if helping(log):
        threading.Thread(target=_end_with_the_first, daemon=True).start()
    threads, stage = torch.get_num_threads(), sys.modules["__main__"].__spec__
    ours = stage is not None and stage.name.startswith("experiments.")
    if not needed or threads < 2 or not ours or HELPING in os.environ or torch.cuda.is_available():
        yield
        return
    assert stage is not None
    environment = {**os.environ, HELPING: str(log), "OMP_NUM_THREADS": str(threads // 2)}
    command = [sys.executable, "-m", stage.name, *sys.argv[1:]]
    torch.set_num_threads(threads - threads // 2)
    try:
        with (
            log.open("w", encoding="utf-8") as file,
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=file, stderr=file) as second,
        ):
            try:
                yield
                if second.poll():
                    sys.stderr.write(f"the second process ended early ({second.returncode}); {log} has why\n")
            finally:
                second.terminate()
    finally:
        torch.set_num_threads(threads)


def _end_with_the_first() -> None:
    sys.stdin.read()  # until the first process, which holds the other end, is gone
    os._exit(1)
