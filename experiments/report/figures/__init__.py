"""The paper's figures: a function each, marked ``draw.figure``; what they share is in ``draw``."""
