"""Measuring safety and utility: generation, judging, scoring and statistics, apart."""
