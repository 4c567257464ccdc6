"""Intervals, resampling and tests of differences."""
