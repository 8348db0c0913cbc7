"""Losses per example: by name, from `torch.nn`, or the user's own.

Start with `_functions`. Closed forms of derivatives are in `_cross_entropy` and `_elementwise`.
"""
