"""An ONNX graph as it is put together: nodes and constants, each named after what it gives. Knows no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper


class Graph:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, array: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def add(self, operator: str, inputs: list[str], output: str, *more: str, **attributes: Any) -> str:
        """Append a node; the name of its first output."""
        self.nodes.append(helper.make_node(operator, inputs, [output, *more], name=f"{output}.node", **attributes))
        return output

    def matmul(self, x: str, name: str, matrix: np.ndarray) -> str:
        """x @ matrix.T"""
        return self.add("MatMul", [x, self.constant(f"{name}.weight", matrix.T)], name)
