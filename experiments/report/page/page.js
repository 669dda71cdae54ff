const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const make = (tag, text = "", set = {}) => Object.assign(document.createElement(tag), { textContent: text }, set);
const raised = n => String(n).replace("-", "⁻").replace(/\d/g, d => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]);
const unique = items => [...new Set(items)];
const colour = name => getComputedStyle(name).color;
function shown(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (x !== 0 && (Math.abs(x) < .001 || Math.abs(x) >= 1e6)) {
    const [mantissa, exponent] = x.toExponential(1).split("e");
    return `${mantissa} × 10${raised(Number(exponent))}`.replace(/^-/, "−");
  }
  return (Number.isInteger(x) && Math.abs(x) > 1 ? String(x) : x.toFixed(Math.abs(x) >= 100 ? 1 : 3)).replace("-", "−");
}

// --- Tables: sort, download ---

const guarded = cell => /^'*[=+@-]/.test(cell) && !/^[+-]?\d+(\.\d+)?$/.test(cell) ? "'" + cell : cell;
const quoted = cell => /[",\n\r]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
const csv = rows => rows.map(row => row.map(cell => quoted(guarded(cell))).join(",") + "\n").join("");
const written = table => csv(all("tr", table).map(row => [...row.cells].map(cell => cell.textContent)));
function download(name, text) {
  const link = make("a", "", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: `${name}.csv` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
// The number that a cell starts with, if it does: 81.2 %, −1,234.5, 3.2 × 10⁻⁷ (of a share, not of 100), <0.1 %, L12, [0.1, 0.2].
function numeric(cell) {
  const plain = cell.replaceAll("−", "-").replace(/(\d),(?=\d{3})/g, "$1");
  const found = /^[<>[L]?(-?\d+(?:\.\d+)?(?:e-?\d+)?)(?: × 10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+))?( %)?/.exec(plain);
  if (!found) return NaN;
  const power = (found[2] ?? "").replace("⁻", "-").replace(/[⁰¹²³⁴⁵⁶⁷⁸⁹]/g, d => "⁰¹²³⁴⁵⁶⁷⁸⁹".indexOf(d));
  return Number(found[1]) * 10 ** (Number(power || 0) - (found[3] ? 2 : 0));
}
const missing = text => ["", "–", "n/a"].includes(text);
function sort(table, column, down) {
  const body = table.tBodies[0], rows = [...body.rows];
  const texts = new Map(rows.map(row => [row, row.cells[column].textContent.trim()]));
  const there = rows.map(row => texts.get(row)).filter(text => !missing(text));
  const numbers = there.length && there.every(text => !Number.isNaN(numeric(text)));
  const order = numbers ? (a, b) => numeric(a) - numeric(b) : (a, b) => a.localeCompare(b, "en", { numeric: true });
  rows.sort((a, b) => {
    const [x, y] = [texts.get(a), texts.get(b)];
    // What is not there comes last, whichever way.
    return missing(x) || missing(y) ? missing(x) - missing(y) : (down ? -1 : 1) * order(x, y);
  });
  body.append(...rows);
  [...table.tHead.rows[0].cells].forEach((cell, i) => {
    if (i === column) cell.setAttribute("aria-sort", down ? "descending" : "ascending");
    else cell.removeAttribute("aria-sort");
  });
}
for (const table of all("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((cell, i) => {
    const button = make("button", cell.textContent, { type: "button" });
    button.onclick = () => sort(table, i, cell.getAttribute("aria-sort") === "ascending");
    cell.replaceChildren(button);
  });
  const tools = make("p", "", { className: "tools" });
  const button = make("button", "Download as CSV", { type: "button", className: "csv" });
  button.setAttribute("aria-label", `Download ${table.dataset.name} as CSV`);
  button.onclick = () => download(table.dataset.name, written(table));
  tools.append(button);
  table.closest(".scroll").before(tools);
}

// --- Verdicts: list, open ---

function list() {
  const verdict = $("of-verdict").value, words = $("of-words").value.toLowerCase();
  const claims = all("#claims > .claim");
  for (const claim of claims) {
    claim.hidden = (verdict && claim.dataset.verdict !== verdict) || !claim.textContent.toLowerCase().includes(words);
  }
  const n = claims.filter(claim => !claim.hidden).length;
  $("listed").textContent = n === claims.length ? `${n} claims` : `${n} of ${claims.length} claims`;
}
$("of-verdict").onchange = $("of-words").oninput = list;
$("filter").onsubmit = event => event.preventDefault();
$("open-all").onclick = () => {
  const claims = all("#claims > .claim:not([hidden])"), open = claims.some(claim => !claim.open);
  for (const claim of claims) claim.open = open;
  $("open-all").textContent = open ? "Close all" : "Open all";
};
function open() {
  const target = location.hash && $(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) {
    target.hidden = false;
    target.open = true;
    target.scrollIntoView();
  }
}
addEventListener("hashchange", open);
for (const link of all('a[href^="#"]')) link.addEventListener("click", () => setTimeout(open));
list();

// --- Figures ---

const nice = (low, high, n = 5) => {
  const raw = (high - low) / n || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(k => k * power >= raw) * power, ticks = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) ticks.push(Number(t.toPrecision(12)));
  return ticks;
};
const FLOOR = -12;
// Where a value is drawn, from where to where, and which ticks are named how.
function scale(view) {
  const values = view.lines.flatMap(line => [line.y, line.l ?? [], line.h ?? []].flat()).filter(v => v !== null);
  if (view.log) {
    const positive = values.filter(v => v > 0).map(Math.log10);
    const low = Math.max(FLOOR, Math.floor(Math.min(...positive, 0))), high = Math.max(Math.ceil(Math.max(...positive, -3)), low + 1);
    const step = Math.ceil((high - low) / 6), ticks = [];
    for (let k = high; k >= low; k -= step) ticks.push(k);
    return { put: v => v === null ? NaN : Math.max(low, v > 0 ? Math.log10(v) : low), from: low, to: high + .1, ticks, name: k => k === 0 ? "1" : "10" + raised(k) };
  }
  let [from, to] = [Math.min(...values, 0), Math.max(...values)];
  if (from === 0 && to <= 1 && to > .2) to = 1;
  const margin = (to - from || 1) * .04;
  return { put: v => v ?? NaN, from: from - (from < 0 ? margin : margin / 4), to: to + margin, ticks: nice(from, to), name: t => String(t).replace("-", "−") };
}
class Figure {
  constructor(explorer) {
    this.explorer = explorer;
    this.root = $(`figure-${explorer.name}`);
    this.keys = Object.keys(explorer.views).map(key => key.split("|"));
    this.selects = all("select", this.root);
    this.slider = this.root.querySelector("input[type=range]");
    this.selects.forEach((select, i) => { select.onchange = () => this.choose(i + 1); });
    this.slider.oninput = () => this.look(Number(this.slider.value));
    this.root.querySelector("form").onsubmit = event => event.preventDefault();
    this.root.querySelector(".csv").onclick = () => download(`figure_${explorer.name}_${this.key.join("_").replace(/[^\w.]+/g, "-")}`, this.written());
  }
  async embed() {
    await Bokeh.embed.embed_item(structuredClone(data.plot), this.root.querySelector(".plot"));
    this.doc = Bokeh.documents.at(-1);
    this.plot = this.doc.get_model_by_name("plot");
    this.source = this.doc.get_model_by_name("source");
    this.bands = this.plot.renderers.filter((_, i) => i % 2 === 0);
    this.curves = this.plot.renderers.filter((_, i) => i % 2 === 1);
    const inner = (node, name) => node.shadowRoot.querySelector(name);
    const area = inner(inner(this.root.querySelector(".plot").firstElementChild, ".bk-Canvas"), ".bk-events");
    area.style.touchAction = "pan-y";  // a finger on the figure still scrolls the page
    this.plot.on_event("mousemove", ({ x }) => this.near(x));
    this.plot.on_event("tap", ({ x }) => this.near(x));
    this.choose(0);
  }
  // The options of every choice from number `from` on are those that the choices before it leave; what can stay, stays.
  choose(from) {
    const chosen = this.selects.map(select => select.value);
    this.selects.forEach((select, i) => {
      if (i < from) return;
      const before = chosen.slice(0, i);
      const options = unique(this.keys.filter(key => before.every((part, k) => key[k] === part)).map(key => key[i]));
      select.replaceChildren(...options.map(option => make("option", option, { value: option })));
      chosen[i] = select.value = options.includes(chosen[i]) ? chosen[i] : options[0];
    });
    this.key = chosen;
    this.view = this.explorer.views[chosen.join("|")];
    this.draw();
  }
  draw() {
    const { view, plot } = this, { lines, ticks } = view, n = ticks.length;
    const at = this.at = view.at ?? ticks.map((_, i) => i), up = scale(view), columns = { x: at };
    const none = Array(n).fill(NaN);
    for (let i = 0; i < this.curves.length; i++) {
      const line = lines[i];
      columns[`y${i}`] = line ? line.y.map(up.put) : none;
      columns[`low${i}`] = line?.l ? line.l.map(up.put) : none;
      columns[`high${i}`] = line?.h ? line.h.map(up.put) : none;
      this.curves[i].visible = Boolean(line);
      this.bands[i].visible = Boolean(line?.l);
    }
    this.source.data = columns;
    const edge = (at.at(-1) - at[0]) * .015 || .5;
    plot.x_range.setv({ start: at[0] - edge, end: at.at(-1) + edge });
    plot.y_range.setv({ start: up.from, end: up.to });
    const step = Math.max(1, Math.ceil(n / 8)), named = at.filter((_, i) => i % step === 0);
    const across = this.doc.get_model_by_name("across"), side = this.doc.get_model_by_name("up");
    across.ticker.ticks = named;
    across.major_label_overrides = new Map(named.map(x => [x, ticks[at.indexOf(x)].replace("step ", "")]));
    across.axis_label = this.explorer.along;
    side.ticker.ticks = up.ticks;
    side.major_label_overrides = new Map(up.ticks.map(t => [t, up.name(t)]));
    side.axis_label = view.unit;
    const rows = lines.map((line, i) => {
      const row = make("tr"), name = make("th", "", { scope: "row" });
      const dash = { dashed: "6 3", dotted: "2 3", dotdash: "2 3 6 3", dashdot: "6 3 2 3" }[this.dash(i)] ?? "";
      name.innerHTML = `<svg class="swatch c${i}" viewBox="0 0 29 11" aria-hidden="true"><line x1="0" x2="29" y1="5.5" y2="5.5" stroke="currentColor" stroke-width="2.5" stroke-dasharray="${dash}"/></svg>`;
      name.append(line.name);
      row.append(name, make("td"), make("td"));
      return row;
    });
    this.root.querySelector("tbody").replaceChildren(...rows);
    const ends = lines.map(line => {
      const values = line.y.map(v => v ?? -Infinity), best = values.indexOf(Math.max(...values));
      return `${line.name}, largest ${shown(line.y[best])} at ${ticks[best]}`;
    });
    this.root.querySelector(".plot").setAttribute("aria-label", `${view.unit} by ${this.explorer.along}; ${this.key.join("; ")}. ${ends.join(". ")}.`);
    this.slider.max = n - 1;
    const lead = lines.at(view.lead).y.map(v => v ?? -Infinity);
    this.look(this.place !== undefined && this.place < n ? this.place : lead.indexOf(Math.max(...lead)));
    this.paint();
  }
  dash(i) { return ["solid", "dashed", "dotted", "dotdash", "dashdot", "solid", "dashed", "dotted"][i]; }
  near(x) {
    const distance = this.at.map(at => Math.abs(at - x));
    this.look(distance.indexOf(Math.min(...distance)));
  }
  look(place) {
    this.place = place;
    const { view } = this, where = view.ticks[place];
    this.doc.get_model_by_name("here").location = this.at[place];
    this.slider.value = place;
    this.slider.setAttribute("aria-valuetext", where);
    this.root.querySelector(".place span").textContent = `${this.explorer.along[0].toUpperCase()}${this.explorer.along.slice(1)}`;
    this.root.querySelector("caption").textContent = `At ${where}`;
    all("tbody tr", this.root).forEach((row, i) => {
      const line = view.lines[i];
      row.cells[1].textContent = shown(line.y[place]);
      row.cells[2].textContent = line.l ? `[${shown(line.l[place])}, ${shown(line.h[place])}]` : "";
    });
  }
  written() {
    const { lines, ticks } = this.view;
    const head = lines.flatMap(line => [line.name, ...(line.l ? [`${line.name}, low`, `${line.name}, high`] : [])]);
    const text = v => v === null ? "" : String(v);
    return csv([[this.explorer.along, ...head], ...ticks.map((tick, k) =>
      [tick, ...lines.flatMap(line => [text(line.y[k]), ...(line.l ? [text(line.l[k]), text(line.h[k])] : [])])])]);
  }
  paint() {
    const style = getComputedStyle(document.body), ink = style.color;
    const swatches = all(".swatch", this.root);
    swatches.forEach((swatch, i) => {
      this.curves[i].glyph.line_color = colour(swatch);
      this.bands[i].glyph.fill_color = colour(swatch);
    });
    this.doc.get_model_by_name("here").line_color = ink;
    for (const name of ["across", "up"]) {
      const axis = this.doc.get_model_by_name(name);
      for (const part of ["major_label_text", "axis_label_text", "axis_line", "major_tick_line"]) axis[`${part}_color`] = ink;
    }
    for (const name of ["grid across", "grid up"]) this.doc.get_model_by_name(name).setv({ grid_line_color: ink, grid_line_alpha: .15 });
  }
}
const figures = data.explorers.map(explorer => new Figure(explorer));
const paint = () => figures.forEach(figure => figure.doc && figure.paint());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
$("theme").onchange = () => { document.documentElement.style.colorScheme = $("theme").value; paint(); };
let opened = [];
addEventListener("beforeprint", () => {
  opened = all("details:not([open])");
  for (const each of opened) each.open = true;
  paint();
});
addEventListener("afterprint", () => { for (const each of opened) each.open = false; paint(); });

// --- The write-ups' prompts ---

const visible = token => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ +| +$/g, m => "␣".repeat(m.length))
  .replace(/(?! )[\p{Cc}\p{Cf}\p{Cn}\p{Z}]/gu, c => "\\u{" + c.codePointAt(0).toString(16) + "}");
