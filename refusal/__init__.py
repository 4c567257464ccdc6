"""Refusal as a direction in a chat model's residual stream: the library behind the pipeline.

Tensors and values in, tensors and values out; no path of the pipeline is known here.
"""
