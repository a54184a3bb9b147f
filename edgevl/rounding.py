"""Which activations of a recorded graph are kept in int8: those that nobody but linears of int8 or int4 weights reads.

Linears round what they read to int8, with a scale for each group of columns. Where all readers of a buffer want the
same groups, the op that writes it leaves the codes at once. Knows which ops finish whole groups at a time; called by
`edgevl.memory`, whose plan tells the backend.
"""

from __future__ import annotations

from collections.abc import Callable

from edgevl.config import TextConfig
from edgevl.recorder import Graph, Node

GroupSize = Callable[[str], int]  # weight name -> activations that it takes by one scale; 0 for kinds that round none


def _piece(node: Node, group: int, text: TextConfig | None) -> int:
    """Columns of its output that the op finishes together; 0 for an op that rounds none."""
    if node.op in ("rms_norm", "layer_norm", "silu_mul"):
        return -(-node.output.cols // group) * group  # a whole row, whose last group may be short
    if node.op == "attention" and text is not None:
        return text.head_dim
    if node.op == "full_attention":
        return node.output.cols // int(node.attrs["heads"])
    return 0


def rounded(graph: Graph, text: TextConfig | None, group_size: GroupSize) -> dict[int, int]:
    """Buffer index -> columns of a group, for the buffers of `graph` that are kept in int8."""
    wanted: dict[int, set[int]] = {}
    for node in graph.nodes:
        for place, buffer in enumerate(node.inputs):
            by_linear = node.op == "linear" and place == 0
            wanted.setdefault(buffer.index, set()).add(group_size(node.weights[0].name) if by_linear else 0)
    groups = {}
    for node in graph.nodes:
        readers = wanted.get(node.output.index, {0})
        group = max(readers)
        if len(readers) > 1 or group == 0 or node.output == graph.output:
            continue
        piece = _piece(node, group, text)
        if piece and piece % group == 0:
            groups[node.output.index] = group
    return groups
