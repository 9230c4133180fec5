"""Runnable companion of *Superficial Safety Alignment Hypothesis* (Li & Kim, ICLR 2026)."""
