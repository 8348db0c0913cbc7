"""Replicas of SGD (or Adam) projected onto a path: `relax` and `relax_many`.

Start with `_relax`; `_replica_state` is one projection cycle. Relies on `paths` and on the
kernels of `ops.projected_step`.
"""
