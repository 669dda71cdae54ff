"""Projection of GPT-OSS-20B's router shapes, reading included: 24 x 32 rows and as many random ones, both protocols.

``python -m benchmarks.routers [--threads N] [FOLDER]`` writes a checkpoint of random weights (1.2 GB, into a temporary
folder if none is named), reads the routers, projects four sets of 768 directions (reported, controlled, and a null of
each) on the vocabulary of 201,088 tokens in one pass with ten words' ranks, and prints seconds and bytes. Of the
seconds, those of the matrix products alone are what a machine takes at the least.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from classifier_emergence.mixtures.nulls import token_pool
from classifier_emergence.mixtures.projection import controlled, project_routers, random_routers, reported
from classifier_emergence.mixtures.routers import load_routers

LAYERS, EXPERTS, WIDTH, VOCABULARY = 24, 32, 2880, 201_088
LIMIT = 60.0
"""Seconds on two cores."""


def write(folder: Path) -> None:
    """A checkpoint with the tensors that are read."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    tensors = {
        "model.norm.weight": normal(WIDTH),
        "lm_head.weight": torch.empty(VOCABULARY, WIDTH, dtype=torch.bfloat16),
    }
    for start in range(0, VOCABULARY, 8192):
        part = tensors["lm_head.weight"][start : start + 8192]
        part.copy_(normal(*part.shape))
    for n in range(LAYERS):
        block = f"model.layers.{n}."
        tensors[block + "post_attention_layernorm.weight"] = normal(WIDTH)
        tensors[block + "mlp.router.weight"] = normal(EXPERTS, WIDTH)
        tensors[block + "mlp.router.bias"] = normal(EXPERTS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "num_hidden_layers": LAYERS}))
    save_file(tensors, folder / "model.safetensors")


def products() -> float:
    """Seconds of the matrix products alone."""
    rows, tokens = torch.randn(LAYERS * EXPERTS, WIDTH), torch.randn(2048, WIDTH)
    rows @ tokens.T
    started = time.perf_counter()
    for _ in range(4):
        rows @ tokens.T
    return (time.perf_counter() - started) * VOCABULARY / len(tokens)


def measure(folder: Path) -> None:
    """Read, project, print."""
    if not (folder / "config.json").exists():
        write(folder)
    started = time.perf_counter()
    weights = load_routers(folder)
    null = random_routers(weights, EXPERTS, seed=0)
    sets = [reported(weights), controlled(weights), reported(null), controlled(null)]
    words = [[1000 * i, 1000 * i + 1] for i in range(10)]
    project_routers(weights, sets, words=words, keep=token_pool(VOCABULARY))
    seconds = time.perf_counter() - started
    print(f"{torch.get_num_threads()} threads: {seconds:.1f} s, of which products {products():.1f} s")
    print(f"{weights.bytes_read / 1e9:.2f} GB read")
    if torch.get_num_threads() >= 2 and seconds > LIMIT:
        sys.exit(f"more than {LIMIT:.0f} s")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where the checkpoint is, or is written")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.folder is not None:
        measure(arguments.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder))


if __name__ == "__main__":
    main()
