"""Settings of torch, and workarounds for it.

Start with `full_precision`, which every exact quantity runs under. Relies on `_utils` alone.
"""
