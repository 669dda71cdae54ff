"""The whole pipeline in a minute, on tiny models that are built from config and trained here."""

import contextlib
import gc
import re
import shutil
from importlib import import_module
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from classifier_emergence.tasks.arithmetic import OPERATIONS, REPORTED, STYLES, SYNONYMS, labelled, prompt_bank
from classifier_emergence.tasks.classification import TASKS, get_task
from classifier_emergence.tasks.problems import Problem
from experiments.params import load_params
from experiments.shared.stage import STAGES

ROOT = Path(__file__).resolve().parents[1]
PARAMS = "params.tiny.yaml"
REPORT = ("ledger", "tables.__main__", "figures.__main__", "build", "page.__main__")
"""Modules of the stages of ``ENDING``."""
SHOWN = ("dvc.yaml", "pyproject.toml", "constraints.txt", "src/classifier_emergence/tasks/prompts.yaml",
         "results/benchmarks/peers.json")  # fmt: skip
"""What the paper's appendices print as it is."""
STEPS = 20


def corpus() -> list[str]:
    """The prompts with their answers, and every word of theirs in the forms that vocabularies know."""
    bank = load_params(ROOT / PARAMS).bank
    prompts = [prompt for style in STYLES for prompt in prompt_bank(style, bank)]
    lines = [f"{prompt.text} {Problem(prompt.operation, *prompt.pair).answer}" for prompt in prompts]
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
        bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
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


def run(folder: Path) -> None:
    """Run the whole pipeline in a new folder, in this process: tiny models, tiny parameters, the paper's own sources.

    Uses one thread, as models so small gain nothing from more.
    """
    skip = shutil.ignore_patterns("paper.pdf", "index.html", "tables", "figures")
    shutil.copytree(ROOT / "paper", folder / "paper", ignore=skip)
    shutil.copy(ROOT / PARAMS, folder / "params.yaml")
    for name in SHOWN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "dvc.yaml", folder)
    build(folder / "models")
    torch.set_num_threads(1)
    with contextlib.chdir(folder):
        params = load_params()
        for stage, models in STAGES.items():
            for model in getattr(params, models):
                torch.manual_seed(0)
                gc.freeze()  # every training collects garbage, which would go through all that the libraries hold
                import_module(f"experiments.stages.{stage}").run(params.of_model(model), model)
        for name in REPORT:
            import_module(f"experiments.report.{name}").run()
