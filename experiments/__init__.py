"""One file a stage: read parameters, call the library, write one result."""

import sys

from classifier_emergence.interrupts import end_program

if sys.argv[:1] == ["-m"]:  # while python -m looks for what it shall run
    end_program()
