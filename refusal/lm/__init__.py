"""A chat model: its architecture, its files, how it is loaded, checked and run in batches."""
