"""States inside a block: between its attention and its MLP, and what each of the two adds to the residual stream."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from classifier_emergence.errors import InputError
from classifier_emergence.reading.layers import layer_of
from classifier_emergence.reading.model import LanguageModel
from classifier_emergence.reading.readout import device_of
from classifier_emergence.reading.residuals import first_tensor, removing, states_at, stopping_after

SITES = ("resid", "resid_mid", "attn_out", "mlp_out")
"""The state after a block; the state between its attention and its MLP; what these two add to it."""
_BEFORE_MLP = ("pre_feedforward_layernorm", "ln_2", "post_attention_layernorm")


def site_states(
    lm: LanguageModel, inputs: dict[str, Tensor], positions: Sequence[int], rows: Sequence[int], site: str
) -> Tensor:
    """(rows, positions, d) states of one pass at a site of the blocks that rows of the residual stream come from.

    With h the state before a block, m the one between its parts and h' the one after it, ``attn_out = m - h`` and
    ``mlp_out = h' - m``: whatever norms and factors a family puts around its parts are in it.

    Args:
        lm: Its decoder is passed.
        inputs: Of its decoder.
        positions: Among the flattened states (batch * width, d).
        rows: Of the residual stream, not 0, which no block gives.
        site: One of ``SITES``.

    Raises:
        InputError: There is no such site, or the model's blocks run their parts side by side, so that nothing is
            between them.
    """
    check_site(site)
    if site == "resid":
        return states_at(lm, inputs, positions, rows)
    at = torch.tensor(positions, device=device_of(lm.model))
    kept: dict[tuple[int, str], Tensor] = {}

    def keep(row: int, name: str, states: Tensor) -> None:
        kept[row, name] = states.flatten(0, 1)[at].float().cpu()

    def before(row: int, name: str, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        keep(row, name, args[0] if args else kwargs["hidden_states"])

    handles = []
    for row in dict.fromkeys(rows):
        block = lm.blocks[layer_of(row)]
        handles += [
            block.register_forward_pre_hook(partial(before, row, "pre"), with_kwargs=True),
            _before_mlp(lm, block).register_forward_pre_hook(partial(before, row, "mid"), with_kwargs=True),
            block.register_forward_hook(lambda _, __, output, row=row: keep(row, "post", first_tensor(output))),
        ]
    with removing(handles), stopping_after(lm.blocks[layer_of(max(rows))]):
        lm.model.get_decoder()(**inputs, use_cache=False)
    pre, mid, post = (torch.stack([kept[row, name] for row in rows]) for name in ("pre", "mid", "post"))
    if torch.equal(pre, mid):
        raise InputError(
            f"site {site!r}: the blocks of {type(lm.model).__name__} run attention and MLP side by side; read resid"
        )
    return {"resid_mid": mid, "attn_out": mid - pre, "mlp_out": post - mid}[site]


def check_site(site: str) -> None:
    """Refuse a site that there is not.

    Raises:
        InputError: It is none of ``SITES``.
    """
    if site not in SITES:
        raise InputError(f"site {site!r}: unknown; choose one of {', '.join(SITES)}")


def _before_mlp(lm: LanguageModel, block: nn.Module) -> nn.Module:
    """The part of a block whose input is the state between attention and MLP."""
    names = ("mlp",) if _norms_after(block) else _BEFORE_MLP
    found = next((part for name in names if isinstance(part := getattr(block, name, None), nn.Module)), None)
    if found is None:
        raise InputError(
            f"model {type(lm.model).__name__}: no norm before the MLP named {' or '.join(names)}; read resid"
        )
    return found


def _norms_after(block: nn.Module) -> bool:
    """Whether norms stand behind the parts alone, as in OLMo 2: what the MLP is given is the state itself."""
    return hasattr(block, "post_feedforward_layernorm") and not hasattr(block, "pre_feedforward_layernorm")
