"""Langevin simulations with all their settings in one dictionary."""

import dataclasses

from entropic_fast.dynamics import LangevinIntegrator, LangevinRecording, simulate_langevin

INTEGRATOR = [field.name for field in dataclasses.fields(LangevinIntegrator)]
RECORDING = {"record_every": "every", "observe": "observe"}


def simulate_with(potential, start, steps, **options):
    """`simulate_langevin` with the fields of its settings as keywords."""
    if "start_velocities" in options:
        start = (start, options.pop("start_velocities"))
    integrator = {name: options.pop(name) for name in INTEGRATOR if name in options}
    record = {RECORDING[name]: options.pop(name) for name in RECORDING if name in options}
    return simulate_langevin(
        potential,
        start,
        LangevinIntegrator(**integrator),
        steps,
        recording=LangevinRecording(**record),
        **options,
    )
