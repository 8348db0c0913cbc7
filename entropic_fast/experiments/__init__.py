"""The paper's experiments: presets, run folders, figures, claims and the report.

Start with `_pipeline`, which runs everything, and `figures/fig2`. `_sections` and `_config` are the
configuration, `_task_store` and `_run_folder` the files of a run, `_executor` runs its tasks.
Relies on `training`, `dynamics`, `paths` and `curvature` for all numbers.
"""

from . import claims, figures
from ._config import changed_values, load_preset, with_overrides
from ._executor import Task, TaskError, execute, limited_threads
from ._pipeline import choose_device
from ._run_folder import RunFolder
from ._sections import Config
from ._task_store import TaskStore

__all__ = [
    "Config",
    "RunFolder",
    "Task",
    "TaskError",
    "TaskStore",
    "changed_values",
    "choose_device",
    "claims",
    "execute",
    "figures",
    "limited_threads",
    "load_preset",
    "with_overrides",
]
