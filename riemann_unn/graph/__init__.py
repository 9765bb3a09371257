"""What a model computes, with the scalings that leave its function as it is.

Every channel of every activation lives in a *space*: channels whose scale must be the same, because
they are added, pooled together, or read by one shared weight, are in one space. A space is *closed*
where something is not positively homogeneous; it can then say which operation that is. Multiplying
the activations of the other spaces by positive numbers changes no output, provided that the weights
around them are scaled as :class:`Scaling` says.

``program`` reads a module as ATen operations by ``torch.export``, with ``closed`` for parts that
cannot be read; ``spaces`` keeps the union-find; ``rules``, ``contractions`` and ``layers`` say what
each operation does to spaces, one rule in one place; ``walk`` goes through the graph, ``writes``
follows operations in place; ``regions`` and ``lifting`` see its homogeneous parts as ReLU networks;
``guess`` finds an input where none is given, and ``model`` holds the result.
"""

from ..errors import GraphError
from .model import ModelGraph, Scaling, trace
from .walk import Layer

__all__ = ["GraphError", "Layer", "ModelGraph", "Scaling", "trace"]
