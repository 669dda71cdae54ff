"""Tables of the lenses beside the logit lens: on untrained models with controls, and on trained ones."""

from classifier_emergence.numbers import number, percent
from classifier_emergence.tasks.arithmetic import STYLES
from experiments.report.names import NAMES, lenses_of
from experiments.report.tables.cells import NOTHING, cells, distinct
from experiments.report.tables.table import Result, Rows, table


@table("lenses", "Prompts | Lens | Choice | Chosen layers | p | Minus logit lens | Largest alignment | KL at 55 %")
def lenses_untrained(result: Result) -> Rows:
    """Lenses on untrained models, n = {untrained.logit.symbol.selected.n}: choice at the layer best on other frames."""
    row = result["layers"].index(result["trained"]["dual_reward"]["layer"])
    for style in STYLES:
        for lens, name in lenses_of(result["untrained"]).items():
            found = result["untrained"][lens][style]
            p = max(fit["choice"]["p_over_layers"] for fit in found["fits"])
            layers = distinct(layer for fit in found["fits"] for layer in fit["selected"]["layers"])
            gain = NOTHING if lens == "logit" else " ".join(cells(found, "minus_logit:2 | minus_logit.interval:2"))
            kl = max(fit["mean"][row] for fit in result["divergence"][lens])
            choice, peak = cells(found, "selected:share | peak:small")
            yield [style, name, choice, layers, number(p, 3), gain, peak, number(kl, 2)]
        controls = {**result["controls"]["permuted"], **result["controls"]["random_weights"]}
        for kind, read in ((kind, read) for kind, read in controls.items() if style in read):
            choice, peak = cells(read[style], "selected:share | peak:small")
            yield [style, NAMES["lens_controls"][kind], choice, *[NOTHING] * 3, peak, NOTHING]


@table("lenses", "Trained by | Lens | Prompts | Before | Choice | Alignment | Largest alignment")
def lenses_trained(result: Result) -> Rows:
    """A trained word under every lens, at the classifier layer, on held-out problems over seeds."""
    for stage, name in NAMES["lens_stages"].items():
        found = result["trained"][stage]
        for lens, name_of_lens in lenses_of(found["after"]).items():
            for style in STYLES:
                read = found["after"][lens]
                was = cells(found["before"][lens][style], "choice:percent") if lens in found["before"] else [NOTHING]
                shown = cells(read[style], "choice:share | alignment:percent | inner_peak:percent")
                yield [name, name_of_lens, style, *was, *shown]


@table(
    "trained_words",
    "Trained by | Lens | Trained layer | Trained layer, minus logit lens | Best layer | Best layer, minus logit lens | "
    "Best layer, before",
)
def trained_words(result: Result) -> Rows:
    """Choice among the operation words by the words' own directions, on held-out problems over seeds."""
    for way, name in NAMES["trained_words"].items():
        found = result["ways"][way]
        for lens, name_of_lens in lenses_of(found["after"]).items():
            read = found["after"][lens]
            shown = []
            for place in ("at_classifier", "selected"):
                less = " ".join(cells(read["minus_logit"][place], ":2 | interval:2")) if lens != "logit" else NOTHING
                shown += [*cells(read, f"{place}:share"), less]
            was = cells(found["before"][lens], "selected:percent") if lens in found["before"] else [NOTHING]
            yield [name, name_of_lens, *shown, *was]


@table(
    "word_lenses", "Prompts | Logit lens | Jacobian lens | Chosen layers | Minus logit lens | Matched words, largest"
)
def word_lenses(result: Result) -> Rows:
    """Choice among the four operation words by the words' own directions, at the layer best on other frames."""
    for style in STYLES:
        logit, jacobian = (result["styles"][style][lens] for lens in ("logit", "jacobian"))
        layers = distinct(layer for fit in jacobian["fits"] for layer in fit["selected"]["layers"])
        gain = " ".join(cells(jacobian, "minus_logit:2 | minus_logit.interval:2"))
        largest = max(max(fit["null_largest"]) for fit in jacobian["fits"])
        yield [
            style,
            *cells(logit, "selected:share"),
            *cells(jacobian, "selected:share"),
            layers,
            gain,
            percent(largest),
        ]
