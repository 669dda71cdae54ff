"""Tables of the claims, and of the models as they are published: probes and the lens on arithmetic."""

from classifier_emergence.numbers import number, percent, small_share
from classifier_emergence.reading.layers import layer_row
from classifier_emergence.tasks.arithmetic import OPERATIONS, STYLES
from experiments.report.names import short_name
from experiments.report.tables.cells import NOTHING, at_layer, cells
from experiments.report.tables.table import FOLDER, Result, Results, Rows, table
from experiments.report.typeset import write_table

L0 = layer_row(0)


@table("claims", "Claim | Reported | Verdict | Models | Other tests | Reproduced", first="Id")
def claims(claim: Result) -> Rows:
    """The claims of the sources and our verdicts."""
    by_state: dict[str, list[str]] = {}
    for model, state in claim["primary"].items():
        by_state.setdefault(state, []).append(short_name(model))
    named = "; ".join(f"{state} in {' and '.join(models)}" for state, models in sorted(by_state.items()))
    headline = claim["headline"] + (f": {named}" if claim["headline"] == "mixed by model" else "")
    judged = len(claim["primary"]) if claim["headline"] != "untested" else NOTHING
    others = ", ".join(f"{count} {state}" for state, count in claim["others"].items()) or NOTHING
    yield [*cells(claim, "claim | reported"), headline, judged, others, claim["reproduced"]]


@table("predictions", "Prediction | Bears on | Verdict | Models | Other tests", first="Id")
def predictions(claim: Result) -> Rows:
    """What we predicted of runs before they were made, and what came of it."""
    _, _, headline, judged, others, _ = next(iter(claims.rows(claim)))
    yield [*cells(claim, "claim | source"), headline, judged, others]


@table("claims", "Primary test | Write-up | Bound | Why", first="Claim")
def criteria(claim: Result) -> Rows:
    """What decides a claim, and where its bound comes from; what claims need that are untested."""
    needs = f"; needs {claim['needs']}" if claim["needs"] else ""
    if claim["criterion"]:
        what, *shown = cells(claim["criterion"], "what | theirs | expected | why")
        yield [what + needs, *shown]
    else:
        yield [f"none yet{needs}", NOTHING, NOTHING, NOTHING]


@table("claims", "Protocol | Quantity | Model | Value | Interval | n | Claimed | State", first="Claim")
def evidence(claim: Result) -> Rows:
    """Every number behind the verdicts."""
    for item in claim["evidence"]:
        kind = "primary" if item["primary"] else item["protocol"]
        yield [kind, *cells(item, "what | model | value:3 | interval:3 | n | expected | state")]


@table("fetch", "Architecture | Layers | d | Vocabulary | Parameters | Licence | `Weights (sha256)`")
def models(facts: Result) -> Rows:
    """Models."""
    source = facts["source"]
    pin = {"wheel": "sha256", "hub": "revision"}.get(source["source"])
    parameters, weights = f"{facts['parameters'] / 1e6:,.0f} M", source[pin][:12] if pin else "local"
    yield [*cells(facts, "architecture | n_layers | d_model | vocabulary"), parameters, source["licence"], weights]


@table("fetch", "Operation | Single-token forms | Multi-piece forms | Strict target")
def words(facts: Result) -> Rows:
    """How the vocabularies spell the operation words."""
    for operation in OPERATIONS:
        word = facts["words"][operation]["word"][0]
        single = ", ".join(f"“{form}”" for form in word["forms"])
        pieces = "; ".join(f"{form.strip()} = {'+'.join(parts)}" for form, parts in word["multi_piece"].items())
        yield [operation, single, pieces or NOTHING, "whole word" if word["strict_is_whole"] else "first piece only"]


@table("probing", "Prompts | L0 | Lowest | Peak | Peak at | Chance peak, 95 % | p")
def probing_reported(result: Result) -> Rows:
    """Probes under the reported protocol, n = 16."""
    for name in ("symbol", "no_space", "word"):
        accuracy, peak = result["reported"][name]["accuracy"], result["reported"][name]["peak"]
        lowest = min(range(L0, len(accuracy)), key=accuracy.__getitem__)
        at_lowest = at_layer(result, accuracy, lowest, percent)
        chance = cells(peak, ":share | layer | shuffled_accuracy_95:percent | p:3")
        yield [name.replace("_", " "), percent(accuracy[L0]), at_lowest, *chance]


@table("probing", "Prompts | Peak | Peak at | Converged | Converged at | Difference | Largest excess | Excess at")
def probing_converged(result: Result) -> Rows:
    """The originals' probes beside converged ones, n = 16.

    The difference of accuracies is a mean over layers. The excess is by how much the objective lies above its minimum
    where a probe stops, as a fraction of the minimum.
    """
    for name in ("symbol", "word"):
        found = result["reported"][name]
        worst = max(range(L0, len(found["excess"])), key=found["excess"].__getitem__)
        shown = "peak:percent | peak.layer | optimum.peak:percent | optimum.peak.layer | early_minus_converged:share"
        yield [name, *cells(found, f"{shown} | excess.{worst}:small"), result["layers"][worst]]


