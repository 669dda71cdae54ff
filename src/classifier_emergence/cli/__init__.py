"""The command line."""

import sys
from pathlib import Path

from classifier_emergence.interrupts import end_program

if Path(sys.argv[0]).stem == "classifier-emergence":
    end_program()
