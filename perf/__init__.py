"""Speed and memory, measured: `make perf`, or `python -m perf extraction` for one section. Results go to metrics/perf.json.

A section is a module with `run(console) -> dict`: it prints its table and returns its scalars. Times are medians of rounds
of all arms, one after another; a ratio is taken round by round. Tests check counts; nothing here asserts a time.
"""
