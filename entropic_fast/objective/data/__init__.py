"""The data of an Objective: trees of tensors, a Dataset or batches, read in one fixed order."""

from ._batch import Batch, WithTargets, batches_in_range, fingerprint
from ._batch_format import BatchFormat
from ._dataset import ExampleSet
from ._repeated_examples import RepeatedExamples

__all__ = [
    "Batch",
    "BatchFormat",
    "ExampleSet",
    "RepeatedExamples",
    "WithTargets",
    "batches_in_range",
    "fingerprint",
]
