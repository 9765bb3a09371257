"""The authors' own path conditioning, from the checkout that PATHCOND_REFERENCE points to."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import nn

__all__ = ["is_there", "rescale_"]

_VARIABLE = "PATHCOND_REFERENCE"


def is_there() -> bool:
    """Whether the variable points to a checkout."""
    folder = os.environ.get(_VARIABLE)
    return folder is not None and (Path(folder) / "pathcond" / "rescaling_polyn.py").is_file()


def rescale_(model: nn.Module) -> None:
    """Rescale a model in place as their quick start does: ten sweeps, tolerance 0.01."""
    code = _code()
    factors, _ = code.optimize_rescaling_polynomial(model, n_iter=10, tol=1e-2)
    code.reweight_model_inplace(model, factors)
    model.train()


def _code() -> Any:
    name = "pathcond.rescaling_polyn"
    if name not in sys.modules:
        sys.path.append(os.environ[_VARIABLE])
        if find_spec("torchvision") is not None:
            return import_module(name)
        with patch.dict(sys.modules):
            _stand_in()
            code = import_module(name)
        sys.modules[name] = code
    return sys.modules[name]


def _stand_in() -> None:
    """An empty torchvision: their module only looks whether parts are residual blocks of it."""
    names = ("torchvision", "torchvision.models", "torchvision.models.resnet")
    made: dict[str, Any] = {name: ModuleType(name) for name in names}
    made["torchvision.models.resnet"].BasicBlock = type("BasicBlock", (nn.Module,), {})
    made["torchvision"].models = made["torchvision.models"]
    sys.modules.update(made)
