"""Stage conversations@model: what a model that follows instructions replies to short requests.

Stage tuning makes a base model follow instructions from these. Replies are greedy, so that they are the same every
time, and short.
"""

from pathlib import Path
from typing import Any

from classifier_emergence.reading.model import LanguageModel
from experiments.params import Params
from experiments.shared.conversations import Request, replies, requests
from experiments.shared.model import build
from experiments.shared.runs import Runs
from experiments.shared.stage import main
from experiments.shared.summaries import share_of


def run(params: Params, key: str) -> None:
    """Ask everything and write one result."""
    with Runs("conversations", key, params, build) as runs:
        parts = {
            part: runs.once(part, ask, requests(held_out=held_out), params)
            for part, held_out in (("train", False), ("test", True))
        }
        runs.finish({"model": key, **parts})


def ask(lm: LanguageModel, _: Path, asked: list[Request], params: Params) -> dict[str, Any]:
    """Requests, put as the model's own template has it, with its replies and how good they are."""
    prompts = [chat(lm, request.text) for request in asked]
    texts, ended = replies(lm, prompts, new_tokens=params.conversations.new_tokens)
    right = [request.answered_by(text) for request, text in zip(asked, texts, strict=True)]
    things = [request.thing for request in asked]
    return {
        "ended": share_of(ended, params.confidence, clusters=things),
        "right": share_of(right, params.confidence, clusters=things),
        "replies": [
            {"request": request.text, "reply": text, "ended": end, "right": ok}
            for request, text, end, ok in zip(asked, texts, ended, right, strict=True)
            if text
        ],
    }


def chat(lm: LanguageModel, text: str) -> str:
    """A request in the model's chat template; as it stands where there is none."""
    if lm.tokenizer.chat_template is None:
        return text
    message = [{"role": "user", "content": text}]
    return str(lm.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


if __name__ == "__main__":
    main(run, __doc__)
