"""Stage paper: build paper/paper.pdf from paper/main.typ, the results, tables and figures."""

import argparse
from pathlib import Path

from experiments.report.build import build
from experiments.shared.stage import exit_on_bad_input

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    exit_on_bad_input(lambda: build(Path("paper/main.typ"), Path("paper/paper.pdf"), root=Path()))
