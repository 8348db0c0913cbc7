"""Trace estimators, one module per method.

Start with `_trace`, which chooses among them.
"""
