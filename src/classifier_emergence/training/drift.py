"""Whether training left a language model behind: what it says on neutral text, against what it said before."""

import torch
from peft import PeftModel

from classifier_emergence.reading.model import LanguageModel

LARGE = 2.0
"""Nats a token from which on a model says something else. Random guesses are ``ln(vocabulary)`` from certainty, about
11; what training on a narrow task does to other text is below 1."""
TEXTS = (
    "The river rises in the hills and runs south through two small towns before it reaches the sea.",
    "She put the letter on the table, opened the window and waited for the rain to stop.",
    "Most of the members agreed that the meeting should begin an hour later in winter.",
    "Bread is made of flour, water, salt and yeast; it has to rest before it is baked.",
)


@torch.no_grad()
def drift(lm: LanguageModel, wrapped: PeftModel) -> float:
    """Mean over the tokens of ``TEXTS`` of KL(without the adapter || with it) of the next token, in nats.

    Infinite or NaN where the model with its adapter gives no finite numbers.

    Args:
        lm: The model.
        wrapped: It with its adapter.

    Example:
        >>> with adapted(lm, Adapter(VO, 16, 2.0, (0, 1)), seed=0) as wrapped:
        ...     drift(lm, wrapped)
        0.0
    """
    total, count = 0.0, 0
    for text in TEXTS:
        ids = lm.tokenizer(text, return_tensors="pt")["input_ids"].to(lm.model.device)
        after = lm.model(input_ids=ids).logits[0].float().log_softmax(-1)
        with wrapped.disable_adapter():
            before = lm.model(input_ids=ids).logits[0].float().log_softmax(-1)
        total += float((before.exp() * (before - after)).sum())
        count += len(before)
    return total / count
