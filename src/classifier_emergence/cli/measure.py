"""Commands that measure a model: probe, predict, lens, direction."""

from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import classifier_emergence as library  # each of its names is imported on first use
from classifier_emergence.cli import options
from classifier_emergence.cli.options import (
    check_outputs,
    labelled_prompts,
    texts_and_labels,
    write_json,
    write_outputs,
)
from classifier_emergence.cli.terminal import bar, complain, printable, report_fed, say, shaded, spark, spread, table
from classifier_emergence.errors import InputError
from classifier_emergence.numbers import interval_text, number, percent

if TYPE_CHECKING:
    from classifier_emergence.instruments.base import Reading
    from classifier_emergence.instruments.lens import LensReading
    from classifier_emergence.instruments.lens_map import LensMap
    from classifier_emergence.reading.model import LanguageModel

Penalty = Annotated[float, typer.Option("--C", min=1e-9, help="Inverse strength of the probe's L2 penalty.")]
Compared = Annotated[
    str | None,
    typer.Option("--compare", metavar="WITH", help="An adapter or a model: read both, and show the difference."),
]
_TOGETHER = 64  # prompts of a file that pass at once
Shuffles = Annotated[int, typer.Option("--shuffles", min=1, help="Label permutations behind the null.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(
        epilog=options.example("""probe -m smollm2-135m-instruct \\
    --class "multiply:7 * 8 =|12 * 5 =|3 * 9 =|6 * 7 =" \\
    --class "add:23 + 45 =|17 + 38 =|11 + 22 =|5 + 9 =" --test "11 * 12 =\"""")
    )(probe)
    app.command(epilog=options.example('predict mine -m smollm2-135m-instruct "11 * 12 ="'))(predict)
    line = 'lens -m smollm2-135m-instruct "7 * 8 =" "12 + 5 =" --target multiply'
    app.command(epilog=options.example(line))(lens)
    app.command(
        epilog=options.example("""direction -m smollm2-135m-instruct --layer L16 --layer L20 \\
    --class "multiply:7 * 8 =|12 * 5 =|3 * 9 =" --class "add:23 + 45 =|17 + 38 =|11 + 22 =\"""")
    )(direction)


def probe(
    model: options.Model,
    classes: options.Classes = None,
    file: options.PromptFile = None,
    columns: options.Columns = None,
    task: options.TaskName = None,
    test: Annotated[
        list[str] | None, typer.Option("--test", metavar="PROMPT", help="A new prompt to classify; may be repeated.")
    ] = None,
    C: Penalty = 1.0,
    shuffles: Shuffles = 40,
    seed: options.Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FOLDER", help="Keep the best layer's probe in a new folder.")
    ] = None,
    position: options.Position = "last",
    chat: options.Chat = False,
    system: options.System = None,
    site: options.Site = "resid",
    tokens: options.ShowTokens = False,
    adapter: options.AdapterFolder = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    other: Compared = None,
    json: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """Where does a linear probe tell classes apart?

    Held-out accuracy at every layer, and whether it can be told from that of permuted labels.
    """
    data = labelled_prompts(classes, file, task, columns)
    prompts, labels = texts_and_labels(data)
    check_outputs(json, plot)
    groups = [item.group for item in data.items]
    lm = library.open_model(model, adapter=adapter, device=device, dtype=dtype)
    how: dict[str, Any] = {"test": test or [], "groups": groups, "C": C, "shuffles": shuffles, "seed": seed,
           "position": position, "chat": chat, "system": system, "site": site}  # fmt: skip
    write = None if other else (lambda reading: write_outputs(reading, json, plot))
    reading = library.probe(lm, prompts, labels, output=output, write=write, **how)
    report_fed(reading.fed, tokens)
    table(
        ["layer", "accuracy", "95 % interval", "permuted labels, 95 %", ""],
        [
            [row["layer"], percent(row["accuracy"]), interval_text([row["low"], row["high"]], 0),
             percent(row["null_95"]), bar(row["accuracy"])]
            for row in reading.rows()
        ],
        title=f"{printable(reading.model)}: linear probes, n = {reading.n}, {reading.folds} folds",
    )  # fmt: skip
    if reading.predictions:
        table(
            ["prompt", "class", "probability", "layers that agree"],
            [
                [p.prompt, p.label, percent(p.probability), f"{p.by_layer.count(p.label)} of {len(p.by_layer)}"]
                for p in reading.predictions
            ],
            title=f"new prompts, by the probe of {reading.peak.layer}, fitted on all {reading.n} examples",
        )
    peak = reading.peak
    say(
        f"best layer: {peak.layer}, {percent(peak.accuracy)} of {reading.n} {interval_text(peak.interval, 0)}; "
        f"the best layer of permuted labels reaches {percent(peak.null_95)} in one of 20 cases"
    )
    say(reading.verdict)
    if output is not None:
        say(f"probe of {peak.layer}: {printable(str(output))}")
    if other is not None:
        _compare(
            reading, library.probe(_other(model, adapter, other, device, dtype), prompts, labels, **how), json, plot
        )


def predict(
    probe: Annotated[Path, typer.Argument(metavar="PROBE", help="A folder that probe --output wrote.")],
    model: options.Model,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="New prompts.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="A file with a column of prompts.")
    ] = None,
    columns: options.Columns = None,
    tokens: options.ShowTokens = False,
    timed: Annotated[
        bool, typer.Option("--time", help="Time the probe as a hook in the model, as a router would use it.")
    ] = False,
    adapter: options.AdapterFolder = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
) -> None:
    """Classify new prompts by a kept probe.

    A line a prompt (prompt, class, probability) as soon as it is known.
    """
    from classifier_emergence.instruments.kept_probe import KeptProbe
    from classifier_emergence.tasks.files import load_prompts

    if bool(prompts) == bool(file):
        raise InputError("prompts: give them as arguments, or in a --file")
    check_outputs(json, None)
    kept = KeptProbe.load(probe)
    lm = library.open_model(model, adapter=adapter, device=device, dtype=dtype)
    if lm.key != kept.card.model:
        complain(f"notice: the probe was fitted on {kept.card.model}, this is {lm.key}")
    rows: list[dict[str, Any]] = []
    source = iter(prompts or load_prompts(file or Path(), options.renamed(columns or [])))
    while batch := list(islice(source, _TOGETHER)):
        report_fed(kept.feed(lm, batch), tokens, first=len(rows) + 1)
        for prompt, shares in zip(batch, kept.predict_proba(kept.states(lm, batch)), strict=True):
            best = int(shares.argmax())
            rows.append({"prompt": prompt, "label": kept.card.classes[best], "probability": float(shares[best])})
            say("\t".join((printable(prompt), printable(kept.card.classes[best]), percent(float(shares[best])))))
    cost = kept.cost(lm, rows[0]["prompt"]) if timed and rows else None
    if cost:
        say(
            f"as a hook behind {kept.card.layer}: {number(1000 * cost.routed)} ms a pass, "
            f"{number(1000 * cost.alone)} ms without it (medians of {cost.passes} passes, {cost.tokens} tokens)"
        )
    write_json(json, {"probe": asdict(kept.card), "predictions": rows, "cost": cost and asdict(cost)})


