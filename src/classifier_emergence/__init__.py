"""Instruments for vocabulary-aligned classifiers in language models, and the paper that uses them."""

__version__ = "0.1.0"
