import subprocess
import sys

import pytest

BEFORE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)
"""
LOST = """
from classifier_emergence.interrupts import end_program, raised
end_program()

def lost():
    try:
        interrupt()
    except KeyboardInterrupt:
        raise ImportError("what another library makes of it")

try:
    with raised():
        lost()
except KeyboardInterrupt:
    print("told")
interrupt()  # which is too late
print("done")
"""


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("sys.argv = ['bin/classifier-emergence']; import classifier_emergence.cli; interrupt()",
         (130, "", "interrupted; no result was written\n")),
        ("import classifier_emergence.cli as _; print(signal.getsignal(2) is signal.default_int_handler)",
         (0, "True\n", "")),
        (LOST, (0, "told\ndone\n", "")),
        (f"signal.signal(2, signal.SIG_IGN){LOST}", (0, "done\n", "")),
    ],
    ids=["a program that imports", "a library", "an interrupt that is taken for another error", "a background job"],
)  # fmt: skip
def test_an_interrupt_ends_a_program_before_its_work_and_is_raised_within_it(
    code: str, ends: tuple[int, str, str]
) -> None:
    done = subprocess.run([sys.executable, "-c", f"{BEFORE}\n{code}"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == ends
