"""Commands that measure a model: probe, lens, direction."""

from typing import Annotated

import typer

import classifier_emergence as library  # each of its names is imported on first use
from classifier_emergence.cli import options
from classifier_emergence.cli.options import check_outputs, labelled_prompts, texts_and_labels, write_outputs
from classifier_emergence.cli.terminal import bar, printable, say, spark, spread, table
from classifier_emergence.numbers import interval_text, number, percent

Penalty = Annotated[float, typer.Option("--C", min=1e-9, help="Inverse strength of the probe's L2 penalty.")]
Shuffles = Annotated[int, typer.Option("--shuffles", min=1, help="Label permutations behind the null.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command(
        epilog=options.example("""probe -m smollm2-135m-instruct \\
    --class "multiply:7 * 8 =|12 * 5 =|3 * 9 =|6 * 7 =" \\
    --class "add:23 + 45 =|17 + 38 =|11 + 22 =|5 + 9 =" --test "11 * 12 =\"""")
    )(probe)
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
    task: options.TaskName = None,
    test: Annotated[
        list[str] | None, typer.Option("--test", metavar="PROMPT", help="A new prompt to classify; may be repeated.")
    ] = None,
    C: Penalty = 1.0,
    shuffles: Shuffles = 40,
    seed: options.Seed = 0,
    adapter: options.AdapterFolder = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """Where does a linear probe tell classes apart?

    Held-out accuracy at every layer, and whether it can be told from that of permuted labels.
    """
    data = labelled_prompts(classes, file, task)
    prompts, labels = texts_and_labels(data)
    check_outputs(json, plot)
    groups = [item.group for item in data.items]
    lm = library.open_model(model, adapter=adapter, device=device, dtype=dtype)
    reading = library.probe(lm, prompts, labels, test=test or [], groups=groups, C=C, shuffles=shuffles, seed=seed)
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
    write_outputs(reading, json, plot)


def lens(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Prompts, read at their last tokens.")],
    model: options.Model,
    target: Annotated[
        list[str] | None, typer.Option("--target", metavar="WORD", help="A word to follow; may be repeated.")
    ] = None,
    layer: options.Layers = None,
    null_words: Annotated[
        int, typer.Option("--null-words", min=0, help="Other words of similar norm behind each p-value.")
    ] = 200,
    adapter: options.AdapterFolder = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """What does the vocabulary say at every layer?

    Probability and rank of words, and the top tokens.
    """
    check_outputs(json, plot)
    lm = library.open_model(model, adapter=adapter, device=device, dtype=dtype)
    reading = library.lens(lm, prompts, target or [], layers=layer, null_words=null_words)
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
                say(f"{printable(word)}: no p, the vocabulary has no {null_words} other words that are spelt like it")
    shown = range(len(reading.layers)) if layer else spread(len(reading.layers))
    table(
        ["prompt", *(reading.layers[i] for i in shown)],
        [
            [prompt, *(f"{reading.top_token[i][j].strip() or '␣'} {percent(reading.top_probability[i, j], 0)}"
                       for i in shown)]
            for j, prompt in enumerate(reading.prompts)
        ],
        title="top token and its probability",
    )  # fmt: skip
    write_outputs(reading, json, plot)


def direction(
    model: options.Model,
    classes: options.Classes = None,
    file: options.PromptFile = None,
    task: options.TaskName = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", metavar="LAYER", help="L16, 16 or emb; may be repeated. Default: at 55 % depth."),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Tokens to show for each class.")] = 10,
    C: Penalty = 1.0,
    shuffles: Shuffles = 40,
    seed: options.Seed = 0,
    adapter: options.AdapterFolder = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """Does a probe's direction point at a word?

    Cosines with every token of the vocabulary, against probes of permuted labels.
    """
    data = labelled_prompts(classes, file, task)
    prompts, labels = texts_and_labels(data)
    check_outputs(json, plot)
    words = [data.words[data.classes.index(label)] for label in dict.fromkeys(labels)]
    lm = library.open_model(model, adapter=adapter, device=device, dtype=dtype)
    reading = library.direction(
        lm, prompts, labels, words=words, layers=layer, top=top, C=C, shuffles=shuffles, seed=seed
    )
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