@table(
    "probing", "Prompts | Held out | Clusters | L0 | Chosen layer | Shuffled | Bag of tokens | Difference | Minus lens"
)
def probing_controlled(result: Result) -> Rows:
    """Probes under the controlled protocol, n = {controlled.symbol.held_out_operands.n} in every cell.

    Intervals are over clusters, the operand pairs or frames that are held out; differences are paired by prompt.
    """
    shown = f"clusters | accuracy.{L0}:percent | selected:share | selected.shuffled_accuracy:percent"
    against = "bag_of_tokens:percent | minus_bag_of_tokens.selected:share | selected_minus_lens:share"
    for style in STYLES:
        for split in ("operands", "templates"):
            part = result["controlled"][style][f"held_out_{split}"]
            yield [style, split, *cells(part, f"{shown} | {against}")]


def held_out(probing: Results) -> None:
    """The eight held-out symbol prompts, a column for each model."""
    of_models = [result["reported"]["held_out"] for result in probing.values()]
    rows = [
        [
            *cells(of_models[0]["prompts"][i], "prompt | operation"),
            *(
                f"{found['prompts'][i]['predicted']} ({percent(found['prompts'][i]['probability'])}, "
                f"{percent(found['optimum']['prompts'][i]['probability'])})"
                for found in of_models
            ),
        ]
        for i in range(len(of_models[0]["prompts"]))
    ]
    caption = "Held-out symbol prompts, with the probability that the originals' probe and a converged one give."
    write_table(FOLDER / "held_out", ["Prompt", "Operation", *probing], rows, caption=caption, tokens=["Prompt"])


@table("probing", "Prompts | Forward pass | L0 | Last layer | Peak | Peak at")
def flaws(result: Result) -> Rows:
    """Flaw ablations under the reported protocol, n = 16."""
    shown = f"accuracy.{L0}:percent | accuracy.-1:percent | peak:share | peak.layer"
    for name in ("symbol", "word"):
        for flaw, curves in {"sound": result["reported"], **result["flaws"]}.items():
            yield [name, flaw.replace("_", " "), *cells(curves[name], shown)]


@table("logit_lens", f"Layer | `Prompt` | `Top token` | Top | {' | '.join(OPERATIONS)}")
def lens_reported(result: Result) -> Rows:
    """Logit lens under the reported protocol: top token and probability of the bare words' first tokens."""
    for entry in result["reported"]["prompts"]:
        words = (small_share(entry["probability"][operation]) for operation in OPERATIONS)
        yield [result["reported"]["layer"], *cells(entry, "prompt | top_token | top_probability:percent"), *words]


@table("logit_lens", "Slip | `Top tokens` | Commonest | Mean probability | Largest of an operation word")
def lens_flaws(result: Result) -> Rows:
    """The eight prompts at the originals' layer with each of the slips that Granite was run with, and with all."""
    for slip, found in result["reported"]["flaws"].items():
        shown = "modal_share:percent | top_probability:share | largest_word_probability:small"
        yield [slip.replace("_", " "), " ".join(dict.fromkeys(found["top_tokens"])), *cells(found, shown)]


@table("logit_lens", "Prompts | Layer | Alignment | Interval | Median rank | Null 95 % | p | Contrast p | Choice")
def lens_controlled(result: Result) -> Rows:
    """Alignment of the prompt's own operation word, against words matched in unembedding norm."""
    for style in STYLES:
        word = result["controlled"][style]["word"]
        fixed = result["layers"].index(result["reported"]["layer"])
        largest = max(range(L0, len(word["alignment"])), key=word["alignment"].__getitem__)
        for row, mark in ((fixed, ""), (largest, " (largest)")):
            shown = f"alignment.{row}:small | interval.{row}:small | rank.{row}:0 | null.alignment_95.{row}:small"
            against = f"null.p.{row}:3 | null.contrast_p.{row}:3 | choice.accuracy.{row}:percent"
            yield [style, result["layers"][row] + mark, *cells(word, f"{shown} | {against}")]


@table(
    "probing", f"Prompts | Direction | {' | '.join(OPERATIONS)} | Any layer, p | Largest cosine | Shuffled, 95 % | p"
)
def directions(result: Result) -> Rows:
    """Rank of each operation word in the vocabulary, seen from its class's direction (p against matched words).

    All at the originals' layer but for the smallest p of the four words' largest cosines at any layer. The largest
    cosine is that with any token, against the same direction made of shuffled labels.
    """
    found = result["directions"]
    row = result["layers"].index(found["reported"]["layer"])
    for style in STYLES:
        for kind in ("probe", "class_mean"):
            part = found[style][kind]
            ranks = [
                f"{number(rank)} ({number(p, 3)})" for rank, p in zip(part["rank"][row], part["p"][row], strict=True)
            ]
            shown = "over_layers.smallest_p:4 | largest.cosine:3 | largest.shuffled_cosine_95:3 | largest.p:3"
            yield [style, kind.replace("_", " "), *ranks, *cells(part, shown)]
