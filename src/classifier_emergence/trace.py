"""From a number of a verdict back to what made it: file and key, stage, function and the test of the ledger."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from classifier_emergence.errors import InputError
from classifier_emergence.results import lookup, read_result

MADE_BY = Path("paper", "made_by.yaml")
"""Stage -> pattern of dotted keys of its result -> file and name of the function that measures what stands there."""
LEDGERS = ("claims", "predictions")
"""Of each, ``paper/<name>.yaml`` says what is asked, and ``results/<name>.json`` what was found."""


@dataclass(frozen=True)
class Origin:
    """Where a number of a verdict comes from; paths start at the repository's root."""

    file: str
    key: str
    """Dotted, within the file."""
    committed: str
    """What the file holds there, in full."""
    stage: str
    """As ``dvc repro`` and ``nox -s reproduce --`` take it."""
    script: str
    made_by: str
    """File and name of the function that measures the number."""
    test: str
    """File and line of the ledger."""
    minus: str
    """What is taken away from the committed number, if the test is about a difference."""

    def told(self) -> str:
        """The chain in one line."""
        less = f" minus {self.minus}" if self.minus else ""
        number = f"{self.file}: {self.key} = {self.committed}{less}"
        return f"{number}; stage {self.stage} ({self.script}), measured by {self.made_by}; asked in {self.test}"


def judged(root: Path) -> dict[str, dict[str, Any]]:
    """Both ledgers as they were judged: ledger -> claim or prediction -> verdict with its evidence.

    Raises:
        InputError: A result is missing or damaged; names the file.
    """
    return {name: read_result(root / "results" / f"{name}.json") for name in LEDGERS}


def origins(root: Path, ledger: str, items: Mapping[str, Any]) -> dict[str, list[Origin]]:
    """Of each claim or prediction the chain behind every piece of its evidence, in order.

    Args:
        root: The repository.
        ledger: One of ``LEDGERS``.
        items: Some of what was judged, as it stands in the judged ledger.

    Raises:
        InputError: A result or the ledger is missing, or they do not belong together; names the file.
    """
    file = Path("paper", f"{ledger}.yaml")
    files = {piece["result"]["file"] for item in items.values() for piece in item["evidence"]}
    held = {name: read_result(root / name) for name in files}
    tests = _tests(root / file) if files else {}
    makers = read_makers(root) if files else {}
    found = {}
    for key, item in items.items():
        asked = [(piece, _asked(tests.get(key, []), piece)) for piece in item["evidence"]]
        if gone := next((piece["what"] for piece, test in asked if test is None), None):
            raise InputError(f"{file}: {key} has no test {gone!r} any more; judge again: dvc repro claims")
        found[key] = [_origin(piece, *test, held, file, makers) for piece, test in asked if test]
    return found


def read_makers(root: Path) -> dict[str, dict[str, str]]:
    """What ``MADE_BY`` holds.

    Raises:
        InputError: It is missing or no YAML.
    """
    try:
        makers: dict[str, dict[str, str]] = yaml.safe_load((root / MADE_BY).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{MADE_BY}: cannot be read as YAML; restore it from git") from error
    return makers


def made_by(makers: Mapping[str, Mapping[str, str]], stage: str, key: str) -> str:
    """File and name of the function that measures what stands at a key: that of the first pattern that fits.

    Raises:
        InputError: None does.

    Example:
        >>> makers = {"grpo": {"*.largest_rise.*": "experiments/stages/grpo.py arm_summary"}}
        >>> made_by(makers, "grpo", "arms.controlled.summary.largest_rise.0")
        'experiments/stages/grpo.py: arm_summary'
    """
    for pattern, function in makers.get(stage, {}).items():
        if fnmatchcase(key, pattern):
            return function.replace(" ", ": ")
    raise InputError(f"{MADE_BY}: no pattern of {stage} fits the key {key}; add one")


def _asked(tests: list[tuple[int, Any]], piece: Mapping[str, Any]) -> tuple[int, Any] | None:
    """The test that a piece of evidence answers, and its line."""
    same = (
        (line, atom)
        for line, atom in tests
        if (atom["what"], atom["protocol"]) == (piece["what"], piece["protocol"])
        and atom.get("model", piece["model"]) == piece["model"]
    )
    return next(same, None)


def _origin(
    piece: Mapping[str, Any], line: int, atom: Any, held: Mapping[str, Any], file: Path,
    makers: Mapping[str, Mapping[str, str]],
) -> Origin:  # fmt: skip
    where, minus = piece["result"], atom.get("minus")
    stage = Path(where["file"]).parent.name
    return Origin(
        **where,
        committed=str(lookup(held[where["file"]], where["key"])),
        stage=f"{stage}@{piece['model']}",
        script=f"experiments/stages/{stage}.py",
        made_by=made_by(makers, stage, where["key"]),
        test=f"{file.as_posix()}:{line}",
        minus=f"{minus['key']} of {minus['stage']}@{minus.get('model', piece['model'])}" if minus else "",
    )


def _tests(file: Path) -> dict[str, list[tuple[int, Any]]]:
    """The tests of every claim or prediction, each with the line that it starts on."""
    try:
        text = file.read_text(encoding="utf-8")
        node: Any = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
        return {
            key.value: list(zip(_lines(claim), tree[key.value].get("atoms", []), strict=True))
            for key, claim in node.value
        }
    except (OSError, yaml.YAMLError, LookupError, ValueError, AttributeError) as error:
        raise InputError(f"{file}: not a ledger that can be read; restore it from git") from error


def _lines(claim: Any) -> list[int]:
    atoms: list[Any] = next((value.value for name, value in claim.value if name.value == "atoms"), [])
    return [atom.start_mark.line + 1 for atom in atoms]
