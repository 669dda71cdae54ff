import ast
import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from pypdf import PageObject, PdfReader

from classifier_emergence.errors import InputError
from classifier_emergence.numbers import percent
from classifier_emergence.trace import LEDGERS, made_by, read_makers
from experiments.report.build import build
from experiments.report.tables.__main__ import TABLES
from experiments.report.typeset import write_table
from experiments.shared.stage import STAGES

ROOT = Path(__file__).parents[3]
PAPER = ROOT / "paper"
ENDS = {"value", "by_seed", "least", "largest", "mean", "accuracy", "interval", "n", "std", "*"}
SOURCES = sorted(path for path in PAPER.rglob("*.typ") if path.name != "lib.typ")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository root with lib.typ, the names, the parameters and a ledger of one claim."""
    (tmp_path / "paper" / "figures").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    for name in ("lib.typ", "names.yaml"):
        shutil.copy(PAPER / name, tmp_path / "paper")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    ledger = {"C01": {"claim": "It rains.", "reported": "50-80 %", "headline": "supported", "reproduced": "yes"}}
    (tmp_path / "results" / "claims.json").write_text(json.dumps(ledger))
    (tmp_path / "results" / "predictions.json").write_text("{}")
    return tmp_path


def compiled(tree: Path, body: str) -> bytes:
    main = tree / "paper" / "main.typ"
    main.write_text(f'#import "/paper/lib.typ": *\n#set document(title: "t", date: none)\n{body}\n', encoding="utf-8")
    build(main, tree / "paper" / "paper.pdf", root=tree)
    return (tree / "paper" / "paper.pdf").read_bytes()


def text_of(pdf: Path) -> str:
    text = "\n".join(page.extract_text() for page in PdfReader(pdf).pages)
    return text.replace("\u00a0", " ")


def printed(tree: Path, body: str) -> str:
    compiled(tree, body)
    return text_of(tree / "paper" / "paper.pdf")


def printed_values(tree: Path, expressions: list[str]) -> list[str]:
    lines = printed(tree, "\n\n".join(f"#{expression}" for expression in expressions)).splitlines()
    return [line.strip() for line in lines]


def refusal(tree: Path, body: str) -> str:
    with pytest.raises(InputError) as error:
        compiled(tree, body)
    message = str(error.value)
    assert "\n" not in message
    assert str(tree) not in message
    return message


# --- Numbers ---

NUMBERS = {
    "num(0.5, digits: 3)": "0.500",
    "num(2)": "2.00",
    "num(-0.0001, digits: 2)": "0.00",
    "num(-0.126)": "−0.13",
    "num(2.675)": "2.68",  # a tie in the JSON file, to the even digit
    "num(0.125)": "0.12",
    "num(0.995)": "1.00",
    "num(9.9999)": "10.00",
    "num(262144, digits: 0)": "262,144",
    "num(-1234.5, digits: 1)": "−1,234.5",
    "num(999, digits: 0)": "999",
    "num(none)": "n/a",
    "pct(0.8125)": "81.2 %",
    "pct(0.4375)": "43.8 %",
    "pct(1)": "100.0 %",
    "pct(0)": "0.0 %",
    "pct(0.00001)": "<0.1 %",
    "pct(0.99999)": ">99.9 %",
    "pct(0.95, digits: 0)": "95 %",
    "pct(none)": "n/a",
    "ci((0.57, 0.93412))": "[57.0, 93.4]",
    "ci((-0.011, 1.5), digits: 2, scale: 1)": "[−0.01, 1.50]",
    "ci(none)": "n/a",
    "acc((accuracy: 0.8125, n: 16, interval: (0.57, 0.934)))": "81.2 % [57.0, 93.4], n = 16",
    "acc((value: 1, n: 1000, interval: (0.996, 1)))": "100.0 % [99.6, 100.0], n = 1,000",
    "acc((value: none, n: 0, interval: none))": "n/a",
    "acc(none)": "n/a",
    "sci(0.0000032)": "3.2 × 10⁻⁶",
    "sci(0.00000997)": "1.0 × 10⁻⁵",
    "sci(-0.000000000002)": "−2.0 × 10⁻¹²",
    "sci(12345)": "1.2 × 10⁴",
    "sci(0)": "0",
    "sci(none)": "n/a",
}


def test_numbers_are_printed_by_one_rule(tree: Path) -> None:
    assert printed_values(tree, list(NUMBERS)) == list(NUMBERS.values())


def test_prose_and_tables_round_alike(tree: Path) -> None:
    shares = [i / 16 for i in range(17)] + [i / 480 for i in range(0, 481, 7)] + [0.0005, 0.9995, 0.99949, 0.285]
    assert printed_values(tree, [f"pct({x!r})" for x in shares]) == [percent(x) for x in shares]


def test_parameters_and_claims_are_read(tree: Path) -> None:
    (tree / "params.yaml").write_text("a: {whole: 1200, share: 0.95, part: 0.015625, half: 0.5}\nb: [7, 8]\n")
    expressions = [
        'param("a.whole")',
        'param-pct("a.share")',
        'param-ratio("a.part")',
        'get(params, ("b", "1"))',
    ]
    assert printed_values(tree, expressions) == ["1,200", "95 %", "1/64", "8"]
    assert printed_values(tree, ['reported("C01")', 'headline("C01")', "claims.len()"]) == [
        "50-80 %",
        "supported",
        "1",
    ]
    assert "a.half is no whole number" in refusal(tree, '#param("a.half")')


def test_a_missing_value_names_itself_and_its_neighbours(tree: Path) -> None:
    assert "no a.c; there is: b" in refusal(tree, '#get((a: (b: 1)), "a.c")')
    assert "no a.b.c; what is above it has no parts" in refusal(tree, '#get((a: (b: 1)), "a.b.c")')
    assert "no a.2; there are 2 items" in refusal(tree, '#get((a: (0, 1)), "a.2")')
    assert "no C99; there is: C01" in refusal(tree, '#reported("C99")')


# --- Tables, figures, equations ---


def write_csv(tree: Path, columns: list[str], rows: list[list[str]]) -> None:
    write_table(tree / "paper" / "tables" / "t", columns, rows, caption="Unused")


def test_a_table_shows_every_cell_as_it_was_meant(tree: Path) -> None:
    cells = [
        "=1",
        "'=",
        "+",
        "-",
        "@x",
        "*bold*",
        "#num",
        "$x$",
        "_",
        "<a>",
        "ặn",
        "Ġthe",
        "−0.5",
        "3.2 × 10⁻⁷",
    ]
    write_csv(tree, ["cell"], [[cell] for cell in cells])
    assert printed(tree, '#data-table("t", [Caption.])').splitlines()[1:-1] == cells
    assert printed(tree, '#data-table("t", [Caption.], tokens: ("cell",))').splitlines()[1:-1] == cells


def test_a_table_has_a_caption_with_its_stage_and_can_be_referred_to(tree: Path) -> None:
    write_csv(tree, ["model", "n"], [["a", "1"]])
    text = printed(tree, 'See @tab-t.\n#data-table("t", [Caption.], stage: "probing", labels: ("n": "count"))')
    assert "See Table 1." in text
    assert "Table 1: Caption. (Stage probing.)" in text
    assert "model count" in text


def test_a_long_table_goes_over_pages_under_its_header(tree: Path) -> None:
    write_csv(tree, ["claim"], [[f"row {i}"] for i in range(200)])
    compiled(tree, '#data-table("t", [Caption.], long: true)')
    pages = [page.extract_text() for page in PdfReader(tree / "paper" / "paper.pdf").pages]
    assert len(pages) > 2
    assert all(re.search(r"^claim$", page, re.MULTILINE) for page in pages)


def test_a_renamed_column_is_refused(tree: Path) -> None:
    write_csv(tree, ["model", "token"], [["a", "b"]])
    message = refusal(tree, '#data-table("t", [Caption.], tokens: ("top token",))')
    assert "table t has no column top token; it has: model, token" in message


SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/" width="100" height="40">'
    "<metadata><dc:identifier>a/script.py</dc:identifier><dc:source>probing logit_lens</dc:source></metadata>"
    '<text x="5" y="20">{}</text></svg>'
)


def test_a_figure_leads_to_what_it_was_drawn_from(tree: Path) -> None:
    (tree / "paper/figures/f.svg").write_text(SVG.format("a"))
    body = '#data-figure("f", [Caption.], alt: "A letter.")\n#box[here]#label("drawn-f")\n\nSee @fig-f.'
    found = '#context for x in query(<drawn>) [#x.value.name|#x.value.stages.join("&")|#x.value.script]'
    text = printed(tree, f"{body}\n\n{found}")
    assert "See Figure 1." in text
    assert "Figure 1: Caption. (Drawn from probing and logit_lens.)" in text
    assert "f|probing&logit_lens|a/script.py" in text
    assert len(links(tree)) >= 2


def test_a_figure_that_does_not_say_what_it_was_drawn_from_is_refused(tree: Path) -> None:
    (tree / "paper/figures/f.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    message = refusal(tree, '#data-figure("f", [Caption.], alt: "A letter.")')
    assert "figure f: the file does not say its source; draw it with the stage figures" in message


def test_what_cannot_be_read_out_is_refused(tree: Path) -> None:
    (tree / "paper/figures/f.svg").write_text(SVG.format("a"))
    assert "figure f: say in alt" in refusal(tree, '#data-figure("f", [Caption.])')
    assert "missing alt text" in refusal(tree, "$x$")
    compiled(tree, '#eq("x", $x$) and #eq("x is one", $ x = 1 $) <eq-x>')


# --- Traces and verdicts ---


def write_result(tree: Path, stage: str, model: str, result: object) -> None:
    path = tree / "results" / stage / f"{model}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result))


def test_a_number_keeps_where_it_comes_from(tree: Path) -> None:
    write_result(tree, "probing", "m", {"a": {"accuracy": 0.5, "interval": [0.25, 0.75], "n": 8}, "b": [1, 2, 3]})
    expressions = {
        "pct(r.a.accuracy)": ("50.0 %", "a.accuracy"),
        "acc(r.a)": ("50.0 % [25.0, 75.0], n = 8", "a.accuracy"),
        "ci(r.a.interval)": ("[25.0, 75.0]", "a.interval"),
        "num(of(r.a.accuracy, x => 8 * x), digits: 0)": ("4", "a.accuracy"),
        "num(mean(r.b), digits: 0)": ("2", "b.*"),
        "num(bare(r.b).len(), digits: 0)": ("3", None),
    }
    lines = "\n\n".join(f"#{expression}" for expression in expressions)
    found = '#context for x in query(<number>) [#x.value.shown|#x.value.from.join("&")#parbreak()]'
    text = printed(tree, f'#let r = result("probing", "m")\n{lines}\n\n{found}')
    for shown, key in expressions.values():
        assert shown in text
        assert key is None or f"{shown}|results/probing/m.json#{key}" in text.replace("\n", "")


def test_a_number_leads_to_its_line_where_there_is_one(tree: Path) -> None:
    write_result(tree, "probing", "m", {"a": 0.5})
    number, line = '#pct(result("probing", "m").a)', '#box[here]#label("results/probing/m.json#a")'
    compiled(tree, number)
    assert not links(tree)
    compiled(tree, f"{number} {line}")
    assert len(links(tree)) == 1


def links(tree: Path) -> list[object]:
    pages = PdfReader(tree / "paper" / "paper.pdf").pages
    return [note for page in pages for note in page.get("/Annots", []) if note.get_object()["/Subtype"] == "/Link"]


def test_models_that_say_the_same_are_not_told_apart(tree: Path) -> None:
    write_result(tree, "probing", "m", {"a": 0.5, "b": 0.5})
    write_result(tree, "probing", "o", {"a": 0.5, "b": 0.25})
    of = 'listed(("m", "o"), x => pct(result("probing", x).{}))'
    assert printed_values(tree, [of.format("a"), of.format("b")]) == ["50.0 %", "50.0 % (m) and 25.0 % (o)"]


def test_a_sentence_about_a_claim_flips_with_its_verdict_or_stops_the_build(tree: Path) -> None:
    body = '#says("C01", supported: [It does.], contradicted: [It does not.])'
    assert "It does." in printed(tree, body)
    ledger = tree / "results" / "claims.json"
    ledger.write_text(ledger.read_text().replace("supported", "contradicted"))
    assert "It does not." in printed(tree, body)
    ledger.write_text(ledger.read_text().replace("contradicted", "mixed by model"))
    assert "C01 is now 'mixed by model'; say so here, there are words for: supported, contradicted" in refusal(
        tree, body
    )


def test_small_type_is_refused(tree: Path) -> None:
    write_csv(tree, ["a"], [["b"]])
    assert "table t: too small to read in print" in refusal(tree, '#data-table("t", [Caption.], size: 6.5pt)')


# --- Building ---


def test_two_builds_give_the_same_bytes(tree: Path) -> None:
    body = '#show: paper.with(title: [T], authors: ("A",))\n= One\n#pct(0.5)'
    assert compiled(tree, body) == compiled(tree, body)


@pytest.mark.parametrize(
    ("body", "missing", "stage"),
    [
        ('#result("probing", "m")', "results/probing/m.json", "dvc repro probing@m"),
        ('#json("/results/other.json")', "results/other.json", "dvc repro other"),
        ('#data-table("t", [])', "paper/tables/t.csv", "dvc repro tables"),
        ('#data-figure("f", [], alt: "a")', "paper/figures/f.svg", "dvc repro figures"),
    ],
)
def test_a_missing_input_names_the_stage_that_makes_it(tree: Path, body: str, missing: str, stage: str) -> None:
    message = refusal(tree, body)
    assert f"{missing} is missing" in message
    assert message.endswith(stage)


def test_an_error_names_file_and_line_and_leaves_the_old_paper(tree: Path) -> None:
    before = compiled(tree, "fine")
    assert refusal(tree, "\n#nonsense").startswith("paper/main.typ:4: unknown variable: nonsense")
    assert (tree / "paper" / "paper.pdf").read_bytes() == before
    assert [path.name for path in (tree / "paper").glob("*.tmp")] == []


def test_a_warning_is_an_error(tree: Path) -> None:
    assert "unknown font family" in refusal(tree, '#text(font: "Nonexistent")[x]')


def test_no_source_no_paper(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such Typst source"):
        build(tmp_path / "main.typ", tmp_path / "paper.pdf", root=tmp_path)


# --- Characters that no font has ---


# Typst prints an empty box for them without a warning; as PDF/UA-1 forbids that, it becomes an error.


@pytest.mark.parametrize(
    ("body", "character"),
    [
        ("你好 🙂", "你"),
        ("🙂", "🙂"),
        ("`가`", "가"),
        ('#eq("x", $bold("日")$)', "日"),
        ("plain _日_ plain", "日"),
        ("#rotate(9deg)[日]", "日"),
        ("#table([日])", "日"),
    ],
)
def test_a_character_that_no_font_has_is_an_error(tree: Path, body: str, character: str) -> None:
    message = refusal(tree, f"First page.\n#pagebreak()\nHere: {body}")
    assert message.startswith("paper/main.typ")
    assert f'the text `"{character}"` could not be displayed' in message
    assert message.endswith("write the character as its code point")


def test_a_character_that_no_font_has_is_an_error_in_figures_too(tree: Path) -> None:
    (tree / "paper/figures/f.svg").write_text(SVG.format("漢"), encoding="utf-8")
    assert "漢" in refusal(tree, '#data-figure("f", [Caption.], alt: "A letter.")')


def test_characters_that_the_fonts_have_are_printed(tree: Path) -> None:
    plain = "Ελληνικά, русский, ặn Rück šk → ↔ ≤ ≥ ≠ ≡ √ ∑ × − … “ ” ▁ Ġ ␣ ½ ¬"
    assert printed(tree, f'#raw("{plain}")\n\n{plain}').splitlines() == [plain, plain]


# --- The paper itself ---


def prose() -> str:
    return "\n".join(source.read_text(encoding="utf-8") for source in SOURCES)


OWN = r"#(?:data|model|small)-(figure|table)\(\s*\"([^\"]+)\""
"""A figure or table of lib.typ, and its name."""


def test_the_bibliography_is_what_is_cited() -> None:
    labels = r"(?!(?:tab|fig|sec|eq|lst)-)"
    cited = set(re.findall(rf"(?<!\w)@{labels}([a-z][\w-]*)", prose()))
    listed = re.findall(r"^@\w+\{([^,]+),", (PAPER / "refs.bib").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited == set(listed)
    assert len(listed) == len(set(listed))


def test_every_figure_is_shown_and_every_shown_figure_is_there() -> None:
    shown = re.findall(r'\bdata-figure\(\s*"([^"]+)"', prose())
    assert sorted(shown) == sorted(path.stem for path in (PAPER / "figures").glob("*.svg"))


def test_every_shown_table_is_there_and_names_the_stage_that_it_shows() -> None:
    shown = dict(re.findall(r'#data-table\(\s*"([^"]+)",\s*(?:stage: "(\w+)",)?', prose()))
    made = {table.rows.__name__: table.stage for table in TABLES} | {"held_out": "probing"}
    assert {**shown} == {name: made[name] if made[name] in STAGES else "" for name in shown}
    assert shown.keys() <= {path.stem for path in (PAPER / "tables").glob("*.csv")}


def test_every_figure_and_table_is_referred_to() -> None:
    kinds = {"figure": "fig", "table": "tab"}
    shown = {f"{kinds[kind]}-{name}" for kind, name in re.findall(OWN, prose())}
    assert shown <= set(re.findall(r"@((?:fig|tab)-[\w-]+)", prose()))


@pytest.fixture(scope="module")
def paper() -> PdfReader:
    return PdfReader(PAPER / "paper.pdf")


class Sheet(NamedTuple):
    text: str
    small: list[str]
    """What is smaller than seven points and no formula."""


@pytest.fixture(scope="module")
def sheets(paper: PdfReader) -> list[Sheet]:
    """What stands on every page."""

    def read(page: PageObject) -> Sheet:
        small: list[str] = []

        def look(text: str, _: object, tm: list[float], font: dict[str, str] | None, size: float) -> None:
            if text.strip() and font and "Math" not in font.get("/BaseFont", "") and abs(tm[3]) * size < 6.99:
                small.append(text)

        return Sheet(page.extract_text(visitor_text=look), small)

    return [read(page) for page in paper.pages]


def test_the_committed_paper_is_what_the_sources_give(tmp_path: Path) -> None:
    build(PAPER / "main.typ", tmp_path / "paper.pdf", root=ROOT)
    assert (tmp_path / "paper.pdf").read_bytes() == (PAPER / "paper.pdf").read_bytes()


def test_the_committed_paper_says_who_and_what_but_not_when(paper: PdfReader) -> None:
    about = paper.metadata
    assert about is not None
    assert about.title == "[Re] Does training make a vocabulary-aligned classifier emerge?"
    assert about.author == "The classifier-emergence authors"
    assert about.creation_date is None
    assert paper.trailer["/Root"]["/Lang"] == "en-GB"


def test_the_abstract_is_short_and_page_one_has_every_claim_that_is_named(sheets: list[Sheet]) -> None:
    text = " ".join(sheets[0].text.split())
    abstract = text.partition("Abstract.")[2].partition("Figure 1")[0]
    claims = json.loads((ROOT / "results" / "claims.json").read_text(encoding="utf-8"))
    assert f"their {len(claims)} claims" in text
    assert len(abstract.split()) <= 180
    assert all(re.search(rf"\b{claim}\b", text) for claim in claims)


def test_the_body_has_at_most_sixteen_pages(paper: PdfReader) -> None:
    chapters = {str(entry.title): entry for entry in paper.outline if not isinstance(entry, list)}
    page = paper.get_destination_page_number(chapters["References"])
    assert page is not None
    assert page <= 16  # counted from 0: it begins on the seventeenth at the latest


def test_every_number_of_a_result_leads_to_its_line(paper: PdfReader) -> None:
    names = {str(name) for name in paper.named_destinations} if paper.named_destinations else set()
    targets = [note.get_object() for page in paper.pages for note in page.get("/Annots", [])]
    inner = [note for note in targets if "/Dest" in note or note.get("/A", {}).get("/S") == "/GoTo"]
    assert len(inner) > 500
    ends = [note["/Dest"] if "/Dest" in note else note["/A"]["/D"] for note in inner]
    assert all(isinstance(end, list) or str(end) in names for end in ends)


def test_every_number_leads_to_the_function_that_names_it(sheets: list[Sheet]) -> None:
    makers = read_makers(ROOT)
    judged = [json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8")) for name in LEDGERS]
    asked = [piece["result"] for items in judged for item in items.values() for piece in item["evidence"]]
    led = {(made_by(makers, Path(place["file"]).parent.name, place["key"]), place["key"]) for place in asked}
    indexed = by_function(sheets)
    assert len(indexed) > 400
    loose = 0
    for where, key in {*indexed, *led}:
        source = function_source(*where.split(": "))
        # The ends are those of every number. What a loop names (an arm, a style) has its quantity one step up.
        named = [step for step in key.split(".") if step not in ENDS and not step.isdigit()][-2:]
        names = {part for step in named for part in (step, step.split("_")[-1])}
        words = {*re.findall(r"[A-Za-z0-9]+", source), *re.findall(r"\w+", source)}
        assert not names or words & names, f"{key} is not in {where}"
        loose += bool(named) and named[-1] not in words
    assert loose < 0.1 * len(indexed)


def by_function(sheets: list[Sheet]) -> list[tuple[str, str]]:
    """Function and key of every line of the index, whose groups say their file and function at least every eight lines.

    Lines break after a dot, an underscore or a slash.
    """
    text = "\n".join(sheet.text for sheet in sheets[-15:]).partition("Index of numbers\nMeasured")[2]
    text = re.sub(r"\.py:\s+", ".py: ", re.sub(r"(?<=[._/])\n", "", text.partition("What every figure")[0]))
    found, where, since = [], "", 0
    for line in text.splitlines():
        if head := re.fullmatch(r"(?:(\w+/\S+)\.json )?((?:src|experiments)/\S+\.py: \S+)", line):
            where, since = head[2], 0
        elif where and (key := re.match(r"([a-z][\w*]*(\.[\w*]+)*): ", line)):
            found.append((where, key[1]))
            since += 1
            assert since <= 8, f"{key[1]} is far from the name of its function"
    return found


@cache
def module_of(file: str) -> tuple[str, ast.AST]:
    text = (ROOT / file).read_text(encoding="utf-8")
    return text, ast.parse(text)


@cache
def function_source(file: str, name: str) -> str:
    text, node = module_of(file)
    for step in name.split("."):
        node = next(part for part in ast.iter_child_nodes(node) if getattr(part, "name", None) == step)
    return ast.get_source_segment(text, node) or ""


def test_no_type_is_smaller_than_seven_points_but_in_formulas(sheets: list[Sheet]) -> None:
    assert [text for sheet in sheets for text in sheet.small] == []
