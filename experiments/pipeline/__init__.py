"""The pipeline itself: what is stale, running it again, and comparing."""
