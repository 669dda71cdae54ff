"""Prompts whose class is known, problems with answers, and sound splits of both."""
