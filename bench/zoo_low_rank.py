"""Low rank on some models of the zoo: replaced layers, and errors of the function."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo_measure import built, change, outputs
from zoo_models import Entry

import riemann_unn as ru

__all__ = ["MODELS", "Thin", "thin"]

MODELS = (
    *("torchvision/resnet18", "torchvision/vgg11_bn", "torchvision/vit_b_16", "timm/resnet26d"),
    *("transformers/BertModel", "transformers/GPT2LMHeadModel", "transformers/LlamaForCausalLM"),
    *("transformers/OPTForCausalLM", "transformers/T5ForConditionalGeneration"),
    *("transformers/WhisperForConditionalGeneration", "transformers/ViTForImageClassification"),
)
EXAMPLES = 24
METHODS = ("spectral", "linear", "function")


@dataclass
class Thin:
    """The results of low_rank_ on one model.

    Attributes:
        name: source and name.
        replaced: how many layers.
        skipped: how many were not replaced, by the reason.
        activations: how many layers each follows.
        full: relative change of the outputs at full rank.
        held_out: mean of the layers' errors on held-out inputs, by method, at a quarter of the
            rank.
        outputs: relative error of the model's outputs on fresh inputs, by method.
        seconds: processor time by method.
        failed: why nothing was done.
    """

    name: str
    replaced: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    activations: dict[str, int] = field(default_factory=dict)
    full: float = float("nan")
    held_out: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failed: str = ""


def thin(entry: Entry) -> Thin:
    """Replace all layers of a model at full rank, and at a quarter of it by each method."""
    row = Thin(f"{entry.source}/{entry.name}")
    try:
        _measure(entry, row)
    except Exception as error:  # a row, not the end of the run
        row.failed = f"{type(error).__name__}: {error}"[:300]
    return row


def _measure(entry: Entry, row: Thin) -> None:
    model = built(entry).eval()
    data, fresh = entry.inputs(EXAMPLES), entry.inputs(4)
    before = outputs(entry, model, fresh, False)
    whole, options = copy.deepcopy(model), _options(entry)
    ru.init.low_rank_(
        whole,
        rank=1.0,
        only_if_smaller=False,
        method="spectral",
        inputs=_batch(fresh),
        progress=False,
        **options,
    )
    row.full = change(before, outputs(entry, whole, fresh, False))
    for method in METHODS:
        copied, start = copy.deepcopy(model), time.process_time()
        report = ru.init.low_rank_(
            copied, rank=0.25, method=method, calibration=_batch(data), progress=False, **options
        )
        row.seconds[method] = time.process_time() - start
        errors = [r.held_out[1] for r in report.values() if r.held_out is not None]
        row.held_out[method] = sum(errors) / max(len(errors), 1)
        row.outputs[method] = change(before, outputs(entry, copied, fresh, False))
        row.replaced = len(report)
        row.skipped = dict(Counter(reason.split(" ")[1] for reason in report.skipped.values()))
        row.activations = dict(Counter(r.activation for r in report.values()))


def _batch(inputs: Any) -> Any:
    return [inputs] if isinstance(inputs, Mapping) else inputs


def _options(entry: Entry) -> dict[str, Any]:
    return {} if entry.forward is None else {"forward": entry.forward}
