"""The report of a user's own model: `entropic-fast profile`.

Start with `_profile`; `_tasks` holds what is computed. Relies on `experiments` for run folders,
scheduling and figures.
"""
