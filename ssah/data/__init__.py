"""Prompt and text sets: where they come from and how they are divided."""
