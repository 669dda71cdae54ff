"""What there is to run, in which order, how long it takes, and what is stale and why: the pipeline as DVC sees it."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import networkx as nx
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage import PipelineStage

from classifier_emergence.errors import InputError, did_you_mean
from experiments.shared.stage import ENDING


def select(picks: Collection[str]) -> dict[str, PipelineStage]:
    """The stages to run, in order: the picked ones, what they need, and what ends in the paper.

    Args:
        picks: Stages (probing) and models (smollm2-135m-instruct); where both are named, these stages of these models.
            Beside them, single ones (probing@gemma-3-270m). Empty for everything.

    Raises:
        InputError: There is no such stage or model (names the nearest), or no such stage of such a model. Or this is no
            pipeline that DVC can read.
    """
    with _repository() as repo:
        graph, place = repo.index.graph, {stage: i for i, stage in enumerate(repo.index.stages)}
        # An edge leads from a stage to one that it needs.
        ordered = nx.lexicographical_topological_sort(graph.reverse(), key=place.__getitem__)
        order = {stage.addressing: stage for stage in ordered}
        models = list(dict.fromkeys(stage.addressing.partition("@")[2] for stage in place))
    known = sorted({*order, *(part for name in order for part in name.split("@"))})
    for pick in picks:
        if pick not in known:
            raise InputError(f"{pick!r}: no such stage or model; {did_you_mean(pick, known, 'known: {}')}")
    wanted = {name for name in order if _picked(name, {*picks}, {*models})}
    if not wanted:
        raise InputError(f"{' '.join(picks)}: none of these stages runs on any of these models; --list shows which do")
    wanted |= {*ENDING}
    # Of the ending only itself: what it needs from other models is committed.
    needed = (nx.descendants(graph, order[name]) for name in wanted - {*ENDING})
    wanted |= {stage.addressing for stages in needed for stage in stages}
    # Model by model, in the order of the parameters: one model's answer does not wait for the others.
    rank = {name: models.index(name.partition("@")[2]) if "@" in name else len(models) for name in wanted}
    return {name: order[name] for name in sorted(order, key=lambda name: rank.get(name, 0)) if name in wanted}


def _picked(name: str, picks: set[str], models: set[str]) -> bool:
    stage, _, model = name.partition("@")
    of, kinds = picks & models, {pick for pick in picks - models if "@" not in pick}
    if of or kinds:
        return name in picks or ((not kinds or stage in kinds) and (not of or model in of))
    return not picks or name in picks


def minutes_of(stage: PipelineStage) -> float:
    """What a stage takes on two cores, from its ``meta`` in dvc.yaml."""
    minutes = (stage.meta or {}).get("minutes", 1.0)
    return float(minutes.get(stage.addressing.partition("@")[2], 2.0) if isinstance(minutes, dict) else minutes)


def stale(names: Collection[str]) -> dict[str, list[str]]:
    """Of these stages those whose results are not those of the code, parameters and inputs in the tree, and why.

    They are what ``dvc repro`` would run, but for outputs outside git that are merely absent.
    """
    with _repository() as repo:
        changes = repo.status()  # of all: for each target that is named, DVC would read dvc.yaml again
        graph = repo.index.graph
        needs = {stage.addressing: {other.addressing for other in nx.descendants(graph, stage)} for stage in graph}
        cached = {out.def_path for stage in graph for out in stage.outs if out.use_cache}
        new = {stage.addressing for stage in graph if not any(out.hash_info for out in stage.outs)}
    changed = {name: why for name in names if (why := reasons(changes.get(name, []), cached))}
    changed |= {name: ["never run"] for name in names if name in new}
    above = {name: [f"needs {other}, which is stale" for other in changed if other in needs[name]] for name in names}
    found = {name: changed.get(name, []) + above[name] for name in names}
    return {name: why for name, why in found.items() if why}


def to_run(names: Collection[str]) -> dict[str, set[str]]:
    """These stages, and those that make what they need and what is absent -> all of them that each one needs."""
    with _repository() as repo:
        graph = repo.index.graph
        stages = {stage.addressing: stage for stage in graph}
        found = [*names]
        for name in found:  # which grows
            absent = {dep.fs_path for dep in stages[name].deps if not dep.exists}
            makers = (need for need in graph.successors(stages[name]) if absent & {out.fs_path for out in need.outs})
            found += [need.addressing for need in makers if need.addressing not in found]
        return {name: {need.addressing for need in nx.descendants(graph, stages[name])} & {*found} for name in found}


def has_remote() -> bool:
    """Whether there is a place where DVC keeps what is outside git, by default."""
    with _repository() as repo:
        return bool(repo.config["core"].get("remote"))


def reasons(changes: Collection[Any], cached: Collection[str]) -> list[str]:
    """DVC's account of one stage (``dvc status --json``) in words; empty if nothing in it makes results stale.

    An output that DVC keeps outside git (``cached``) and that is merely absent is made when something needs it.
    """
    found = []
    for change in changes:
        if isinstance(change, str):
            found.append({"changed command": "its command changed"}.get(change, change))
            continue
        for kind in ("changed deps", "changed outs"):
            for path, how in change.get(kind, {}).items():
                if isinstance(how, dict):  # a parameter file: key -> what happened to it
                    found += [f"parameter {key} {what}" for key, what in how.items()]
                elif how == "modified" or path not in cached:
                    found.append(f"{'its result ' if kind == 'changed outs' else ''}{path} {how}")
    return found


@contextmanager
def _repository() -> Iterator[Repo]:
    try:
        with Repo() as repo:
            yield repo
    except DvcException as error:
        raise InputError(f"dvc.yaml: DVC cannot use it ({' '.join(str(error).split())}); fix it") from error
