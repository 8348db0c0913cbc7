"""The report of a user's own model: `entropic-fast profile`.

Start with `profile_model`; `_tasks` holds what is computed. Relies on `experiments` for run
folders, scheduling and figures.
"""

from ._profile import ModelProfile, plan_profile, profile_model
from ._subject import ProfileSettings

__all__ = ["ModelProfile", "ProfileSettings", "plan_profile", "profile_model"]