def lens(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Prompts.")],
    model: options.Model,
    target: Annotated[
        list[str] | None, typer.Option("--target", metavar="WORD", help="A word to follow; may be repeated.")
    ] = None,
    layer: options.Layers = None,
    null_words: Annotated[
        int, typer.Option("--null-words", min=0, help="Other words of similar norm behind each p-value.")
    ] = 200,
    pieces: Annotated[
        str, typer.Option("--pieces", metavar="HOW", help="A target of several tokens: refuse it, first or chain.")
    ] = "refuse",
    position: Annotated[
        str,
        typer.Option(
            "--position",
            "--positions",
            metavar="POSITION",
            help="Token to read: last, a number, after:TEXT; or all, a map of layers by tokens.",
        ),
    ] = "last",
    chat: options.Chat = False,
    system: options.System = None,
    generate: Annotated[
        int, typer.Option("--generate", min=0, metavar="N", help="Let the model write N tokens; a map of these.")
    ] = 0,
    color: Annotated[
        str | None,
        typer.Option("--color", metavar="WHAT", help="Of a map: probability (default), entropy or a target."),
    ] = None,
    site: options.Site = "resid",
    tokens: options.ShowTokens = False,
    adapter: options.AdapterFolder = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    other: Compared = None,
    json: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """What does the vocabulary say at every layer?

    Probability and rank of words, and the top tokens, at one token of each prompt or at all of them.
    """
    check_outputs(json, plot)
    mapped = position == "all" or generate > 0
    if other is not None and (generate or not (mapped or target)):
        raise InputError("--compare: of targets at one token, or of a map of a text that is given; name a --target")
    if mapped and len(prompts) > 1:
        raise InputError(f"prompts: {len(prompts)} given; a map is of one, so ask for one after the other")
    if mapped:
        from classifier_emergence.instruments.lens_map import check_colour

        check_colour(color or "probability", target or [])
        lm = library.open_model(model, adapter=adapter, device=device, dtype=dtype)
        read: dict[str, Any] = {"layers": layer, "chat": chat, "system": system, "pieces": pieces, "site": site,
                                "position": "all" if generate else position, "generate": generate}  # fmt: skip
        seen = library.lens_map(lm, prompts[0], target or [], **read)
        report_fed([seen.fed], tokens)
        _report_map(seen, color or "probability")
        if other is None:
            write_outputs(seen, json, plot, colour=color or "probability")
            return
        now = library.lens_map(_other(model, adapter, other, device, dtype), prompts[0], target or [], **read)
        _report_map(now, color or "probability")
        _compare_maps(seen, now, color or "probability", json, plot)
        return
    if color is not None:
        raise InputError("--color: is of a map; give --position all or --generate with it")
    how: dict[str, Any] = {"layers": layer, "null_words": null_words, "position": position, "chat": chat,
                           "system": system, "pieces": pieces, "site": site}  # fmt: skip
    lm = library.open_model(model, adapter=adapter, device=device, dtype=dtype)
    reading = library.lens(lm, prompts, target or [], **how)
    report_fed(reading.fed, tokens)
    _report_lens(reading, null_words, every=bool(layer))
    if other is None:
        write_outputs(reading, json, plot)
    else:
        after = library.lens(_other(model, adapter, other, device, dtype), prompts, target or [], **how)
        _compare(reading, after, json, plot)


def _other(model: str, adapter: list[Path] | None, other: str, device: str, dtype: str) -> "LanguageModel":
    """The model to compare with: another one, or this one with one adapter more."""
    from classifier_emergence.models.registry import local_path

    if (local_path(other) / "adapter_config.json").is_file():
        return library.open_model(model, adapter=[*(adapter or []), other], device=device, dtype=dtype)
    return library.open_model(other, device=device, dtype=dtype)


def _compare(before: "Reading", after: "Reading", json: Path | None, plot: Path | None) -> None:
    from classifier_emergence.instruments.comparison import Comparison, compare

    both = compare(before, after)
    assert isinstance(both, Comparison)
    table(
        ["what", "layer", "before", "after", "difference, points", "95 % interval"],
        [
            [row["what"], row["layer"], percent(row["before"], 2), percent(row["after"], 2),
             number(100 * float(row["difference"])), _points(row["low"], row["high"])]
            for row in both.rows()
        ],
        title=f"{printable(both.other)} compared with {printable(both.model)}, n = {both.n}",
    )  # fmt: skip
    if both.interval is None:
        say("no interval: one prompt says nothing about others; give more")
    write_outputs(both, json, plot)


def _compare_maps(before: "LensMap", after: "LensMap", colour: str, json: Path | None, plot: Path | None) -> None:
    from classifier_emergence.instruments.comparison import MapComparison, changes, compare

    both = compare(before, after)
    assert isinstance(both, MapComparison)
    change = both.difference(colour)
    digits = changes(change, colour)
    largest = max(float(abs(change).max()), 1e-12)
    shown = range(len(both.layers))[::-1]
    shaded(
        [before.tokens[i] for i in before.read],
        [both.layers[i] for i in shown],
        [digits[i] for i in shown],
        [[cell[0] for cell in after.top_tokens[i]] for i in shown],
        [(abs(change[i]) / largest).tolist() for i in shown],
        title=f"{printable(both.other)} less {printable(both.model)}: {printable(colour)}, "
        f"{'nats' if colour == 'entropy' else 'points'}; darker: changed more",
    )
    write_outputs(both, json, plot, colour=colour)


def _points(low: float | None, high: float | None) -> str:
    """An interval in percentage points; small ones keep a digit that is not zero."""
    return "n/a" if low is None or high is None else f"[{number(100 * low)}, {number(100 * high)}]"


def _report_lens(reading: "LensReading", null_words: int, *, every: bool) -> None:
    if reading.targets:
        table(
            ["target", "prompt", "largest probability", "at", "best rank", "p", "over layers, by decades"],
            [
                [word, prompt, percent(reading.peak_alignment[t, j], 3), reading.peak_layer[t][j],
                 number(int(reading.rank[t, :, j].min())), number(reading.p[t][j]),
                 spark(reading.alignment[t, :, j].tolist())]
                for t, word in enumerate(reading.targets) for j, prompt in enumerate(reading.prompts)
            ],
            title=f"{printable(reading.model)}: logit lens; p: share of matched other words that peak as high",
        )  # fmt: skip
        for word, n in zip(reading.targets, reading.null_words, strict=True):
            if n == 0 and null_words:
                why = (
                    "it is no single token"
                    if word.endswith((" (strict)", " (chain)"))
                    else (f"the vocabulary has no {null_words} other words that are spelt like it")
                )
                say(f"{printable(word)}: no p, {why}")
    if reading.followed_probability is not None:
        first = 1 if reading.layers[0] == "emb" and len(reading.layers) > 1 else 0
        table(
            ["token", "prompt", "largest probability", "at", "over layers, by decades"],
            [
                [token.strip() or "␣", prompt, percent(float(values[first:, j].max())),
                 reading.layers[first + int(values[first:, j].argmax())], spark(values[:, j].tolist())]
                for token, values in zip(reading.followed, reading.followed_probability, strict=True)
                for j, prompt in enumerate(reading.prompts)
            ],
            title=f"{printable(reading.model)}: logit lens, tokens that are the most probable ones anywhere",
        )  # fmt: skip
    shown = range(len(reading.layers)) if every else spread(len(reading.layers))
    table(
        ["prompt", *(reading.layers[i] for i in shown)],
        [
            [prompt, *(f"{reading.top_token[i][j].strip() or '␣'} {percent(reading.top_probability[i, j], 0)}"
                       for i in shown)]
            for j, prompt in enumerate(reading.prompts)
        ],
        title="top token and its probability",
    )  # fmt: skip


def _report_map(reading: "LensMap", colour: str) -> None:
    shades = reading.shade(colour)
    largest = max(float(shades.max()), 1e-12)
    shown = range(len(reading.layers))[::-1]  # the last layer on top
    shaded(
        [reading.tokens[i] for i in reading.read],
        [reading.layers[i] for i in shown],
        [[cell[0] for cell in reading.top_tokens[i]] for i in shown],
        [[number(v) if colour == "entropy" else percent(v) for v in shades[i].tolist()] for i in shown],
        [(shades[i] / largest).tolist() for i in shown],
        title=f"{printable(reading.model)}: top token at every layer and token; darker: more {printable(colour)}",
    )
    if reading.targets:
        peaks = [(target, *reading.peak(t)) for t, target in enumerate(reading.targets)]
        table(
            ["target", "largest probability", "at", "after token", "best rank"],
            [[target, percent(float(reading.alignment[t, i, j]), 3), reading.layers[i], reading.tokens[reading.read[j]],
              number(int(reading.rank[t].min()))] for t, (target, i, j) in enumerate(peaks)],
        )  # fmt: skip
    if reading.written and reading.targets:
        first = 1 if reading.layers[0] == "emb" and len(reading.layers) > 1 else 0
        best = reading.alignment[:, first:].argmax(1) + first  # (targets, steps): a layer
        table(
            ["step", "token", *reading.targets],
            [
                [str(k + 1), reading.tokens[position + 1],
                 *(f"{percent(float(values[i[k], k]), 3)} at {reading.layers[i[k]]}"
                   for values, i in zip(reading.alignment, best, strict=True))]
                for k, position in enumerate(reading.read)
            ],
            title="where each token was predicted: the largest probability over layers",
        )  # fmt: skip
    if reading.written:
        say(f"the model wrote: {printable(''.join(reading.tokens[len(reading.tokens) - reading.written :]))}")


def direction(
    model: options.Model,
    classes: options.Classes = None,
    file: options.PromptFile = None,
    columns: options.Columns = None,
    task: options.TaskName = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="LAYER", help="L16, 16 or emb; may be repeated. Default: at 55 % depth."),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Tokens to show for each class.")] = 10,
    C: Penalty = 1.0,
    shuffles: Shuffles = 40,
    seed: options.Seed = 0,
    position: options.Position = "last",
    chat: options.Chat = False,
    system: options.System = None,
    tokens: options.ShowTokens = False,
    adapter: options.AdapterFolder = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """Does a probe's direction point at a word?

    Cosines with every token of the vocabulary, against probes of permuted labels.
    """
    data = labelled_prompts(classes, file, task, columns)
    prompts, labels = texts_and_labels(data)
    check_outputs(json, plot)
    words = [data.words[data.classes.index(label)] for label in dict.fromkeys(labels)]
    lm = library.open_model(model, adapter=adapter, device=device, dtype=dtype)
    reading = library.direction(
        lm, prompts, labels, words=words, layers=layer, top=top, C=C, shuffles=shuffles, seed=seed,
        position=position, chat=chat, system=system,
    )  # fmt: skip
    report_fed(reading.fed, tokens)
    table(
        ["layer", "class", "word's cosine", "word's rank", "p", "top tokens", "largest cosine", "p"],
        [
            [item.layer, item.label, number(item.word_cosine, 3), number(item.word_rank), number(item.p_word),
             " ".join(token.strip() for token in item.top_tokens[:4]), number(item.top_cosines[0], 3),
             number(item.p_top)]
            for item in reading.directions
        ],
        title=f"{printable(reading.model)}: probe directions, n = {reading.n}, vocabulary {reading.vocabulary:,}",
    )  # fmt: skip
    say(f"p: share of directions from {reading.shuffles} permutations of the labels that do as well")
    write_outputs(reading, json, plot)
