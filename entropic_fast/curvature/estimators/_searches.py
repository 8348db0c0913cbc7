"""Searches that ask for products instead of computing them, so that several can share each call."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from ..operators._algebra import OperatorBase, multiply

T = TypeVar("T")
# Yields vectors [P, K] to multiply, and whether to look for values that are not finite.
Search: TypeAlias = Generator[tuple[Tensor, bool], Tensor, T]


def run(operator: OperatorBase, search: Search[T]) -> T:
    """The result of a search, by products with one operator."""
    try:
        vectors, check = next(search)
        while True:
            vectors, check = search.send(multiply(operator, vectors, check))
    except StopIteration as end:
        result: T = end.value
        return result


def run_blocks(
    operator: OperatorBase, searches: Sequence[Search[T]], places: Sequence[Tensor], width: int
) -> list[T]:
    """The results of searches in diagonal blocks of one operator, with columns of several at once.

    A vector of a block is zero elsewhere, and of its product only the block's entries count.
    `places` are the entries of each block, ascending; `width` is the most columns of a product.
    """
    results: dict[int, T] = {}
    waiting: dict[int, tuple[Tensor, bool]] = {}

    def advance(i: int, product: Tensor | None) -> None:
        try:
            waiting[i] = next(searches[i]) if product is None else searches[i].send(product)
        except StopIteration as end:
            results[i] = end.value
            waiting.pop(i, None)

    for i in range(len(searches)):
        advance(i, None)
    while waiting:
        # Columns of all blocks in a row, and cut into products of `width`.
        asked = dict(waiting)
        columns = [(i, j) for i, (vectors, _) in asked.items() for j in range(vectors.shape[1])]
        products = {i: torch.empty_like(vectors) for i, (vectors, _) in asked.items()}
        check = any(check for _, check in asked.values())
        for start in range(0, len(columns), width):
            chosen = columns[start : start + width]
            first = asked[chosen[0][0]][0]
            block = first.new_zeros(operator.order, len(chosen))
            for column, (i, j) in enumerate(chosen):
                block[places[i], column] = asked[i][0][:, j]
            product = multiply(operator, block, check)
            for column, (i, j) in enumerate(chosen):
                products[i][:, j] = product[places[i], column]
        for i, product in products.items():
            advance(i, product)
    return [results[i] for i in range(len(searches))]
