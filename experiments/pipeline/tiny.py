"""The whole pipeline in seconds: a copy of the repository with tiny models, built from config and trained here.

``python -m experiments.pipeline.tiny FOLDER`` makes the copy in a new folder and runs the pipeline there.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from classifier_emergence.errors import InputError
from classifier_emergence.tasks.arithmetic import OPERATIONS, REPORTED, STYLES, SYNONYMS, labelled, prompt_bank
from classifier_emergence.tasks.classification import TASKS, get_task
from experiments.params import load_params
from experiments.shared.stage import exit_on_bad_input

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("src", "experiments", "paper", "dvc.yaml", ".dvcignore")
PARAMS = "params.tiny.yaml"
STEPS = 20
AT_ONCE = (
    (("fetch@tiny-llama", "residuals@tiny-llama"), ("fetch@tiny-gemma", "residuals@tiny-gemma")),
    (
        ("probing", "logit_lens", "dual_reward", "dual_reward_long", "other_tasks"),
        ("lora_sft", "cot_alignment", "grpo", "collapse", "staged", "moe_routers"),
    ),
    (("claims", "tables"), ("figures",)),
)
"""Pairs of rows of stages that do not need each other."""
LOCKED = "Unable to acquire lock"
TRIES = 5


def corpus() -> list[str]:
    """The prompts with their answers, and every word of theirs in the forms that vocabularies know."""
    bank = load_params(ROOT / PARAMS).bank
    compute = {
        "multiply": int.__mul__,
        "add": int.__add__,
        "subtract": int.__sub__,
        "divide": int.__floordiv__,
    }
    prompts = [prompt for style in STYLES for prompt in prompt_bank(style, bank)]
    lines = [f"{prompt.text} {compute[prompt.operation](*prompt.pair)}" for prompt in prompts]
    lines += [text for table in REPORTED.values() for text in labelled(table)[0]]
    words = {word for line in lines for word in re.findall(r"[a-z]{3,}", line)}
    words |= {*OPERATIONS, *(word for group in SYNONYMS.values() for word in group)}
    words |= {word for name in TASKS for word in get_task(name).words}
    return lines + [f"{word} {word}" for word in sorted(words) for _ in range(3)]


def tokenizer(lines: list[str], *, bos: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every word of the corpus is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        bpe.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")


def build(folder: Path) -> None:
    """Write ``tiny-llama`` (untied, no BOS) and ``tiny-gemma`` (tied, BOS, norms around every block) into a folder."""
    lines = corpus()
    for name, bos in (("tiny-llama", False), ("tiny-gemma", True)):
        tok = tokenizer(lines, bos=bos)
        size = {
            "vocab_size": len(tok) + 5,  # larger than the tokenizer's, as in many real models
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "bos_token_id": tok.bos_token_id,
            "eos_token_id": tok.eos_token_id,
        }
        torch.manual_seed(0)
        model: PreTrainedModel = (
            Gemma3ForCausalLM(Gemma3TextConfig(**size, sliding_window=64, query_pre_attn_scalar=12))
            if bos
            else LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=False))
        )
        train(model, tok, lines)
        model.save_pretrained(folder / name)
        tok.save_pretrained(folder / name)


def train(model: PreTrainedModel, tok: PreTrainedTokenizerFast, lines: list[str]) -> None:
    """A few steps of language modelling: enough for layers to differ."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tok.pad_token = tok.eos_token
    for _ in range(STEPS):
        chosen = torch.randint(len(lines), (16,), generator=generator)
        batch = tok([lines[i] for i in chosen], return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def copy(folder: Path) -> None:
    """A copy of the repository's sources with the tiny parameters and no results."""
    if folder.exists():
        raise InputError(f"{folder}: exists already; name a new folder")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "paper.pdf", "tables", "figures")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=skip)
        else:
            shutil.copy(source, folder / name)
    shutil.copy(ROOT / PARAMS, folder / "params.yaml")
    (folder / ".dvc").mkdir()
    settings = (ROOT / ".dvc" / "config").read_text(encoding="utf-8")
    (folder / ".dvc" / "config").write_text(settings.replace("[core]", "[core]\n    no_scm = true"), encoding="utf-8")


def environment(folder: Path) -> dict[str, str]:
    """What stages of the copy run in: its code, and one thread, as models so small gain nothing from more."""
    return {**os.environ, "PYTHONPATH": str(folder / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def run(folder: Path) -> str:
    """Run the pipeline in the copy, stages that do not need each other two at a time; DVC's output."""
    output = ""
    forks = environment(folder)
    with ThreadPoolExecutor() as pool:
        for stages in AT_ONCE:
            # --single-item: DVC locks what it looks at, also the stages that both need.
            output += "".join(pool.map(lambda row: repro(folder, forks, "--single-item", *row), stages))
        return output + repro(folder, forks)


def repro(folder: Path, env: dict[str, str], *arguments: str) -> str:
    """``dvc repro`` in the copy, with the copy's code; its output."""
    command = [sys.executable, "-m", "dvc", "repro", *arguments]
    for _ in range(TRIES):
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        if LOCKED not in done.stderr:  # by the other of two, which reads the pipeline; what is done stays done
            break
    if done.returncode:
        raise InputError(f"dvc repro failed in {folder}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder")
    target = parser.parse_args().folder

    def go() -> None:
        """Build, copy, run."""
        copy(target)
        build(target / "models")
        sys.stdout.write(run(target))

    exit_on_bad_input(go)
