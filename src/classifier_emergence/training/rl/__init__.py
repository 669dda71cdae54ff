"""Reinforcement learning on short answers (GRPO)."""
