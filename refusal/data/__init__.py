"""Prompt pairs and harmless prompts: made, read, split."""
