"""The report of a user's own model: `entropic-fast profile`.

Start with `profile_model`; `_tasks` holds what is computed. Relies on `experiments` for run
folders, scheduling and figures.
"""

from ._profile import ModelProfile, plan_profile, profile_model
from ._subject import ProfileSettings
from ._user_code import data_from, model_from
from ._weight_files import load_weights

__all__ = [
    "ModelProfile",
    "ProfileSettings",
    "data_from",
    "load_weights",
    "model_from",
    "plan_profile",
    "profile_model",
]
