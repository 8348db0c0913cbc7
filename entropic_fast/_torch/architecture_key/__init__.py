"""A key that models have in common only if they compute the same function of their tensors.

It covers everything that a forward pass may read: types and the code of their methods, attributes,
hooks, closures, module-level names, and by value each tensor not given from outside. A model with
anything unknown has no key and shares nothing.
"""

from ._walk import Key, key_of

__all__ = ["Key", "key_of"]
