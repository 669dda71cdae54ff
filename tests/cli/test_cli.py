"""The command line: what it prints and writes, how it refuses, and that it starts fast."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors import SafetensorError
from transformers import AutoTokenizer

from classifier_emergence.cli import repository as cli_paper
from classifier_emergence.cli.app import app, run
from classifier_emergence.cli.options import labelled_prompts
from classifier_emergence.errors import InputError
from classifier_emergence.instruments import finetune
from classifier_emergence.instruments import lens as instrument_lens
from classifier_emergence.results import lookup, read_result, write_result

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
CLASSES = ["--class", "multiply:7 * 8 =|12 * 5 =|3 * 9 =", "--class", "add:23 + 45 =|17 + 38 =|11 + 22 ="]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ce(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """Run a command line in an empty folder, on the tiny model: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    model = str(tiny_models / "tiny-llama")

    def call(*words: str) -> tuple[int, str, str]:
        code = run([model if word == MODEL else word for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def every_command(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from every_command(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(every_command(typer.main.get_command(app)))


def example(command: Any) -> list[str]:
    text = str(command.epilog).partition("Example:")[2].replace("\\\n", " ")
    return shlex.split(text)


# --- Help and start ---


def test_help_and_the_version_need_no_heavy_import() -> None:
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        "from classifier_emergence.cli.app import main\n"
        "try: main()\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'matplotlib', 'rich', 'dvc'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dual-reward" in done.stdout


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_of_itself(path: tuple[str, ...], ce: Run) -> None:
    code, out, _ = ce(*path, "--help")
    assert code == 0
    assert f"classifier-emergence {' '.join(path)}" in out
    words = example(COMMANDS[path])
    assert tuple(words[: 1 + len(path)]) == ("classifier-emergence", *path)


@pytest.mark.parametrize("name", ["probe", "lens", "direction"])
def test_examples_of_the_help_run(name: str, ce: Run) -> None:
    layers = {"L16": "L1", "L20": "L2"}  # the tiny model has four blocks
    code, _, err = ce(*(layers.get(word, word) for word in example(COMMANDS[name,])[1:]))
    assert code == 0, err


def test_a_group_without_a_command_shows_its_help(ce: Run) -> None:
    for words in ([], ["models"], ["experiments"], ["routers"]):
        code, out, err = ce(*words)
        assert code == 2
        assert "Usage: classifier-emergence" in out
        assert not err


# --- The lines that must work ---


def test_lens(ce: Run, tmp_path: Path) -> None:
    words = ["lens", "-m", MODEL, "7 * 8 =", "12 * 5 =", "--target", "multiply", "--target", "add", "--null-words",
             "20", "--json", "lens.json", "--plot", "lens.png"]  # fmt: skip
    code, out, err = ce(*words)
    assert code == 0, err
    result = read_result(tmp_path / "lens.json")
    assert result["prompts"] == ["7 * 8 =", "12 * 5 ="]
    assert result["targets"] == ["multiply", "add"]
    assert [len(row) for row in result["alignment"]] == [5, 5]
    assert (tmp_path / "lens.png").read_bytes().startswith(b"\x89PNG")
    header, *rows = out.splitlines()
    assert header.split("\t")[:2] == ["target", "prompt"]
    assert rows[0].split("\t")[:2] == ["multiply", "7 * 8 ="]
    assert "\x1b" not in out + err


def test_a_map_of_layers_by_tokens(ce: Run, tmp_path: Path) -> None:
    words = ["lens", "-m", MODEL, "7 * 8 =\x1b", "--positions", "all", "--target", "multiply", "--json", "m.json"]
    code, out, err = ce(*words, "--plot", "m.html", "--tokens")
    assert code == 0, err
    result = read_result(tmp_path / "m.json")
    assert len(result["top_tokens"]) == len(result["layers"]) == 5
    assert len(result["top_tokens"][0]) == len(result["read"]) == len(result["tokens"])
    fed, header, *rows = out.splitlines()
    assert fed.startswith("tokens of prompt 1: [7]|[ *]")
    assert header.split("\t")[1:4] == ["7", " *", " 8"]
    assert [row.split("\t")[0] for row in rows[:5]] == ["L3", "L2", "L1", "L0", "emb"]
    assert rows[6].split("\t")[0] == "multiply"
    assert "\x1b" not in out + err
    assert "<table" in (tmp_path / "m.html").read_text()
    code, out, err = ce("lens", "-m", MODEL, "7 * 8 =", "--generate", "2", "--color", "entropy", "--plot", "w.svg",
                        "--target", "add")  # fmt: skip
    assert code == 0, err
    assert out.splitlines()[-4] == "step\ttoken\tadd"
    assert [line.split("\t")[0] for line in out.splitlines()[-3:-1]] == ["1", "2"]
    assert out.splitlines()[-1].startswith("the model wrote: ")


def test_another_token_is_read_and_notices_are_said(ce: Run, tmp_path: Path) -> None:
    code, out, err = ce("lens", "-m", MODEL, "7<eos> * 8 =", "--position", "after:8", "--tokens")
    assert code == 0, err
    assert "tokens of prompt 1: 7|<eos>| *|[ 8]| =" in out
    assert "notice: prompt 1: holds the end token '<eos>' at position 1; read at token 3, ' 8'" in err


def test_a_kept_probe_classifies_new_prompts(ce: Run, tmp_path: Path) -> None:
    code, out, err = ce("probe", "-m", MODEL, *CLASSES, "--test", "11 * 12 =", "--output", "kept", "--json", "p.json")
    assert code == 0, err
    said = read_result(tmp_path / "p.json")["predictions"][0]
    (tmp_path / "new.csv").write_text("id;question\n1;11 * 12 =\n")
    code, out, err = ce("predict", "kept", "-m", MODEL, "--file", "new.csv", "--columns", "prompt=question")
    assert code == 0, err
    assert out.split("\t")[:2] == ["11 * 12 =", said["label"]]
    code, out, err = ce("predict", "kept", "-m", MODEL, "7<eos> =", "--tokens", "--time", "--json", "t.json")
    assert code == 0, err
    assert "notice: prompt 1: holds the end token" in err
    assert out.startswith("tokens of prompt 1: 7|<eos>|[ =]\n")
    assert out.splitlines()[-1].startswith("as a hook behind L")
    assert read_result(tmp_path / "t.json")["cost"]["passes"] == 20


def test_probe_with_new_prompts(ce: Run, tmp_path: Path) -> None:
    code, out, err = ce("probe", "-m", MODEL, *CLASSES, "--test", "11 * 12 =", "--json", "probe.json")
    assert code == 0, err
    result = read_result(tmp_path / "probe.json")
    assert result["n_by_class"] == [3, 3]
    assert result["predictions"][0]["prompt"] == "11 * 12 ="
    assert out.splitlines()[-1] == result["verdict"]


def test_dual_reward_then_lens_with_its_adapter(ce: Run, tmp_path: Path) -> None:
    code, out, err = ce("dual-reward", "-m", MODEL, "--steps", "2", "--output", "./adapter", "--json", "dual.json")
    assert code == 0, err
    assert "adapter: adapter" in out
    result = read_result(tmp_path / "dual.json")
    assert result["task"] == "arithmetic"
    assert str(tmp_path) not in (tmp_path / "dual.json").read_text()
    code, out, err = ce("lens", "-m", MODEL, "5 - 3 =", "7 * 8 =", "--target", "add", "--compare", "adapter", "--plot",
                        "c.png")  # fmt: skip
    assert code == 0, err
    assert out.splitlines()[-6].split("\t")[0::5] == ["what", "95 % interval"]
    code, out, err = ce("lens", "-m", MODEL, "7 * 8 =", "--position", "all", "--target", "add", "--color", "add",
                        "--compare", "adapter", "--plot", "m.html", "--json", "m.json")  # fmt: skip
    assert code == 0, err
    both = read_result(tmp_path / "m.json")
    assert (both["before"]["model"], both["other"]) == ("tiny-llama", "tiny-llama+adapter")
    last = [line for line in out.splitlines() if line.startswith("L3\t")][-1].split("\t")[1]
    gap = 100 * (both["after"]["alignment"][0][-1][0] - both["before"]["alignment"][0][-1][0])
    assert last == f"{gap:+.2g} {both['after']['top_tokens'][-1][0][0]}"
    code, _, err = ce("lens", "-m", MODEL, "--adapter", "./adapter", "50 - 23 =", "--json", "lens.json")
    assert code == 0, err
    assert read_result(tmp_path / "lens.json")["model"] == "tiny-llama+adapter"


def test_grpo_says_what_was_right_while_training(ce: Run, tmp_path: Path) -> None:
    code, out, err = ce(
        "grpo", "-m", MODEL, "--steps", "2", "--batch-size", "2", "--task", "places", "--json", "grpo.json"
    )
    assert code == 0, err
    assert "adapter: not kept" in out
    assert "right while training: 0.0 % in the first 1 steps, 0.0 % in the last 1" in out
    assert "rewards taught nothing" in out
    result = read_result(tmp_path / "grpo.json")
    assert (result["method"], result["task"], len(result["losses"])) == ("grpo", "places", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["grpo.json"]


def test_training_takes_files_and_shows_what_is_fed(ce: Run, tmp_path: Path) -> None:
    rows = [f"{a} {sign} {b} =;{word};{r}" for sign, word in (("*", "multiply"), ("+", "add"))
            for a, b, r in ((7, 8, 1), (2, 3, 2), (4, 9, 3), (6, 5, 4))]  # fmt: skip
    (tmp_path / "p.csv").write_text("\n".join(["question;class;answer", *rows]))
    words = ["sft", "-m", MODEL, "--file", "p.csv", "--columns", "prompt=question", "--steps", "1"]
    code, out, err = ce(*words, "--position", "after:*")
    assert code == 2
    assert "position 'after:*': prompt 5 does not hold that text" in err
    code, out, err = ce(*words, "--position", "-3", "--tokens", "--json", "s.json")
    assert code == 0, err
    assert "|[ *]| " in out.splitlines()[0]
    result = read_result(tmp_path / "s.json")
    assert (result["n_train"] + result["n_test"], len(result["fed"])) == (8, 8)
    assert result["settings"]["position"] == "-3"


def test_routers_project(mixture: Path, ce: Run, tmp_path: Path) -> None:
    code, out, err = ce("routers", "project", "-m", "./moe", "--word", "multiply", "--json", "routers.json")
    assert code == 0, err
    result = read_result(tmp_path / "routers.json")
    assert [(e["layer"], e["expert"]) for e in result["experts"]] == [(i, j) for i in range(2) for j in range(4)]
    assert result["largest"] == pytest.approx(max(e["top_scores"][0] for e in result["experts"]))
    assert result["words"][0]["best_rank"] >= 1
    assert "random" in out


def test_routers_of_the_hub_are_read_without_the_rest(
    mixture: Path, ce: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_server: Any
) -> None:
    hub_server.folder, revision = mixture, hub_server.REVISION
    tokenizer = AutoTokenizer.from_pretrained(mixture)
    asked = []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: asked.append((a, k)) or tokenizer)
    code, _, err = ce("routers", "project", "-m", f"org/moe@{revision}", "--json", "hub.json")
    assert code == 0, err
    assert asked == [(("org/moe",), {"revision": revision, "trust_remote_code": False})]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    here, there = tmp_path / "here.json", tmp_path / "hub.json"
    assert ce("routers", "project", "-m", "./moe", "--json", "here.json")[0] == 0
    assert read_result(here) == read_result(there)
    # Experts are not read. So small an unembedding is read twice: for the mean of its rows, and for their scores.
    assert read_result(there)["bytes_read"] < 0.8 * read_result(there)["total_bytes"]


def test_routers_trace(mixture: Path, ce: Run, tmp_path: Path) -> None:
    words = ["routers", "trace", "-m", "./moe", "7 * 8 = 56", "[b]\n=1", "--layer", "L1", "--json", "t.json",
             "--plot", "t.png"]  # fmt: skip
    code, out, err = ce(*words)
    assert code == 0, err
    result = read_result(tmp_path / "t.json")
    assert (result["layers"], result["n_experts"]) == (["L1"], 4)
    (tmp_path / "texts.csv").write_text("question\n7 * 8 = 56\n")
    code, again, err = ce("routers", "trace", "-m", "./moe", "--file", "texts.csv", "--columns", "prompt=question",
                          "--layer", "L1")  # fmt: skip
    assert code == 0, err
    assert out.startswith(again)
    first, second = result["texts"]
    assert (first["text"], second["text"]) == ("7 * 8 = 56", "[b]\n=1")
    assert "".join(first["tokens"]) == "7 * 8 = 56"
    assert len(first["experts"][0]) == len(first["weights"][0]) == len(first["tokens"])
    weights = [sum(pair) for pair in first["weights"][0]]
    assert weights == pytest.approx([1.0] * len(weights))
    expert, weight = first["experts"][0][0][0], first["weights"][0][0][0]
    header, row, *_ = out.splitlines()
    assert header == "token\tL1"
    assert row.startswith(f"7\t{expert} ({weight:.2f}), ")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in out + err


def test_routers_usage(mixture: Path, ce: Run, tmp_path: Path) -> None:
    words = ["routers", "usage", "-m", "./moe", *CLASSES, "--shuffles", "19", "--json", "u.json", "--plot", "u.svg"]
    code, out, err = ce(*words)
    assert code == 0, err
    result = read_result(tmp_path / "u.json")
    assert (result["classes"], result["n_texts"]) == (["multiply", "add"], 6)
    for layer in (0, 1):
        assert sum(result["usage"]["load"][layer]) == pytest.approx(1)
        for load in result["class_load"]:
            assert sum(load[layer]) == pytest.approx(1)
    assert result["label"]["label_bits"] == pytest.approx(1, abs=0.1)  # two classes, about as many tokens
    assert result["context"]["repeated"] == [0, 0]
    header, *lines = out.splitlines()
    assert header.split("\t")[4:] == ["bits of the class", "p", "change with context", "between other tokens"]
    assert len(lines) == 2 + 2
    code, out, err = ce("routers", "usage", "-m", "./moe", "7 * 8 =", "some other words", "--json", "plain.json")
    assert code == 0, err
    plain = read_result(tmp_path / "plain.json")
    assert (plain["classes"], plain["label"], plain["context"]) == ([], None, None)
    assert "no token occurs in two contexts" in out


def test_claims(ce: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    committed = read_result(ROOT / "results" / "claims.json")
    code, out, _ = ce("claims", "c09")
    assert code == 0
    assert committed["C09"]["claim"] in out
    assert f"verdict: {committed['C09']['headline']} (3 models; other tests, without flaws switched on: " in out
    assert len(out.splitlines()) == 6 + len(committed["C09"]["evidence"])
    predicted = read_result(ROOT / "results" / "predictions.json")
    code, out, _ = ce("claims")
    assert len(out.splitlines()) == 1 + len(committed) + len(predicted)
    code, _, err = ce("claims", "C99")
    assert code == 2
    assert err.startswith("error: claim 'C99': no such claim; there are C01 to C33")


def test_every_number_of_a_verdict_leads_to_its_file_script_and_test(
    ce: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyproject.toml", "params.yaml", "experiments", "src"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "results", tmp_path / "results")
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "made_by.yaml").symlink_to(ROOT / "paper" / "made_by.yaml")
    for source, key in (("claims", "C09"), ("predictions", "P01")):  # a claim of ours makes a prediction, too
        text = (ROOT / "paper" / "claims.yaml").read_text()
        (tmp_path / "paper" / f"{source}.yaml").write_text(text.replace("C09:", f"{key}:", 1))
    item = read_result(ROOT / "results" / "claims.json")["C09"]
    write_result(tmp_path / "results" / "predictions.json", {"P01": item})
    monkeypatch.chdir(tmp_path)
    for ledger, key in (("claims", "C09"), ("predictions", "P01")):
        code, out, _ = ce("claims", key)
        assert code == 0
        header, *rows = [line.split("\t") for line in out.splitlines()[5:]]
        assert len(rows) == len(item["evidence"])
        for row in rows:
            told = dict(zip(header, row, strict=True))
            held = lookup(read_result(tmp_path / told["file"]), told["key"])
            assert float(told["committed"]) == held
            assert (ROOT / told["script"]).is_file()
            file, _, function = told["made_by"].partition(": ")
            assert f"def {function.split('.')[-1]}(" in (ROOT / file).read_text()
            assert told["stage"] == f"{Path(told['script']).stem}@{told['model']}"
            file, _, line = told["test"].rpartition(":")
            assert file == f"paper/{ledger}.yaml"
            assert told["what"] in (tmp_path / file).read_text().splitlines()[int(line) - 1]
    (tmp_path / "paper" / "claims.yaml").write_text("C09: {}\n")
    code, _, err = ce("claims", "C09")
    assert code == 2
    assert "C09 has no test" in err


# --- Other ways in, other ways out ---


def test_prompts_from_flags() -> None:
    task = labelled_prompts(["a: x | y=1:2 ", "b:z", "a:w"], None, None)
    assert task.classes == ("a", "b")
    assert [(item.prompt, item.label) for item in task.items] == [("x", 0), ("y=1:2", 0), ("w", 0), ("z", 1)]
    assert len({item.group for item in task.items}) == 4
    for bad in ("no colon", "a:", "a:x||y", ":x"):
        with pytest.raises(InputError, match="write NAME:PROMPT"):
            labelled_prompts([bad], None, None)
    with pytest.raises(InputError, match="exactly one of"):
        labelled_prompts(None, None, None)
    with pytest.raises(InputError, match="exactly one of"):
        labelled_prompts(["a:x"], Path("f.csv"), None)


def test_prompts_from_a_file_and_hostile_labels(ce: Run, tmp_path: Path) -> None:
    labels = ["[bold]=cmd|' /C calc'!A0", "שלום\n#"]
    rows = [{"prompt": f"{i} \x1b[31m{'*' if i % 2 else '+'} 👩‍🔬 |", "label": labels[i % 2]} for i in range(8)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code, out, err = ce("probe", "-m", MODEL, "--file", "p.jsonl", "--shuffles", "3", "--json", "p.json",
                        "--test", "=1+1|", "--plot", "p.pdf")  # fmt: skip
    assert code == 0, err
    result = read_result(tmp_path / "p.json")
    assert result["classes"] == labels
    assert result["predictions"][0]["prompt"] == "=1+1|"
    assert "\x1b" not in out + err
    assert len(out.splitlines()) == 1 + 5 + 1 + 1 + 2


def test_models_are_listed_shown_and_verified(ce: Run, tiny_models: Path) -> None:
    code, out, _ = ce("models", "list")
    assert code == 0
    assert any(line.split("\t")[:2] == [MODEL, "wheel"] for line in out.splitlines())
    code, out, _ = ce("models", "show", str(tiny_models / "tiny-llama"))
    assert code == 0
    assert "architecture\tLlamaForCausalLM" in out
    code, out, _ = ce("models", "verify", str(tiny_models / "tiny-llama"))
    assert code == 0
    assert "complete" in out


def test_compare_says_what_differs_with_its_exit_code(ce: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, answer = (str(tmp_path / f"{name}.json") for name in ("a", "b", "answer"))
    write_result(a, {"accuracy": 0.5, "n": 100})
    write_result(b, {"accuracy": 0.6, "n": 100})
    assert ce("compare", a, b)[0] == 2  # not in a clone
    monkeypatch.chdir(ROOT)
    assert ce("compare", a, b, "--json", answer)[0] == 1
    assert read_result(answer)["differences"] == ["$.accuracy: 0.5 != 0.6 (tolerance 0.02, accuracy)"]


def test_experiments_are_asked_of_the_clone(ce: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def pretend(command: list[str], **options: Any) -> Any:
        calls.append((command[2:], options["cwd"]))
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(cli_paper.subprocess, "run", pretend)
    monkeypatch.chdir(ROOT / "tests")
    assert ce("experiments", "status", "probing", "--json", str(tmp_path / "s.json"))[0] == 1
    assert ce("experiments", "reproduce", "probing", "--list")[0] == 1
    assert calls.pop() == (["experiments.pipeline", "reproduce", "probing", "--list"], ROOT)
    assert ce("experiments", "submit", "probing", "--at-once", "2", "--set", "mem_gb=8")[0] == 1
    assert calls.pop() == (["experiments.pipeline", "submit", "probing", "--at-once=2", "--set=mem_gb=8"], ROOT)
    assert calls == [(["experiments.pipeline", "status", "probing", "--json", str(tmp_path / "s.json")], ROOT)]


# --- Refusals ---

BAD = {
    "unknown command": (["nonsense"], "No such command"),
    "no model": (["lens", "7 * 8 ="], "Missing option"),
    "unknown model": (["lens", "-m", "smolm2-135m-instruct", "x"], "did you mean 'smollm2-135m-instruct'?"),
    "no folder": (["lens", "-m", "./nowhere", "x"], "no such folder"),
    "no adapter": (["lens", "-m", MODEL, "--adapter", "./nowhere", "x"], "no adapter_config.json"),
    "no prompts": (["probe", "-m", MODEL], "exactly one of"),
    "one example": (["probe", "-m", MODEL, "--class", "a:x|y", "--class", "b:z"], "class 'b': one example"),
    "one class": (["probe", "-m", MODEL, "--class", "a:x|y"], "at least two"),
    "empty prompt": (["lens", "-m", MODEL, ""], "prompt 1: empty"),
    "no text": (["lens", "-m", MODEL, "a\udcff"], "not valid Unicode"),
    "pieces": (["lens", "-m", MODEL, "x", "--target", "xqzxqz"], "no single token"),
    "layer": (["lens", "-m", MODEL, "x", "--layer", "L99"], "L99"),
    "number": (["probe", "-m", MODEL, *CLASSES, "--shuffles", "many"], "--shuffles"),
    "plot": (["lens", "-m", MODEL, "x", "--plot", "x.gif"], "unknown ending"),
    "folder as file": (["lens", "-m", MODEL, "x", "--json", "."], "--json"),
    "no file": (["probe", "-m", MODEL, "--file", "nowhere.csv"], "nowhere.csv"),
    "task": (["probe", "-m", MODEL, "--task", "nonsense"], "nonsense"),
    "no clone": (["claims", "C09"], "not in a clone"),
    "weight": (["dual-reward", "-m", MODEL, "--output", "o", "--class-weight", "2"], "class_weight"),
    "answers": (["dual-reward", "-m", MODEL, "--output", "o", *CLASSES], "no answer to train on"),
    "chat of training": (["sft", "-m", MODEL, "--chat"], "no chat template"),
    "position of training": (["grpo", "-m", MODEL, "--class-weight", "1", "--position", "9999"], "position"),
    "columns of training": (["grpo", "-m", MODEL, "--columns", "prompt=x"], "--columns: of a --file"),
    "columns of texts": (["routers", "trace", "-m", MODEL, "x", "--columns", "prompt=x"], "--columns: of a --file"),
    "dense": (["routers", "trace", "-m", MODEL, "x"], "give a mixture of experts"),
    "no texts": (["routers", "trace", "-m", MODEL], "texts: give them"),
    "texts twice": (["routers", "usage", "-m", MODEL, "x", "--task", "arithmetic"], "texts: give them"),
    "position": (["lens", "-m", MODEL, "x", "--position", "9"], "position 9: prompt 1 has tokens 0 to 0"),
    "chat": (["lens", "-m", MODEL, "x", "--chat"], "no chat template"),
    "system": (["lens", "-m", MODEL, "x", "--system", "y"], "system: given without chat"),
    "colour": (["lens", "-m", MODEL, "x", "--color", "entropy"], "--color: is of a map"),
    "colour of a map": (["lens", "-m", MODEL, "x", "--position", "all", "--color", "red"], "color 'red': unknown"),
    "two maps": (["lens", "-m", MODEL, "x", "y", "--position", "all"], "prompts: 2 given; a map is of one"),
    "all of many": (["probe", "-m", MODEL, *CLASSES, "--position", "all"], "position 'all'"),
    "how of pieces": (["lens", "-m", MODEL, "x", "--target", "xqzxqz", "--pieces", "any"], "pieces 'any': unknown"),
    "no probe": (["predict", "nowhere", "-m", MODEL, "x"], "not what probe --output wrote"),
    "nothing to predict": (["predict", "nowhere", "-m", MODEL], "prompts: give them as arguments"),
    "columns": (["probe", "-m", MODEL, *CLASSES, "--columns", "prompt=x"], "--columns: of a --file"),
    "a pair": (["probe", "-m", MODEL, "--file", "nowhere.csv", "--columns", "prompt"], "write OURS=THEIRS"),
    "compare": (["lens", "-m", MODEL, "x", "--compare", "y"], "--compare: of targets at one token"),
    "compare what is written": (["lens", "-m", MODEL, "x", "--generate", "2", "--compare", "y"], "--compare: of"),
    "markup": (["lens", "-m", "[bold]\n\x1b[31m", "x"], "unknown key"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case: str, ce: Run, tmp_path: Path) -> None:
    words, message = BAD[case]
    code, out, err = ce(*words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1, err
    assert message in lines[0]
    assert err.splitlines()[-1] == lines[0]
    assert not out
    assert "\x1b" not in err
    assert not [path for path in tmp_path.iterdir() if path.name != "o.partial"]


def test_an_interrupt_leaves_no_file(ce: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lens.json").write_text("old")

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(instrument_lens, "read_states", interrupted)
    code, _, err = ce("lens", "-m", MODEL, "x", "--json", "lens.json", "--plot", "lens.png")
    assert (code, err.splitlines()[-1]) == (130, "interrupted; no result was written")
    assert [path.name for path in tmp_path.iterdir()] == ["lens.json"]
    assert (tmp_path / "lens.json").read_text() == "old"


def test_a_full_disk_is_one_line_and_leaves_the_old_file(
    ce: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.json").write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("classifier_emergence.results.os.fsync", full)
    code, _, err = ce("models", "list", "--json", "out.json")
    assert code == 2
    assert err == "error: --json 'out.json': cannot be written (No space left on device); free space or name another\n"
    assert (tmp_path / "out.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"]


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (RuntimeError("odd\nthing"), "RuntimeError: odd (unexpected error; --debug shows the traceback)"),
        (OSError(5, "Input/output error", "disk"), "disk: Input/output error; check the file"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "I/O error: No space left"),
        (MemoryError(), "out of memory"),
    ],
    ids=["unforeseen", "disk", "safetensors", "memory"],
)
def test_whatever_fails_is_one_line_and_debug_shows_where(
    failure: Exception, told: str, ce: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr(instrument_lens, "read_states", fails)
    words = ["lens", "-m", MODEL, "x"]
    code, _, err = ce(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"error: {told}")
    code, _, err = ce(*words, "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "in fails" in err


def test_what_is_wrong_with_a_run_is_said_at_its_end(ce: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "LARGE", -1.0)
    code, out, _ = ce("dual-reward", "-m", MODEL, "--json", "a.json", "--steps", "2")
    assert code == 0
    told = read_result(tmp_path / "a.json")["warnings"]
    assert "something else on neutral text" in told[-1]
    assert [line for line in out.splitlines() if line.startswith("warning: ")] == [f"warning: {text}" for text in told]


def test_a_folder_that_cannot_be_made_is_refused_before_the_model_is_loaded(ce: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = ce("lens", "-m", "./nowhere", "x", "--json", "file/lens.json")
    assert code == 2
    assert err.startswith("error: --json 'file/lens.json': cannot be written")
