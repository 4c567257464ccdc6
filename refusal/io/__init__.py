"""Errors, parameters, files and the resume store: what every other folder may use."""
