"""Commands on mixtures of experts: their routers without the model, and routing in use."""

from pathlib import Path
from typing import Annotated

import typer

import classifier_emergence as library  # each of its names is imported on first use
from classifier_emergence.cli import options
from classifier_emergence.cli.options import check_outputs, labelled_prompts, texts_and_labels, write_outputs
from classifier_emergence.cli.terminal import notify, printable, say, shortened, spread, table
from classifier_emergence.errors import InputError
from classifier_emergence.numbers import number, percent, share_text

routers = typer.Typer(help="Routers of mixture-of-experts models.")

Texts = Annotated[list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts, if they come from no option.")]


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    app.add_typer(routers, name="routers", no_args_is_help=True)


@routers.command("project", epilog=options.example("routers project -m ./olmoe --json routers.json"))
def project(
    model: Annotated[
        str, typer.Option("-m", "--model", metavar="MODEL", help="Registry key, hub id or folder of safetensors.")
    ],
    word: Annotated[
        list[str] | None, typer.Option("--word", metavar="WORD", help="A word whose rank is wanted; may be repeated.")
    ] = None,
    gains: Annotated[
        bool, typer.Option("--gains/--no-gains", help="Fold the gains of both norms into the directions.")
    ] = False,
    top: Annotated[int, typer.Option("--top", min=1, help="Tokens to keep for each expert.")] = 10,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random rows behind the null.")] = 0,
    json: options.JsonFile = None,
) -> None:
    """Do router rows point at words?

    Cosines of every expert's row with every token, without loading the model, beside random rows.
    """
    check_outputs(json, None)
    from classifier_emergence.mixtures.words import project_checkpoint
    from classifier_emergence.models.names import resolve

    reading = project_checkpoint(*resolve(model), words=word or [], gains=gains, top=top, seed=seed)
    best = sorted(reading["experts"], key=lambda item: -item["top_scores"][0])[:20]
    table(
        ["layer", "expert", "largest cosine", "top tokens"],
        [
            [str(item["layer"]), str(item["expert"]), number(item["top_scores"][0], 3),
             " ".join(token.strip() for token in item["top_tokens"][:4])]
            for item in best
        ],
        title=f"{printable(model)}: the {len(best)} experts whose rows come closest to a token",
    )  # fmt: skip
    if reading["words"]:
        table(
            ["word", "best rank of an expert", "random rows"],
            [
                [item["word"], f"{item['best_rank']:,} (L{item['layer']}, expert {item['expert']})",
                 f"{item['null_best_rank']:,}"]
                for item in reading["words"]
            ],
        )  # fmt: skip
    say(
        f"largest cosine of {len(reading['experts'])} experts: {number(reading['largest'], 3)}; of as many random "
        f"rows {number(reading['null']['largest'], 3)}"
    )
    say(f"{reading['bytes_read'] / 1e6:,.1f} MB read of {reading['total_bytes'] / 1e6:,.1f} MB of weights")
    options.write_json(json, reading)


@routers.command("trace", epilog=options.example('routers trace -m olmoe-1b-7b "7 * 8 = 56" --layer L0 --layer L8'))
def trace(
    model: options.Model,
    texts: Texts = None,
    file: options.PromptFile = None,
    columns: options.Columns = None,
    layer: options.Layers = None,
    chat: options.Chat = False,
    system: options.System = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """Which experts does each token go to?

    The chosen experts at each layer with a router, with the weights of their outputs.
    """
    if file and not texts:
        from classifier_emergence.tasks.files import load_prompts

        chosen = list(load_prompts(file, options.renamed(columns or [])))
    else:
        chosen, _ = _texts(texts, None, file, columns, None)
    check_outputs(json, plot)
    lm = library.open_model(model, device=device, dtype=dtype)
    reading = library.trace_texts(lm, chosen, layers=layer, chat=chat, system=system)
    notify(reading.notices)
    shown = range(len(reading.layers)) if layer else spread(len(reading.layers))
    for item in reading.texts:
        table(
            ["token", *(reading.layers[i] for i in shown)],
            [
                [token.strip() or "␣",
                 *(", ".join(f"{e} ({number(w)})" for e, w in zip(item.experts[i, t], item.weights[i, t],
                                                                           strict=True)) for i in shown)]
                for t, token in enumerate(item.tokens)
            ],
            title=f"{printable(reading.model)}: experts (and weights) of {shortened(item.text)}",
        )  # fmt: skip
    write_outputs(reading, json, plot)


@routers.command("usage", epilog=options.example("routers usage -m olmoe-1b-7b --task arithmetic --plot usage.png"))
def usage(
    model: options.Model,
    texts: Texts = None,
    classes: options.Classes = None,
    file: options.PromptFile = None,
    columns: options.Columns = None,
    task: options.TaskName = None,
    shuffles: Annotated[int, typer.Option("--shuffles", min=19, help="Permutations behind the p-values.")] = 200,
    seed: options.Seed = 0,
    chat: options.Chat = False,
    system: options.System = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    json: options.JsonFile = None,
    plot: options.PlotFile = None,
) -> None:
    """How are experts used, and what do they go by?

    Load; what a token's experts tell of its text's class and of the token; how many change with the context.
    """
    chosen, labels = _texts(texts, classes, file, columns, task)
    check_outputs(json, plot)
    lm = library.open_model(model, device=device, dtype=dtype)
    reading = library.routing_usage(lm, chosen, labels, shuffles=shuffles, seed=seed, chat=chat, system=system)
    notify(reading.notices)
    load, label, context = reading.usage.load, reading.label, reading.context
    columns = ["layer", "busiest expert", "its share", "evenness"]
    columns += ["bits of the class", "p"] if label else []
    columns += ["change with context", "between other tokens"] if context else []
    rows: list[list[str]] = []
    for i, name in enumerate(reading.layers):
        row = [name, str(load[i].argmax()), percent(load[i].max()), number(reading.usage.load_entropy[i])]
        row += [number(label.bits[i]), number(label.p[i], 3)] if label else []
        if context:
            row += [share_text(context.change[i], context.interval[i]), percent(context.other_tokens[i])]
        rows.append(row)
    table(columns, rows, title=f"{printable(reading.model)}: {reading.n_tokens:,} tokens of {reading.n_texts:,} texts")
    if label:
        say(f"the class has {number(label.label_bits)} bits; p: against {reading.shuffles} permutations of the labels")
    if context:
        change = share_text(context.overall, context.overall_interval)
        say(f"another context changes {change} of a token's experts, mean over layers, {context.tokens:,} tokens")
    else:
        say("no token occurs in two contexts, so contexts cannot be compared; give texts that share words")
    write_outputs(reading, json, plot)


def _texts(
    texts: list[str] | None, classes: list[str] | None, file: Path | None, columns: list[str] | None, task: str | None
) -> tuple[list[str], list[str] | None]:
    """Texts, and their labels where they have some."""
    if columns and not file:
        raise InputError("--columns: of a --file; give one")
    if texts and not (classes or file or task):
        return texts, None
    if texts or not (classes or file or task):
        raise InputError("texts: give them either as arguments or with an option (see --help)")
    return texts_and_labels(labelled_prompts(classes, file, task, columns))
