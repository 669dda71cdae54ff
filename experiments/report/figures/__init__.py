"""The paper's figures: a function each, listed with its stages in ``__main__``; what they share is in ``drawing``."""
