"""Commands on mixture-of-experts checkpoints."""

from pathlib import Path
from typing import Annotated, Any

import typer

from classifier_emergence.cli_options import EXAMPLE, JsonFile, check_outputs, write_json
from classifier_emergence.terminal import printable, say, table

routers = typer.Typer(help="Routers of mixture-of-experts models.")


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    app.add_typer(routers, name="routers", no_args_is_help=True)


@routers.command("project", epilog=EXAMPLE + "classifier-emergence routers project -m ./olmoe --json routers.json")
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
    json: JsonFile = None,
) -> None:
    """Do router rows point at words?

    Cosines of every expert's row with every token, without loading the model, beside random rows.
    """
    check_outputs(json, None)
    from classifier_emergence.router_words import project_folder
    from classifier_emergence.typeset import number

    folder = _folder(model)
    reading = project_folder(folder, words=word or [], gains=gains, top=top, seed=seed)
    best = sorted(reading["experts"], key=lambda item: -item["top_scores"][0])[:20]
    columns: list[str] = ["layer", "expert", "largest cosine", "top tokens"]
    rows: list[list[str]] = [
        [str(item["layer"]), str(item["expert"]), number(item["top_scores"][0], 3),
         " ".join(token.strip() for token in item["top_tokens"][:4])]
        for item in best
    ]  # fmt: skip
    table(columns, rows, title=f"{printable(folder.name)}: the {len(rows)} experts whose rows come closest to a token")
    if reading["words"]:
        table(["word", "best rank of an expert", "random rows"], _word_rows(reading))
    null = reading["null"]
    say(
        f"largest cosine of {len(reading['experts'])} experts: {number(reading['largest'], 3)}; of as many random "
        f"rows {number(null['largest'], 3)}; chance for one isotropic row {number(null['expected_max_cosine'], 3)}"
    )
    write_json(json, reading)


def _word_rows(reading: dict[str, Any]) -> list[list[str]]:
    return [
        [item["word"], f"{item['best_rank']:,} (L{item['layer']}, expert {item['expert']})",
         f"{item['null_best_rank']:,}"]
        for item in reading["words"]
    ]  # fmt: skip


def _folder(name: str) -> Path:
    from classifier_emergence.catalogue import named_source, registry
    from classifier_emergence.params import source_of

    known = registry()
    source = named_source(name, known)
    if source is None:  # no tokenizer is asked for here, so sources.fetch would be too strict with a folder
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        source = source_of(name, known)
    from classifier_emergence.sources import fetch

    return fetch(name, source)
