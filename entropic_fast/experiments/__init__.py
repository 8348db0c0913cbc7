"""The paper's experiments: presets, run folders, figures, claims and the report.

Start with `_pipeline`, which runs everything, and `figures/fig2`. `_sections` and `_config` are the
configuration, `_task_store` and `_run_folder` the files of a run, `_executor` runs its tasks.
Relies on `training`, `dynamics`, `paths` and `curvature` for all numbers.
"""

from . import figures  # noqa: F401 - the configuration has the sections of all figures
