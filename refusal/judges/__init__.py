"""Judges of completions: compliance and coherence, each 0, 0.5 or 1."""
