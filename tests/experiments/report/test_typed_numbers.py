from pathlib import Path

import pytest
from typed_numbers import lost_semicolons, prose_numbers

PAPER = Path(__file__).parents[3] / "paper"
SOURCES = sorted(path for path in PAPER.rglob("*.typ") if path.name != "lib.typ")


@pytest.mark.parametrize(
    "source",
    [
        "It reaches 0.81.",
        "It reaches 81 % here",
        "It reaches 81.2% here",
        "It reaches 81~% here",
        "81\\% here",
        "81 per cent",
        "a gap of −0.5 nats",
        "(0.25)",
        "p < 1e-9",
        "about 1,234.5 tokens",
        "*0.81*",
        "- 0.81 in a list",
        "$x = 0.5$",
        "#text(size: 9pt)[It reaches 0.81.]",
        "#figure(rect(), caption: [It reaches 0.81.])",
        '#image("f.svg", alt: "Peaks at 0.81.")',
        "#if true [0.81] else [none]",
        "#{ [0.81] }",
        '"#llama" scores 0.81',
        "`raw` 0.81",
        "#num(0.81)",
        "#pct( 0.81, digits: 1)",
        "#ci((0.57, 0.93))",
        "#let x = num(3)",
        "It is #num(x). Then 0.81",
        "#show: paper.with(abstract: [It reaches 0.81.])",
        "https://example.org/a 0.81",
    ],
)
def test_a_typed_number_is_found(tmp_path: Path, source: str) -> None:
    path = tmp_path / "x.typ"
    path.write_text(f"First line\n\n{source}\nlast line\n", encoding="utf-8")
    assert [line for line, _ in prose_numbers(path)] == [3]


@pytest.mark.parametrize(
    "source",
    [
        "Four operations, 26 claims, 262,144 tokens, layer L13, 7 of 8, 1/64.",
        "SmolLM2-135M, Gemma-3-270M, Qwen2.5-Coder-1.5B-Instruct",
        "Llama 3.2 1B, TinyLlama 1.1B, Granite~3.1~2B.",
        "see @wilson1927probable and @sec-probes <eq-one>",
        "prompt #raw(`0.81`) and ```0.81```",
        "// 0.81\n/* 81 % */",
        "#set par(leading: 0.62em)\n#set text(9.5pt)",
        "#v(1.5em) #h(0.5cm) #block(width: 80%)[x]",
        '#let x = 0.81\n#let y = (1.5, "a")',
        "#pct(get(r, \"a.0.accuracy\"), digits: 1) #num(1 / x) #pct(x)",
        "#if x > 0.05 [more] else [less]",
        "$sqrt(2 ln V / d)$",
        "version 1.2.3",
    ],
)  # fmt: skip
def test_what_is_no_typed_number_passes(tmp_path: Path, source: str) -> None:
    path = tmp_path / "x.typ"
    path.write_text(source + "\n", encoding="utf-8")
    assert prose_numbers(path) == []


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_number_in_the_paper_is_typed(source: Path) -> None:
    assert prose_numbers(source) == []


def test_the_check_reads_a_section_to_its_end(tmp_path: Path) -> None:
    text = (PAPER / "text" / "training.typ").read_text(encoding="utf-8")
    path = tmp_path / "training.typ"
    path.write_text(text + "\nIt reaches 0.81.\n", encoding="utf-8")
    assert [number for _, number in prose_numbers(path)] == ["0.81"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_semicolon_of_the_paper_is_taken_for_code(source: Path) -> None:
    assert lost_semicolons(source) == []


def test_a_semicolon_after_a_call_is_found(tmp_path: Path) -> None:
    source = tmp_path / "text.typ"
    source.write_text('From #raw("a")\\; it goes\n#num(x); and #if y [one; two]', encoding="utf-8")
    assert lost_semicolons(source) == [2]
