from pathlib import Path

import pytest

from classifier_emergence.errors import InputError
from experiments.report.tables.__main__ import run
from experiments.report.tables.cells import cells
from experiments.report.tables.table import Result, Rows, table

ROOT = Path(__file__).resolve().parents[3]


def test_the_committed_tables_are_what_the_results_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("params.yaml", "results"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    run()
    given, committed = (
        {path.name: path.read_text() for path in (folder / "paper" / "tables").iterdir()} for folder in (tmp_path, ROOT)
    )
    assert given == committed


def test_a_table_is_named_as_its_function_with_its_docstring_as_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @table("probing", "Layer | `Token`")
    def top_tokens(result: Result) -> Rows:
        """Top tokens of
        {part.n} prompts.
        """
        for layer, token in enumerate(result["tokens"]):
            yield [f"L{layer}", token]

    monkeypatch.chdir(tmp_path)
    first = {"part": {"n": 8}, "tokens": ["=a", "b|c"]}
    top_tokens.write({"small": first, "large": {"tokens": ["\n"]}})
    folder = tmp_path / "paper" / "tables"
    assert (folder / "top_tokens.csv").read_text() == "Model,Layer,Token\nsmall,L0,'=a\nsmall,L1,b|c\nlarge,L0,\\u{a}\n"
    assert (folder / "top_tokens.md").read_text().startswith("Table: Top tokens of 8 prompts.\n")
    assert r"\texttt{=a}" in (folder / "top_tokens.tex").read_text()


def test_cells_show_the_numbers_of_a_result_as_a_template_says() -> None:
    tally = {"accuracy": 0.8125, "interval": [0.57, 0.934], "n": 16}
    found = {"peak": tally, "p": [0.00001, 0.5], "seeds": 3, "met": False, "none": None}
    shown = cells(found, "peak:share | peak:percent | peak.interval:2 | p.-1:1 | p.0:small | seeds | met:yes | none:2")
    assert shown == ["81.2 % [57.0, 93.4]", "81.2 %", "[0.57, 0.93]", "0.5", "1.0 × 10⁻⁵", 3, "no", None]
    assert cells(tally, ":percent | n") == ["81.2 %", 16]
    with pytest.raises(InputError, match="'q'"):
        cells(found, "q:2")
