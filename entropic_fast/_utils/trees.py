"""Nested structures of tensors that share their first axis, the examples.

A tree is a tensor, or a dict, list, tuple, named tuple or dataclass of trees, as in
`torch.utils._pytree`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import (
    SUPPORTED_NODES,
    GetAttrKey,
    register_pytree_node,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

Tree: TypeAlias = Any


def leaves(tree: Tree) -> list[Tensor]:
    """The tensors of a tree, in a fixed order."""
    return [tree] if isinstance(tree, Tensor) else tree_leaves(tree)


def mapped(function: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """The tree with `function` of each tensor in its place."""
    return function(tree) if isinstance(tree, Tensor) else tree_map(function, tree)


def rebuilt(like: Tree, tensors: Sequence[Tensor]) -> Tree:
    """The tree of the same structure as `like` with other leaves."""
    return tree_unflatten(list(tensors), tree_flatten(like)[1])


def size(tree: Tree) -> int:
    """The length of the first axis."""
    return len(leaves(tree)[0])


def chosen(tree: Tree, index: Any) -> Tree:
    """The tree indexed along the first axis: by a slice, an integer or a tensor."""
    return mapped(lambda leaf: leaf[index], tree)


def joined(trees: Sequence[Tree]) -> Tree:
    """Trees of one structure, concatenated along the first axis."""
    if len(trees) == 1:
        return trees[0]
    rows = zip(*map(leaves, trees), strict=True)
    return rebuilt(trees[0], [torch.cat(row) for row in rows])


def form(tree: Tree) -> Hashable:
    """What a graph depends on of its inputs: structure, shapes, dtypes and devices."""
    if isinstance(tree, Tensor):
        return tree.shape, tree.dtype, tree.device
    flat, spec = tree_flatten(tree)
    return repr(spec), *((leaf.shape, leaf.dtype, leaf.device) for leaf in flat)


def example_form(tree: Tree) -> Hashable:
    """The structure, and the shape and dtype of a single example: trees alike can be joined."""
    flat, spec = tree_flatten(tree)
    return repr(spec), *((leaf.shape[1:], leaf.dtype) for leaf in flat)


def num_bytes(tree: Tree) -> int:
    """Bytes of all tensors."""
    return sum(leaf.nbytes for leaf in leaves(tree))


def registered(value: Tree) -> Tree:
    """`value`, after registering its dataclasses with `torch.utils._pytree`."""
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        names = [field.name for field in fields(kind) if field.init]
        if kind not in SUPPORTED_NODES:
            register_pytree_node(
                kind,
                lambda item: ([getattr(item, name) for name in names], None),
                lambda items, _: kind(**dict(zip(names, items, strict=True))),
                flatten_with_keys_fn=lambda item: (
                    [(GetAttrKey(name), getattr(item, name)) for name in names],
                    None,
                ),
                serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
            )
        for name in names:
            registered(getattr(value, name))
    elif isinstance(value, dict):
        for item in value.values():
            registered(item)
    elif isinstance(value, list | tuple):
        for item in value:
            registered(item)
    return value
