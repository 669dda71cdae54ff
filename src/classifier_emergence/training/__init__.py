"""Training with an objective on the lens, and what it did."""
