"""Stage page: the paper as a page to explore, and what a reviewer runs."""
