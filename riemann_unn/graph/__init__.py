"""A model as torch.fx sees it, with the scalings that leave its function as it is.

Every channel of every activation lives in a *space*: channels whose scale must be the same, because
they are added, pooled together, or read by one shared weight, are in one space. A space is *fixed*
where something is not positively homogeneous; it can then say which node that is. Multiplying the
activations of the other spaces by positive numbers changes no output, provided that the weights
around them are scaled as :class:`Scaling` says.

``tracing`` turns a module into an fx graph, ``spaces`` keeps the union-find, ``rules`` and
``layers`` say what each operation does to spaces, ``propagate`` walks the graph, ``shapes`` guesses
an input where none is given, and ``model`` holds the result.
"""

from ..errors import GraphError
from .model import ModelGraph, Scaling, trace
from .walk import Layer

__all__ = ["GraphError", "Layer", "ModelGraph", "Scaling", "trace"]
