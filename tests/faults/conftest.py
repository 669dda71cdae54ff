from collections import Counter
from typing import Any

from tests.faults.damage import SEED, WHOLE, tried


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table of cells that were tried and held."""
    if not tried:
        return
    rows: dict[tuple[str, str], Counter[str]] = {}
    for (life, damage, outcome), count in tried.items():
        rows.setdefault((life, damage), Counter())[outcome] += count
    terminalreporter.section(f"faults, seed {SEED}, {'all' if WHOLE else 'a sample of the'} cells")
    for (life, damage), outcomes in sorted(rows.items()):
        told = ", ".join(f"{outcome} {count}" for outcome, count in sorted(outcomes.items()))
        terminalreporter.write_line(f"{life:<16} {damage:<16} {told}")
    held = sum(count for (*_, outcome), count in tried.items() if outcome != "BROKEN")
    terminalreporter.write_line(f"{held} of {tried.total()} cells held")
