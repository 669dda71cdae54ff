"""The paper's instruments on anyone's model, prompts and words: each gives a frozen reading."""
