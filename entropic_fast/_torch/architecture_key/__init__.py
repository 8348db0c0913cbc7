"""A key that models have in common only if they compute the same function of their tensors.

It is made of everything that a forward pass may read: types and the code of their methods,
attributes, hooks, closures, module-level names, and by value each tensor that is not given from
outside. Whatever is not understood gives no key, and the model then shares nothing.
"""

from ._walk import Key, key_of

__all__ = ["Key", "key_of"]
