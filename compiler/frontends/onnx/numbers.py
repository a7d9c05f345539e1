"""Numbers of an ONNX graph that are known when compiling; their elements may be sizes of the IR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy

from ...ir.dims import size

MOST = 4096  # elements that are folded; more than that is data


@dataclass(frozen=True, eq=False)
class Numbers:
    """An array whose elements are integers, sizes, floats or truth values, with its dtype in programs."""

    array: np.ndarray
    dtype: str

    @staticmethod
    def of(values: Any, dtype: str) -> Numbers:
        """Return numbers from nested lists; integers become sizes."""
        array = np.array(values, dtype=object)
        if dtype.startswith(("i", "u")) and array.size:
            array = np.array([size(v) for v in array.ravel()], dtype=object).reshape(array.shape)
        return Numbers(array, dtype)

    @property
    def single(self) -> Any:
        """The only element; ValueError for several."""
        if self.array.size != 1:
            raise ValueError(f"{self.array.size} numbers where one is wanted")
        found = self.array.ravel()[0]
        return int(found) if isinstance(found, sympy.Integer) else found

    @property
    def sizes(self) -> list[Any]:
        """The elements of a list, plain integers as int."""
        return [int(v) if isinstance(v, sympy.Integer) else v for v in self.array.ravel()]

    @property
    def integers(self) -> list[int]:
        """The elements of a list as ints; ValueError for sizes that are not known when compiling."""
        if unknown := [v for v in self.sizes if not isinstance(v, int) or isinstance(v, bool)]:
            raise ValueError(f"{unknown[0]} where a number is wanted")
        return self.sizes
