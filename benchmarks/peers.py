"""A lens on a batch of prompts by one of several packages, in a process of its own; see ``benchmarks.lens``.

``python benchmarks/peers.py PACKAGE FOLDER`` loads the model of a folder, reads a line of JSON from the standard input
(``prompts``, token ids of each; ``texts``; ``wanted``, token ids) and answers every further line with one measurement:
seconds, and the peak of the process's memory in bytes. The last answers are the probabilities of the wanted tokens,
(prompts, layers, wanted), in the file that the last line names. It imports nothing of this repository but where the
package is ours, as the others live in an environment of their own.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

Lens = Callable[[dict[str, Any]], torch.Tensor]
"""A job -> probabilities (prompts, layers, wanted)."""


def ours(folder: str) -> Lens:
    """States of all layers, then the vocabulary in blocks."""
    from classifier_emergence import open_model
    from classifier_emergence.reading.lens import lens_scores
    from classifier_emergence.reading.residuals import residual_stream

    lm = open_model(folder, dtype="float32")

    def read(job: dict[str, Any]) -> torch.Tensor:
        words = [[token] for token in job["wanted"]]
        scores = lens_scores(residual_stream(lm, job["texts"])[1:], lm.readout, words)
        return scores.log_alignment.exp().transpose(0, 1)

    return read


def plain(folder: str) -> Lens:
    """A loop over the hidden states that Transformers returns."""
    model = _causal(folder)

    def read(job: dict[str, Any]) -> torch.Tensor:
        states, head = _hidden(model, job["prompts"]), model.get_output_embeddings()
        norm = model.base_model.norm
        # The last of them is normed already.
        layers = [head(state if row == len(states) - 1 else norm(state)) for row, state in enumerate(states)]
        return _probabilities(layers, job["wanted"])

    return read


def tuned_lens(folder: str) -> Lens:
    """The lens without training of tuned-lens (Belrose et al., 2023)."""
    from tuned_lens import model_surgery
    from tuned_lens.nn.lenses import LogitLens

    model = _causal(folder)
    if not isinstance(model.base_model, model_surgery.models.llama.modeling_llama.LlamaModel):
        model_surgery.get_final_norm = lambda causal: causal.base_model.norm  # it knows older models only
    lens = LogitLens.from_model(model)

    def read(job: dict[str, Any]) -> torch.Tensor:
        *states, last = _hidden(model, job["prompts"])
        layers = [lens(state, row) for row, state in enumerate(states)]
        return _probabilities([*layers, model.get_output_embeddings()(last)], job["wanted"])

    return read


def nnterp(folder: str) -> Lens:
    """The function of nnterp, which traces the model with nnsight."""
    from nnterp import StandardizedTransformer
    from nnterp.interventions import logit_lens

    model = StandardizedTransformer(folder, dtype=torch.float32, device_map="cpu")
    return lambda job: logit_lens(model, job["texts"])[..., job["wanted"]]


def transformer_lens(folder: str) -> Lens:
    """The bridge of TransformerLens over a model of Transformers: cached states, its norm and its unembedding."""
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(folder, dtype=torch.float32, device="cpu")
    names = [f"blocks.{layer}.hook_out" for layer in range(model.cfg.n_layers)]

    def read(job: dict[str, Any]) -> torch.Tensor:
        ids, _, last = _padded(job["prompts"])
        _, cache = model.run_with_cache(ids, names_filter=lambda name: name in names)
        rows = torch.arange(len(ids))
        layers = [model.unembed(model.ln_final(cache[name][rows, last][:, None]))[:, 0] for name in names]
        return _probabilities(layers, job["wanted"])

    return read


LENSES = {
    "ours": ours, "plain Transformers": plain, "tuned-lens": tuned_lens, "nnterp": nnterp,
    "TransformerLens": transformer_lens,
}  # fmt: skip


def _causal(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and mask (prompts, longest), padded at the end, and the place of the last token."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    return ids, (torch.arange(longest) <= last[:, None]).long(), last


def _hidden(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """States (prompts, d) at the last token after every block."""
    ids, mask, last = _padded(prompts)
    # Logits of one position: none of these lenses needs those of the model.
    found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, logits_to_keep=1)
    return [state[torch.arange(len(ids)), last] for state in found.hidden_states[1:]]


def _probabilities(layers: Sequence[torch.Tensor], wanted: Sequence[int]) -> torch.Tensor:
    return torch.stack([logits.softmax(-1)[:, wanted] for logits in layers], dim=1)


@torch.no_grad()
def main() -> None:
    """Measure whenever a line asks for it."""
    package, folder = sys.argv[1:]
    read = LENSES[package](folder)
    job, out = json.loads(sys.stdin.readline()), sys.stdout
    sys.stdout = sys.stderr  # what packages print is no answer
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        found = read(job)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if line.strip():
            np.save(line.strip(), found.numpy())
        print(json.dumps({"seconds": seconds, "bytes": peak}), file=out, flush=True)


if __name__ == "__main__":
    main()
