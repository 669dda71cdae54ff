"""The lens at every layer and token: it is the lens of texts that end there, and its page works in a browser."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import answer, browse, complaints
from PIL import Image

from classifier_emergence.errors import InputError
from classifier_emergence.instruments.comparison import compare
from classifier_emergence.instruments.direction import direction
from classifier_emergence.instruments.lens import lens
from classifier_emergence.instruments.lens_map import lens_map
from classifier_emergence.models.loading import load
from classifier_emergence.reading.model import LanguageModel

PROMPT = "7 * 8 = </script> $x_1$ \u202e שלום"


@pytest.fixture(scope="module")
def llama(tiny_models: Path) -> LanguageModel:
    return load(str(tiny_models / "tiny-llama"), {})


def test_a_map_is_the_lens_at_every_token(lm: LanguageModel) -> None:
    seen = lens_map(lm, "7 * 8 =", ["multiply", "add"])
    n = len(seen.read)
    assert seen.probability.shape == (len(lm.layers), n, 10)
    for k in range(n):
        one = lens(lm, ["7 * 8 ="], ["multiply", "add"], null_words=0, position=k)
        assert seen.alignment[..., k] == pytest.approx(one.alignment[..., 0], rel=1e-3)
        # Texts of other lengths round otherwise, by which two tokens that are nearly as probable may change places.
        assert np.abs(seen.rank[..., k] - one.rank[..., 0]).max() <= 1
        assert [row[k][0] for row in seen.top_tokens] == [row[0] for row in one.top_token]
    with torch.no_grad():
        log_p = lm.model(torch.tensor([lm.tokenizer("7 * 8 =")["input_ids"]])).logits[0].double().log_softmax(-1)
    assert seen.entropy[-1] == pytest.approx(-(log_p.exp() * log_p).sum(-1).numpy(), rel=1e-3)
    assert seen.probability[-1] == pytest.approx(log_p.exp().topk(10).values.numpy(), rel=1e-3)


def test_what_the_model_writes_is_read_where_it_was_predicted(lm: LanguageModel) -> None:
    seen = lens_map(lm, "7 * 8 =", ["add"], generate=3)
    assert seen.written == 3
    assert [seen.tokens[i + 1] for i in seen.read] == [cell[0] for cell in seen.top_tokens[-1]]
    assert seen.alignment.shape == (1, len(lm.layers), 3)
    with pytest.raises(InputError, match="position '1': not with generate"):
        lens_map(lm, "7 * 8 =", generate=3, position="1")


def test_a_text_where_a_list_is_meant_is_refused(llama: LanguageModel) -> None:
    with pytest.raises(InputError, match="targets: one text; pass a list"):
        lens_map(llama, "7 * 8 =", "multiply")
    with pytest.raises(InputError, match="targets: one text; pass a list"):
        lens(llama, ["7 * 8 ="], "multiply")
    with pytest.raises(InputError, match="layers: one text; pass a list"):
        lens(llama, ["7 * 8 ="], layers="L1")
    with pytest.raises(InputError, match="words: one text; pass a list"):
        direction(llama, ["7 * 8 ="] * 4, [0, 0, 1, 1], words="add")
    with pytest.raises(InputError, match="lens_map"):
        lens(llama, ["7 * 8 ="], position="all")


def test_a_long_map_is_drawn_in_panels(llama: LanguageModel, tmp_path: Path) -> None:
    seen = lens_map(llama, PROMPT * 3, ["add"])
    for colour in ("probability", "entropy", "add"):
        assert len(seen.plot(colour).axes) == -(-len(seen.read) // 16) + 1
    seen.save(tmp_path / "map.svg", colour="add")
    assert "<svg" in (tmp_path / "map.svg").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="color 'x': unknown"):
        seen.plot("x")


def test_readings_show_themselves_in_a_notebook(llama: LanguageModel) -> None:
    for reading in (lens_map(llama, PROMPT), lens(llama, [PROMPT], null_words=0)):
        html = reading._repr_html_()
        assert html is not None
        assert re.fullmatch(r'<iframe srcdoc="[^"]*" [^<]*></iframe>', html, re.DOTALL)


def test_without_targets_the_tokens_that_lead_anywhere_are_followed(lm: LanguageModel) -> None:
    reading = lens(lm, ["7 * 8 =", "What is 12 plus 5?"])
    assert set(reading.followed) == {token for row in reading.top_token[1:] for token in row}
    assert reading.followed_probability is not None
    assert reading.followed_probability.max(0)[1:] == pytest.approx(reading.top_probability[1:], rel=1e-4)
    peaks = reading.followed_probability[:, 1:].max((1, 2))
    assert sorted(peaks, reverse=True) == pytest.approx(peaks)


def test_a_word_of_several_pieces_is_its_chain_or_its_first_piece_by_choice(lm: LanguageModel) -> None:
    prompts = ["7 * 8 =", "What is 12 plus 5?"]
    reading = lens(lm, prompts, ["xylophone", "add"], null_words=3, pieces="chain")
    assert reading.targets == ("xylophone (chain)", "add")
    assert reading.null_words == (0, 3)
    forms = ["xylophone", " xylophone", "Xylophone", " Xylophone"]
    for j, prompt in enumerate(prompts):
        ids, total = lm.tokenizer(prompt)["input_ids"], 0.0
        for form in forms:
            pieces = lm.tokenizer.encode(form, add_special_tokens=False)
            with torch.no_grad():
                log_p = lm.model(torch.tensor([ids + pieces])).logits[0].double().log_softmax(-1)
            total += float(np.exp(sum(log_p[len(ids) - 1 + k, i].item() for k, i in enumerate(pieces))))
        assert reading.alignment[0, -1, j] == pytest.approx(total, rel=1e-3)
    seen = lens_map(lm, prompts[0], ["xylophone"], pieces="chain")
    assert seen.alignment[0, :, -1] == pytest.approx(reading.alignment[0, :, 0], rel=1e-3)
    assert seen.shade("xylophone") == pytest.approx(seen.alignment[0])
    strict = lens(lm, prompts, ["xylophone"], pieces="first")
    assert (strict.targets, strict.forms) == (("xylophone (strict)",), (("x",),))
    with pytest.raises(InputError, match="first piece or the chain"):
        lens(lm, prompts, ["xylophone"])


# --- The page, in a browser ---

DRIVER = """
<script type="module">
const wait = condition => new Promise(done => { const ask = () => condition() ? done() : setTimeout(ask, 20); ask(); });
await wait(() => document.documentElement.dataset.ready);
const $ = id => document.getElementById(id), told = { asked: [$("metric").value, $("target").value] };
const change = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); };
const key = name => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true }));
const shades = () => [...document.querySelectorAll("td")].map(cell => cell.style.background);
const chosen = () => $("where").textContent;
told.cells = document.querySelectorAll("td").length;
told.tabs = document.querySelectorAll("td[tabindex='0']").length;
told.best = $("best").children.length;
told.chart = Boolean($("curves").querySelector(".bk-Figure") ?? $("curves").children.length);
document.querySelector("td[tabindex='0']").focus();
told.start = chosen();
key("ArrowLeft"); key("ArrowDown");
told.walked = chosen();
told.focused = document.activeElement.getAttribute("aria-label");
key("Home");
told.home = chosen();
const cell = document.querySelectorAll("tbody tr")[1].querySelectorAll("td")[1];
cell.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
told.hovered = chosen();
const before = shades();
told.coloured = ["entropy", "probability", "rank"].map(metric => {
  change("metric", metric);
  return shades().join() !== before.join();
});
change("metric", "target");
const first = shades();
change("target", 0);
told.targets = shades().join() !== first.join();
change("from", 2);
told.fewer = document.querySelectorAll("tbody tr").length;
told.wide = document.documentElement.scrollWidth <= window.innerWidth;
const out = Object.assign(document.createElement("pre"), { id: "told", textContent: JSON.stringify(told) });
document.body.append(out);
</script>
"""


def test_the_page_works_in_a_browser(llama: LanguageModel, tmp_path: Path) -> None:
    seen = lens_map(llama, PROMPT, ["multiply", "add"])
    page = tmp_path / "map.html"
    page.write_text(seen.page(colour="add").replace("</body>", f"{DRIVER}</body>"), encoding="utf-8")
    done = browse(page, tmp_path, "--window-size=390,844", "--dump-dom")
    assert complaints(done) == []
    told = answer(done)
    n, tokens = len(seen.read), seen.tokens
    assert told["asked"] == ["target", "1"]
    assert (told["cells"], told["tabs"], told["best"], told["chart"]) == (5 * n, 1, 10, True)
    assert told["start"].startswith(f"L3 after token {n - 1}")
    assert told["walked"].startswith(f"L2 after token {n - 2}")
    assert told["focused"].startswith("L2 after ")
    assert told["home"] == f"L2 after token 0, “{tokens[0]}”"
    assert told["hovered"].startswith("L2 after token 1")
    assert told["coloured"] == [True] * 3
    assert (told["targets"], told["fewer"], told["wide"]) == (True, 3, True)


COMPARED = """
<script type="module">
const wait = condition => new Promise(done => { const ask = () => condition() ? done() : setTimeout(ask, 20); ask(); });
await wait(() => document.documentElement.dataset.ready);
const $ = id => document.getElementById(id), told = { shades: [], ends: [], facts: [] };
const change = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); };
change("metric", "target");
for (const which of [0, 1, "change"]) {
  change("which", which);
  told.shades.push([...document.querySelectorAll("td")].map(cell => cell.style.background));
  told.ends.push([$("low").textContent, $("high").textContent]);
}
told.facts = [...$("facts").querySelectorAll("dd")].map(fact => fact.textContent);
told.label = document.querySelector("td").getAttribute("aria-label");
told.hidden = $("which-label").hidden;
document.body.append(Object.assign(document.createElement("pre"), { id: "told", textContent: JSON.stringify(told) }));
</script>
"""


def test_the_page_of_two_models_shows_each_and_the_difference(llama: LanguageModel, tmp_path: Path) -> None:
    before = lens_map(llama, PROMPT, ["add"])
    after = replace(before, model="after", alignment=before.alignment / 2)
    page = tmp_path / "both.html"
    page.write_text(compare(before, after).page().replace("</body>", f"{COMPARED}</body>"), encoding="utf-8")
    done = browse(page, tmp_path, "--dump-dom")
    assert complaints(done) == []
    told = answer(done)
    one, other, change = told["shades"]
    assert all("--shade" in shade for shade in one + other)
    assert all("--fall" in shade for shade in change)
    assert one != other
    assert told["ends"][0] == told["ends"][1]  # one scale for both
    assert told["ends"][2][0].startswith("−")
    assert all(" → " in fact for fact in told["facts"][:3])
    assert told["label"].endswith("less than before")
    assert not told["hidden"]


def test_the_page_has_two_palettes(llama: LanguageModel, tmp_path: Path) -> None:
    page = tmp_path / "map.html"
    lens_map(llama, PROMPT).save(page)
    corners = []
    for scheme in (0, 1):  # dark, light
        shot = tmp_path / f"{scheme}.png"
        browse(page, tmp_path, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}")
        corners.append(Image.open(shot).convert("L").getpixel((2, 2)))
    assert corners[0] < 60
    assert corners[1] > 240


def test_the_page_asks_the_network_for_nothing(llama: LanguageModel) -> None:
    page = lens_map(llama, "7 * 8 =").page()
    assert len(page) < 2_000_000
    assert "default-src 'none'" in page
    assert not re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="', page)