const share = p => Math.max(0, 1 + Math.log10(Math.max(p, 1e-12)) / 12);
data.prompts.forEach((map, i) => $("map-model").append(make("option", map.model, { value: i })));
let at = null;
function lay() {
  const map = data.prompts[$("map-model").value], [head, body] = [$("map").tHead, $("map").tBodies[0]];
  const titles = make("tr");
  titles.append(make("th", "layer", { scope: "col" }), ...map.prompts.map(prompt => make("th", visible(prompt), { scope: "col" })));
  head.replaceChildren(titles);
  body.replaceChildren(...map.layers.map((layer, i) => {
    const row = make("tr", "", { className: layer === map.read ? "read" : "" });
    row.append(make("th", layer, { scope: "row" }));
    map.tokens[i].forEach((token, j) => {
      const cell = make("td", visible(token), { tabIndex: -1 });
      cell.setAttribute("role", "gridcell");
      Object.assign(cell.dataset, { i, j });
      row.append(cell);
    });
    return row;
  }).reverse());
  at = [Math.min(at?.[0] ?? map.layers.indexOf(map.read), map.layers.length - 1), Math.min(at?.[1] ?? 0, map.prompts.length - 1)];
  shade();
  pick(...at);
}
function shade() {
  const map = data.prompts[$("map-model").value], values = map[$("map-measure").value];
  for (const cell of all("td", $("map"))) {
    const dark = share(values[cell.dataset.i][cell.dataset.j]);
    cell.style.setProperty("--share", `${(60 * dark).toFixed(0)}%`);  // of more than 60 % text would not stand out
  }
}
function pick(i, j, focus = false) {
  const map = data.prompts[$("map-model").value];
  if (i < 0 || j < 0 || i >= map.layers.length || j >= map.prompts.length) return;
  for (const cell of all("td.picked", $("map"))) { cell.classList.remove("picked"); cell.tabIndex = -1; }
  const cell = $("map").querySelector(`td[data-i="${i}"][data-j="${j}"]`);
  at = [i, j];
  cell.classList.add("picked");
  cell.tabIndex = 0;
  if (focus) cell.focus();
  const facts = make("dl");
  for (const [name, value] of [
    ["Prompt", map.prompts[j]], ["Layer", map.layers[i] + (map.layers[i] === map.read ? ", the one that the write-ups read" : "")],
    ["Top token", `“${visible(map.tokens[i][j])}”`], ["Own word", map.operations[j]],
    ["All its forms", shown(map.alignment[i][j])], ["Bare, strict", shown(map.strict[i][j])],
  ]) facts.append(make("dt", name), make("dd", value));
  $("cell").replaceChildren(facts);
}
$("map-model").onchange = lay;
$("map-measure").onchange = shade;
$("map").onmouseover = $("map").onclick = ({ target }) => {
  const cell = target.closest("td");
  if (cell) pick(Number(cell.dataset.i), Number(cell.dataset.j));
};
$("map").onkeydown = event => {
  const map = data.prompts[$("map-model").value];
  const go = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (go) pick(at[0] + go[0], at[1] + go[1], true);
  else if (event.key === "Home") pick(at[0], 0, true);
  else if (event.key === "End") pick(at[0], map.prompts.length - 1, true);
  else return;
  event.preventDefault();
};
lay();
open();

for (const figure of figures) await figure.embed();
document.documentElement.dataset.ready = "yes";
