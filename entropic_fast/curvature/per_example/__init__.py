"""Per-example gradients: the score matrix, norms, Gram matrices and spectra.

Start with `_scores`; `_engine` computes the gradients, `layer_rules` holds the closed forms.
docs/design/per_example.md explains how. Relies on `objective` and on the kernels of `ops`.
"""

from ._chunks import ExampleGradients

__all__ = ["ExampleGradients"]
