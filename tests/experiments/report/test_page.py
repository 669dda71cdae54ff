"""The page: what it says is in the results, and in a browser it does what it should, alone."""

import csv
import html
import importlib.util
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from browser import answer, browse, complaints
from PIL import Image
from pypdf import PdfReader

from classifier_emergence.errors import InputError
from classifier_emergence.numbers import number
from classifier_emergence.results import lookup, read_result, write_result
from experiments.report.page import __main__ as stage
from experiments.report.page import tables

ROOT = Path(__file__).resolve().parents[3]
CLAIMS = read_result(ROOT / "results" / "claims.json")
WAIT = """
const until = met => new Promise(done => { const ask = () => met() ? done() : setTimeout(ask, 20); ask(); });
await until(() => document.documentElement.dataset.ready);
const $ = id => document.getElementById(id), all = (selector, root = document) => [...root.querySelectorAll(selector)];
const change = (node, value) => { node.value = value; node.dispatchEvent(new Event("change")); };
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's inputs of the stage, with a claim's verdict as a prediction beside them."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("params.yaml", "dvc.yaml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "paper").mkdir()
    for name in ("tables", "claims.yaml", "names.yaml", "made_by.yaml"):
        (folder / "paper" / name).symlink_to(ROOT / "paper" / name)
    shutil.copytree(ROOT / "results", folder / "results")
    text = (ROOT / "paper" / "claims.yaml").read_text(encoding="utf-8")
    (folder / "paper" / "predictions.yaml").write_text(text.replace("C09:", "P01:", 1), encoding="utf-8")
    write_result(folder / "results" / "predictions.json", {"P01": CLAIMS["C09"]})
    return folder


@pytest.fixture(scope="module")
def page(tree: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tree)
        return stage.build()


def opened(page: str, folder: Path, script: str, *options: str, name: str = "page.html") -> Any:
    """What a script says that runs in the page once it is drawn: an object that it makes of ``told``."""
    told = 'document.body.append(Object.assign(document.createElement("pre"), { id: "told", hidden: true, textContent: JSON.stringify(told) }));'  # noqa: E501
    (folder / name).write_text(with_script(page, f"{WAIT}{script}\n{told}"), encoding="utf-8")
    done = browse(folder / name, folder, "--dump-dom", *options)
    assert complaints(done) == []
    return answer(done)


def with_script(page: str, script: str) -> str:
    before, end, after = page.rpartition("</body>")
    return f'{before}<script type="module">{script}</script>{end}{after}'


def test_it_is_small_and_asks_for_nothing(page: str) -> None:
    assert len(page.encode()) < 5_000_000
    assert "default-src 'none'" in page
    assert not re.findall(r'<(?:script|link|img|iframe|source)[^>]+(?:src|href)="(?!data:)', page)


def test_every_number_of_a_verdict_stands_beside_its_file_and_key(page: str) -> None:
    text = html.unescape(re.sub(r"<[^>]+>", " ", page.partition("<script")[0]))
    for key, item in CLAIMS.items():
        assert item["claim"] in text
        part = page.partition(f'id="{key}"')[2].partition("</details>")[0]
        rows = re.findall(r"<tr.*?</tr>", part)[1:]
        assert len(rows) == len(item["evidence"])
        assert sum("primary" in row for row in rows) == sum(piece["primary"] for piece in item["evidence"])
        told = [html.unescape(row) for row in rows]
        for piece in item["evidence"]:
            where = piece["result"]
            held = lookup(read_result(ROOT / where["file"]), where["key"])
            assert any(
                f"<code>{where['file']}</code></a>: <code>{where['key']}</code>" in row
                and f"<code>{held}</code>" in row
                and f">{number(piece['value'], 3)}<" in row
                for row in told
            )


def test_what_is_drawn_is_in_the_results(page: str) -> None:
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)[0])
    drawn = {each["name"]: each["views"] for each in data["explorers"]}
    probes = read_result(ROOT / "results" / "probing" / "gemma-3-270m.json")["controlled"]["word"]["held_out_templates"]
    view = drawn["probes"]["Gemma-3-270M|arithmetic, word|controlled, held out templates"]
    assert view["lines"][0]["y"] == pytest.approx(probes["accuracy"], rel=1e-3)
    assert view["lines"][0]["l"] == pytest.approx([low for low, _ in probes["interval"]], rel=1e-3)
    for name, views in drawn.items():
        assert views, name
        for key, view in views.items():
            assert {len(line["y"]) for line in view["lines"]} == {len(view["ticks"])}, key
            assert 0 < len(view["lines"]) <= 8


def test_a_verdict_opens_to_its_evidence_and_the_list_is_chosen(page: str, tmp_path: Path) -> None:
    told = opened(page, tmp_path, """
        const told = {};
        const shown = () => all("#claims > .claim").filter(claim => claim.offsetParent).map(claim => claim.id);
        told.all = shown().length;
        all(".strip a").find(link => link.textContent.includes("C09")).click();
        await until(() => $("C09").open);
        told.evidence = all("tbody tr", $("C09")).length;
        told.visible = $("C09").querySelector("tbody tr").offsetHeight > 0;
        change($("of-verdict"), "supported");
        told.supported = shown();
        change($("of-verdict"), "");
        $("of-words").value = "granite cannot";
        $("of-words").dispatchEvent(new Event("input"));
        told.found = shown();
        told.listed = $("listed").textContent;
        $("of-words").value = "";
        $("of-words").dispatchEvent(new Event("input"));
        $("open-all").click();
        told.open = all("#claims > .claim[open]").length;
        told.prediction = all("#predictions .claim").map(claim => claim.id);
        told.requests = performance.getEntriesByType("resource").length;
    """)  # fmt: skip
    assert told["all"] == told["open"] == len(CLAIMS)
    assert told["evidence"] == len(CLAIMS["C09"]["evidence"])
    assert told["visible"]
    assert told["supported"] == [key for key, item in CLAIMS.items() if item["headline"] == "supported"]
    assert told["found"] == ["C03"]
    assert told["listed"] == f"1 of {len(CLAIMS)} claims"
    assert told["prediction"] == ["P01"]
    assert told["requests"] == 0


def test_every_choice_changes_the_figure_and_hover_and_keys_read_it(page: str, tmp_path: Path) -> None:
    told = opened(page, tmp_path, """
        const told = {};
        for (const root of all(".explorer")) {
          const drawn = () => root.querySelector(".plot").getAttribute("aria-label") + root.querySelector(".reading").textContent;
          const reading = () => root.querySelector("caption").textContent;
          const found = told[root.id] = { dead: [], empty: [] };
          for (const select of all("select", root)) {
            const before = new Set([drawn()]), options = [...select.options].map(option => option.value), first = select.value;
            for (const option of options) {
              change(select, option);
              before.add(drawn());
              if (!reading() || all("tbody tr", root).some(row => row.cells[1].textContent === "")) found.empty.push(option);
            }
            if (before.size < options.length) found.dead.push(select.dataset.choice);
            change(select, first);
          }
          const slider = root.querySelector("input");
          slider.value = 1;
          slider.dispatchEvent(new Event("input"));
          found.keyed = [reading(), slider.getAttribute("aria-valuetext")];
          const area = root.querySelector(".plot").firstElementChild.shadowRoot.querySelector(".bk-Canvas").shadowRoot.querySelector(".bk-events");
          const box = area.getBoundingClientRect();
          area.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width * .7, clientY: box.top + box.height / 2, bubbles: true, isPrimary: true, pointerType: "mouse" }));
          await new Promise(done => setTimeout(done, 50));
          found.hovered = reading();
        }
    """)  # noqa: E501  # fmt: skip
    assert {*told} == {f"figure-{each.name}" for each in stage.EXPLORERS}
    for name, found in told.items():
        assert found["dead"] == [], name
        assert found["empty"] == [], name
        assert found["keyed"][0] == f"At {found['keyed'][1]}", name
        assert found["hovered"] not in ("", found["keyed"][0]), name


def test_the_map_of_prompts_is_walked_with_keys_and_coloured_by_choice(page: str, tmp_path: Path) -> None:
    told = opened(page, tmp_path, """
        const told = {}, chosen = () => $("cell").textContent;
        const key = name => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
        const shades = () => all("#map td").map(cell => cell.style.getPropertyValue("--share")).join();
        told.tabs = all('#map td[tabindex="0"]').length;
        document.querySelector('#map td[tabindex="0"]').focus();
        told.start = chosen();
        key("ArrowRight"); key("ArrowUp");
        told.walked = chosen();
        told.focused = [document.activeElement.dataset.i, document.activeElement.dataset.j];
        const before = shades();
        change($("map-measure"), "strict");
        told.coloured = shades() !== before;
        told.rows = [...$("map-model").options].map(option => { change($("map-model"), option.value); return $("map").tBodies[0].rows.length; });
    """)  # noqa: E501  # fmt: skip
    lens = {model: read_result(ROOT / "results" / "logit_lens" / f"{model}.json") for model in MODELS}
    first = lens[MODELS[0]]
    read = first["layers"].index(first["reported"]["layer"])
    assert told["tabs"] == 1
    assert first["reported"]["prompts"][0]["prompt"] in told["start"]
    assert first["reported"]["prompts"][1]["prompt"] in told["walked"]
    assert told["focused"] == [str(read + 1), "1"]
    assert told["coloured"]
    assert told["rows"] == [len(result["layers"]) for result in lens.values()]


MODELS = list(stage.load_params(ROOT / "params.yaml").models)


def test_a_table_is_sorted_by_a_press_and_downloaded_as_the_papers_csv(page: str, tmp_path: Path) -> None:
    told = opened(page, tmp_path, """
        const told = { files: {}, sorted: {} };
        let text;
        window.Blob = class { constructor([written]) { text = written; } };
        URL.createObjectURL = () => "blob:none";
        URL.revokeObjectURL = () => {};
        HTMLAnchorElement.prototype.click = function () { told.last = this.download; };
        for (const button of all(".csv")) {
          button.click();
          told.files[told.last] = text;
        }
        for (const [name, column] of [["evidence", 4], ["lens_controlled", 3], ["claims", 0]]) {
          const table = document.querySelector(`table[data-name="${name}"]`);
          const header = table.tHead.rows[0].cells[column];
          const texts = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent);
          header.querySelector("button").click();
          const up = [texts(), header.getAttribute("aria-sort")];
          header.querySelector("button").click();
          told.sorted[name] = [...up, texts(), header.getAttribute("aria-sort")];
        }
        told.buttons = all("table.sortable th").every(cell => cell.querySelector("button"));
    """)  # fmt: skip
    shown = [file for file in (ROOT / "paper" / "tables").glob("*.csv") if file.read_text().count("\n") > 1]
    assert shown
    for file in shown:
        assert told["files"][file.name] == file.read_text(encoding="utf-8")
    for each in stage.EXPLORERS:
        (text,) = [text for name, text in told["files"].items() if name.startswith(f"figure_{each.name}_")]
        header, *rows = csv.reader(io.StringIO(text))
        assert header[0] == each.along
        assert rows
    assert told["buttons"]
    for name, (up, rising, down, falling) in told["sorted"].items():
        assert (rising, falling) == ("ascending", "descending")
        assert up != down, name
    values = [parsed(cell) for cell in told["sorted"]["lens_controlled"][0]]
    assert values == sorted(values)
    values = [parsed(cell) for cell in told["sorted"]["evidence"][2]]
    assert values == sorted(values, reverse=True)


def parsed(cell: str) -> float:
    mantissa, _, power = cell.replace("−", "-").replace(",", "").replace(" %", " × 10⁻²").partition(" × 10")
    return float(mantissa) * 10 ** int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)


def test_nothing_sticks_out_of_a_narrow_or_a_wide_window(page: str, tmp_path: Path) -> None:
    script = f"""{WAIT}
        for (const details of all("details")) details.open = true;
        await new Promise(done => setTimeout(done, 300));
        const out = all("main *, header *").filter(node => !node.closest(".scroll, svg") && node.offsetParent && node.getBoundingClientRect().right > innerWidth + 1);
        parent.postMessage([innerWidth, document.documentElement.scrollWidth, out.slice(0, 3).map(node => node.outerHTML.slice(0, 200))], "*");
    """  # noqa: E501
    (tmp_path / "page.html").write_text(with_script(page, script), encoding="utf-8")
    frames = "".join(
        f'<iframe src="page.html" style="width:{w}px;height:900px;border:0"></iframe>' for w in (360, 1440)
    )
    (tmp_path / "both.html").write_text(
        f'<pre id="told">[]</pre>{frames}<script>onmessage = ({{ data }}) => '
        "{ told.textContent = JSON.stringify([...JSON.parse(told.textContent), data]); };</script>"
    )
    done = browse(
        tmp_path / "both.html", tmp_path, "--window-size=1500,2000", "--dump-dom", "--virtual-time-budget=20000"
    )
    found = answer(done)
    assert sorted(width for width, _, _ in found) == [360, 1440]
    for width, wide, out in found:
        assert wide <= width, out
        assert out == []


def test_it_is_light_dark_and_either_by_choice(page: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    corners = []
    for scheme in (0, 1):  # dark, light
        shot = tmp_path / f"{scheme}.png"
        browse(
            tmp_path / "page.html", tmp_path, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}"
        )
        corners.append(Image.open(shot).convert("L").getpixel((2, 2)))
    assert corners[0] < 60
    assert corners[1] > 240
    told = opened(page, tmp_path, """
        const told = ["dark", "light"].map(theme => { change($("theme"), theme); return getComputedStyle(document.body).backgroundColor; });
    """)  # noqa: E501  # fmt: skip
    assert told[0] != told[1]


def test_it_prints_with_everything_open(page: str, tmp_path: Path) -> None:
    # Hundreds of sheets are alike: a claim and a table, and a few rows of each, stand for all.
    script = f"""{WAIT}
        for (const more of all("#claims > .claim:not(#C09), #predictions .claim, .table:not(#table-claims), tbody tr:nth-child(n + 9)")) more.remove();
    """  # noqa: E501
    (tmp_path / "page.html").write_text(with_script(page, script), encoding="utf-8")
    browse(tmp_path / "page.html", tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer")
    sheets = PdfReader(tmp_path / "page.pdf").pages
    assert len(sheets) < 30
    text = "".join("".join(sheet.extract_text() for sheet in sheets).split())
    assert "main.symbol.top.value" in text
    assert "Downloadwhatisdrawn" not in text


def test_everything_has_a_name_and_text_stands_out(page: str, tmp_path: Path) -> None:
    script = """
        for (const id of ["C09", "table-claims"]) $(id).open = true;
        const named = node => node.getAttribute("aria-label") || node.getAttribute("aria-labelledby") || node.labels?.length || node.textContent.trim();
        const told = {
          unnamed: all("button, select, input, a, summary, [role=img], [role=region], [role=grid], table").filter(node => !named(node)).map(node => node.outerHTML.slice(0, 200)),
          labels: all("[aria-labelledby]").filter(node => !$(node.getAttribute("aria-labelledby"))).length,
          twice: all("[id]").length - new Set(all("[id]").map(node => node.id)).size,
          levels: all("h1, h2, h3").map(node => Number(node.tagName[1])),
          violations: [],
        };
    """  # noqa: E501
    found = importlib.util.find_spec("axe_core_python")
    if found is not None and found.origin:  # in the extra dev
        library = (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")
        # axe looks at every cell: a few claims and tables, and a few rows of each, stand for all.
        script += f"""
            for (const more of all(".claim:nth-child(n + 11), .table:nth-of-type(n + 4)")) more.remove();
            for (const row of all("tbody tr:nth-child(n + 4)")) row.remove();
            {library};
            told.violations = (await axe.run()).violations.filter(each => ["serious", "critical"].includes(each.impact))
              .map(each => [each.id, each.nodes[0].html.slice(0, 200)]);
        """
    for scheme in (0, 1):
        told = opened(
            page, tmp_path, script, f"--blink-settings=preferredColorScheme={scheme}", "--virtual-time-budget=60000"
        )
        assert told["unnamed"] == []
        assert (told["labels"], told["twice"], told["violations"]) == (0, 0, [])
        assert told["levels"][0] == 1
        assert all(after - before <= 1 for before, after in zip(told["levels"], told["levels"][1:], strict=False))


def test_a_missing_table_names_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="dvc repro tables"):
        tables.shown()


def test_the_committed_page_and_guide_are_what_the_results_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert stage.build() == (ROOT / stage.PAGE).read_text(encoding="utf-8")
    assert stage.guide() == (ROOT / stage.GUIDE).read_text(encoding="utf-8")
