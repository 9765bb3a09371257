"""The operations of a model, and the scalings that preserve its function.

Every channel of every activation belongs to a *space*: channels whose scale must be the same,
because they are added, pooled together, or read by one shared weight, are in one space. A space is
*closed* if an operation on it is not positively homogeneous; its scale stays one, and the operation
is recorded as the reason. Submodules that cannot be read as operations are *opaque*. Multiplying
the activations of the other spaces by positive numbers changes no output, provided that the weights
around them are scaled as :class:`Scaling` says.

``program`` reads a module as ATen operations by ``torch.export``, with ``opaque_modules`` for parts
that cannot be read; ``spaces`` keeps the union-find; ``rules``, ``contractions`` and ``layers``
hold the rule of each operation; ``walk`` applies them to the graph, ``writes`` follows operations
in place; ``regions`` and ``lifting`` treat its homogeneous parts as ReLU networks;
``inferred_input`` finds an input where none is given, and ``model`` holds the result.
"""

from ..errors import GraphError
from .model import ModelGraph, Scaling, trace
from .walk import Layer

__all__ = ["GraphError", "Layer", "ModelGraph", "Scaling", "trace"]
