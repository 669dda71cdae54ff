"""Mixtures of experts: routers against the vocabulary, routing in use, upcycling."""
