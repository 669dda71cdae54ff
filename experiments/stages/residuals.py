"""Stage residuals@model: one forward pass over every prompt, for the probes and the lens alike.

Writes the residual streams at the last prompt token, (n_layers + 1, prompts, d) each, under the names
``bank/<style>``, ``reported/<set>`` and ``<flaw>/<set>``.
"""

from safetensors.torch import save_file
from torch import Tensor

from classifier_emergence.manifest import seal_file
from classifier_emergence.models.loading import load
from classifier_emergence.reading.residuals import residual_stream
from classifier_emergence.tasks.arithmetic import HELD_OUT, LENS, REPORTED, STYLES, labelled, prompt_bank
from classifier_emergence.training.flaws import scaled_attention, scaled_embeddings
from experiments.params import Params
from experiments.shared.stage import FLAWED_SETS, main, residuals_path


def run(params: Params, key: str) -> None:
    """Capture and write the residual streams of one model."""
    lm = load(key, params.registry)
    states: dict[str, Tensor] = {}

    for style in STYLES:
        prompts = [prompt.text for prompt in prompt_bank(style, params.bank)]
        text = f"residuals of {key}: {len(prompts)} {style} prompts"
        states[f"bank/{style}"] = residual_stream(lm, prompts, description=text)

    for name, table in {**REPORTED, "held_out": HELD_OUT, "lens": LENS}.items():
        states[f"reported/{name}"] = residual_stream(lm, labelled(table)[0])

    for name in FLAWED_SETS:
        prompts = labelled(REPORTED[name])[0]
        states[f"no_causal_mask/{name}"] = residual_stream(lm, prompts, causal=False)
        with scaled_attention(lm, params.probing.attention_scale):
            states[f"scaled_attention/{name}"] = residual_stream(lm, prompts)

    prompts, embedding_scale = labelled(LENS)[0], 1 / params.logit_lens.embedding_multiplier
    with scaled_attention(lm, params.probing.attention_scale):
        states["scaled_attention/lens"] = residual_stream(lm, prompts)
        with scaled_embeddings(lm, embedding_scale):
            states["as_granite/lens"] = residual_stream(lm, prompts)
    with scaled_embeddings(lm, embedding_scale):
        states["no_embedding_multiplier/lens"] = residual_stream(lm, prompts)

    path = residuals_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in states.items()}, partial)
    seal_file(partial, path)


if __name__ == "__main__":
    main(run, __doc__)
