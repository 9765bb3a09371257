"""A recurrent layer with orthogonal or unitary recurrences and the call signature of ``nn.RNN``."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

from ..manifolds import Orthogonal, Unitary, acceptance_level
from ..tagging import manifold_of, remember_tags_, tag_
from .activations import ModReLU
from .recurrence_init import RECURRENCES
from .scan import can_scan, scan_

__all__ = ["OrthogonalRNN"]

_NONLINEARITIES = ("modrelu", "tanh", "relu", "identity")


class OrthogonalRNN(nn.Module):
    r"""A drop-in for ``nn.RNN`` whose recurrent matrices are orthogonal, or unitary if complex.

    Each layer computes

    .. math:: h_t = \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1}), \qquad W_{hh}^H W_{hh} = I,

    so that with a modulus-preserving :math:`\sigma` neither the state nor its gradient vanishes or
    explodes however long the sequence. Each ``weight_hh_l{k}`` is tagged with ``Orthogonal()`` or
    ``Unitary()`` and initialised on it; an optimizer from ``riemann_unn.optim`` keeps it there.

    Parameters carry ``nn.RNN``'s names: ``weight_ih_l{k}``, ``weight_hh_l{k}`` and
    ``bias_ih_l{k}``. There is no ``bias_hh_l{k}``, since a second bias added to the first changes
    nothing. modReLU's own thresholds are ``activations.{k}.bias``. ``load_state_dict`` takes the
    state of an ``nn.RNN`` of the same sizes and adds its second biases to the first; its recurrent
    weights are seldom orthogonal, which gives a warning: :func:`riemann_unn.init.warm_start_` then
    replaces them by the nearest orthogonal ones.

    Shape:
        - ``input``: ``(L, input_size)``, ``(L, N, input_size)``, ``(N, L, input_size)`` with
          ``batch_first``, or a ``PackedSequence``. Real input to a complex layer is cast.
        - ``hx``: ``(num_layers, hidden_size)`` without a batch, else ``(num_layers, N,
          hidden_size)``; zeros if left out.
        - Returns ``(output, h_n)``, the top layer's states at every step, laid out like ``input``,
          and every layer's last state, laid out like ``hx``.

    Args:
        input_size: Number of input features.
        hidden_size: Number of state features, the size of each recurrent matrix.
        num_layers: Number of layers, each reading the one below.
        nonlinearity: ``"modrelu"``, ``"tanh"``, ``"relu"``, or ``"identity"`` (also ``None``). A
            complex layer takes ``"modrelu"`` or ``"identity"``.
        bias: Whether to add ``bias_ih_l{k}``.
        batch_first: Whether batched input and output are ``(N, L, features)``. Does not concern
            ``hx``.
        dropout: Probability of dropping a feature between two layers while training.
        init: Initial recurrence: ``"henaff"``, ``"cayley"``, ``"slow"``, ``"haar"`` or
            ``"identity"``; see ``riemann_unn.nn.recurrence_init``.
        device: Where to create the parameters.
        dtype: Their type; a complex one makes the layer unitary.

    Raises:
        ValueError: If an argument is out of range, or the shape or dtype of an input does not fit.

    References:
        Arjovsky, Shah, Bengio, "Unitary Evolution Recurrent Neural Networks", ICML 2016.
        Kiani, Balestriero, LeCun, Lloyd, "projUNN: efficient method for training deep networks with
        unitary matrices", NeurIPS 2022, experiments with RNNs.
    """

    is_recurrent = True  # initializers treat it as one layer, not step by step

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str | None = "modrelu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        *,
        init: str = "henaff",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        nonlinearity = "identity" if nonlinearity is None else nonlinearity
        for name, size in (
            ("input_size", input_size),
            ("hidden_size", hidden_size),
            ("num_layers", num_layers),
        ):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if not (dtype.is_floating_point or dtype.is_complex):
            raise ValueError(f"OrthogonalRNN needs a floating or complex dtype, got {dtype}")
        if nonlinearity not in _NONLINEARITIES:
            raise ValueError(
                f"unknown nonlinearity {nonlinearity!r}: choose from {_NONLINEARITIES}"
            )
        if dtype.is_complex and nonlinearity in ("tanh", "relu"):
            raise ValueError(
                f"{nonlinearity!r} does not bound or keep the modulus of {dtype} states: "
                "use 'modrelu' or 'identity', or a real dtype"
            )
        if init not in RECURRENCES:
            raise ValueError(f"unknown init {init!r}: choose from {tuple(RECURRENCES)}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout is a probability, in [0, 1], got {dropout}")
        if dropout > 0.0 and num_layers == 1:
            warnings.warn(
                f"{dropout=} has no effect with num_layers=1: it acts between layers", stacklevel=2
            )

        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.nonlinearity = nonlinearity
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = dropout
        self.init = init

        def empty(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*size, device=device, dtype=dtype))

        for layer in range(num_layers):
            width = input_size if layer == 0 else hidden_size
            self.register_parameter(f"weight_ih_l{layer}", empty(hidden_size, width))
            self.register_parameter(f"weight_hh_l{layer}", empty(hidden_size, hidden_size))
            self.register_parameter(f"bias_ih_l{layer}", empty(hidden_size) if bias else None)
        modules: list[nn.Module] = []
        for _ in range(num_layers):
            if nonlinearity == "modrelu":
                modules.append(ModReLU(hidden_size, dtype=dtype, device=device))
            else:
                plain = {"tanh": nn.Tanh, "relu": nn.ReLU, "identity": nn.Identity}
                modules.append(plain[nonlinearity]())
        self.activations = nn.ModuleList(modules)

        self.reset_parameters()
        manifold = Unitary if dtype.is_complex else Orthogonal
        for layer in range(num_layers):
            tag_(self.get_parameter(f"weight_hh_l{layer}"), manifold())
        remember_tags_(self)

    def reset_parameters(self) -> None:
        """Draw every parameter again, from torch's global generator.

        ``weight_hh`` from the ``init`` family, ``weight_ih`` and ``bias_ih`` from U(-a, a) with
        ``a = 1/sqrt(hidden_size)`` as in ``nn.RNN``, modReLU's thresholds from U(-0.01, 0.01).
        """
        with torch.no_grad():
            for layer in range(self.num_layers):
                for kind in ("weight_ih", "weight_hh", "bias_ih"):
                    self._reset(f"{kind}_l{layer}")
            for activation in self.activations:
                if isinstance(activation, ModReLU):
                    activation.reset_parameters()

    def _reset(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        parameter = self._parameters.get(name)
        new = torch.empty_like(value) if parameter is None else parameter
        if name.startswith("weight_hh"):
            new.copy_(RECURRENCES[self.init](self.hidden_size, value.dtype, value.device))
        else:
            spread = 1.0 / math.sqrt(self.hidden_size)
            real = torch.view_as_real(new) if new.is_complex() else new
            real.uniform_(-spread, spread)
        if parameter is None:
            setattr(self, name, new)  # a parametrization sets its originals from it

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        is_other = self.translate_state_(state_dict, prefix)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if not is_other:
            return
        if self.nonlinearity == "modrelu":
            warnings.warn(
                "the state is one of torch.nn.RNN, which has no modReLU: create the layer with its "
                'nonlinearity, "tanh" or "relu", or load with strict=False, which keeps the '
                "thresholds that the layer has",
                UserWarning,
                stacklevel=4,
            )
        self._warn_of_weights()

    def translate_state_(self, state_dict: dict[str, Tensor], prefix: str = "") -> bool:
        """Add the second biases in a state of ``nn.RNN`` to its first ones, in the dict.

        Args:
            state_dict: a state, changed in place.
            prefix: the prefix of the layer's names.

        Returns:
            Whether there were any.
        """
        found = False
        for layer in range(self.num_layers if self.bias else 0):
            first, second = (f"{prefix}bias_{kind}_l{layer}" for kind in ("ih", "hh"))
            if first in state_dict and second in state_dict:
                state_dict[first] = state_dict[first] + state_dict.pop(second)
                found = True
        return found

    def _warn_of_weights(self) -> None:
        """Warn of recurrent weights off their manifold."""
        off = []
        for name, p in self.named_parameters(recurse=False):
            manifold = None if p.is_meta else manifold_of(p)
            if manifold is not None and not hasattr(p, "device_mesh"):
                error = manifold.estimated_error(p)
                if not error <= acceptance_level(p.dtype):
                    off.append(f"{name} is {error:.1e} off {manifold!r}")
        if off:
            warnings.warn(
                f"{'; '.join(off)}, as loaded; call riemann_unn.init.warm_start_ on the layer for "
                "the nearest weights that are on it, before an optimizer is given them",
                UserWarning,
                stacklevel=5,
            )

    @overload
    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Run over a sequence.

        Args:
            input: The sequence, batched, unbatched or packed.
            hx: First state of every layer; zeros if left out.

        Raises:
            ValueError: If a shape or dtype does not fit.
        """
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"input must have 2 (unbatched) or 3 dimensions, got {input.shape=}")
        batched = input.dim() == 3
        if not batched:
            sequence = input.unsqueeze(1)
        else:
            sequence = input.transpose(0, 1) if self.batch_first else input
        length, batch = sequence.shape[:2]
        if length == 0:
            raise ValueError(f"the sequence has no steps, got {input.shape=}")
        state = self._first_state(hx, batch, batched=batched, device=input.device)
        # All steps in one matrix, so that their inputs are projected by one product.
        flat, last = self._run(sequence.reshape(length * batch, -1), state, [batch] * length)
        output = flat.view(length, batch, self.hidden_size)
        if not batched:
            return output.squeeze(1), last.squeeze(1)
        return (output.transpose(0, 1) if self.batch_first else output), last

    def _forward_packed(
        self, packed: PackedSequence, hx: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        sizes: list[int] = packed.batch_sizes.tolist()
        state = self._first_state(hx, sizes[0], batched=True, device=packed.data.device)
        order, undo = packed.sorted_indices, packed.unsorted_indices
        if order is not None:
            state = state.index_select(1, order)
        data, last = self._run(packed.data, state, sizes)
        if undo is not None:
            last = last.index_select(1, undo)
        return PackedSequence(data, packed.batch_sizes, order, undo), last

    def _first_state(
        self, hx: Tensor | None, batch: int, *, batched: bool, device: torch.device
    ) -> Tensor:
        """The first state as ``(num_layers, batch, hidden_size)``, checked."""
        shape = (self.num_layers, batch, self.hidden_size)
        dtype = self._weight("hh", 0).dtype
        if hx is None:
            return torch.zeros(shape, dtype=dtype, device=device)
        expected = shape if batched else (self.num_layers, self.hidden_size)
        if tuple(hx.shape) != expected:
            raise ValueError(f"hx must have shape {expected} for this input, got {hx.shape=}")
        return self._cast(hx, "hx").view(shape)

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        """Real to complex where the layer is complex; any other mismatch is an error."""
        dtype = self._weight("hh", 0).dtype
        if tensor.is_complex() and not dtype.is_complex:
            raise ValueError(
                f"{name} is {tensor.dtype} but the layer is {dtype}: "
                "build it with a complex dtype, or pass real and imaginary parts as features"
            )
        return tensor.to(dtype) if dtype.is_complex else tensor

    def _run(self, data: Tensor, state: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        """Run all layers over concatenated steps of ``sizes[t]`` rows, not increasing."""
        if data.shape[-1] != self.input_size:
            raise ValueError(
                f"input must have {self.input_size} features in its last dimension, "
                f"got {data.shape[-1]}"
            )
        data = self._cast(data, "input")
        last = []
        for layer, first in enumerate(state.unbind(0)):
            if layer > 0:
                data = self._drop(data)
            data, final = self._run_layer(layer, data, first, sizes)
            last.append(final)
        return data, torch.stack(last)

    def _run_layer(
        self, layer: int, data: Tensor, hidden: Tensor, sizes: list[int]
    ) -> tuple[Tensor, Tensor]:
        bias = cast("Tensor | None", getattr(self, f"bias_ih_l{layer}"))
        projected = functional.linear(data, self._weight("ih", layer), bias)
        weight, activation = self._weight("hh", layer), self.activations[layer]
        batch = hidden.shape[0]  # not its len, which would be constant in an exported program
        if sizes[-1] == batch and can_scan(projected, hidden, weight, activation):
            outputs = scan_(projected, hidden, weight, activation)
            return outputs, outputs[-batch:]
        return self._loop(projected, hidden, sizes, weight, activation)

    def _weight(self, kind: str, layer: int) -> Tensor:
        # No get_parameter: a parametrization or functional_call puts a plain tensor there.
        return cast(Tensor, getattr(self, f"weight_{kind}_l{layer}"))

    @staticmethod
    def _loop(
        projected: Tensor,
        hidden: Tensor,
        sizes: list[int],
        weight: Tensor,
        activation: nn.Module,
    ) -> tuple[Tensor, Tensor]:
        # States are rows, so W h is written h W^T, which is no adjoint.
        recurrence = weight.t()
        outputs: list[Tensor] = []
        ended: list[Tensor] = []
        for drive in projected.split(sizes):
            rows = drive.shape[0]
            if rows < hidden.shape[0]:
                ended.append(hidden[rows:])
                hidden = hidden[:rows]
            hidden = activation(torch.addmm(drive, hidden, recurrence))
            outputs.append(hidden)
        # The shortest sequences are last in the batch and end first.
        return torch.cat(outputs), torch.cat([hidden, *reversed(ended)])

    def _drop(self, data: Tensor) -> Tensor:
        if not data.is_complex():
            return functional.dropout(data, self.dropout, self.training)
        # Dropout has no complex kernel; a real mask also keeps real and imaginary parts together.
        return data * functional.dropout(torch.ones_like(data.real), self.dropout, self.training)

    def extra_repr(self) -> str:
        """Show the sizes and every setting that is not the default."""
        dtype = self._weight("hh", 0).dtype
        parts = [f"{self.input_size}, {self.hidden_size}"]
        settings = {
            "num_layers": (self.num_layers, 1),
            "nonlinearity": (self.nonlinearity, "modrelu"),
            "bias": (self.bias, True),
            "batch_first": (self.batch_first, False),
            "dropout": (self.dropout, 0.0),
            "init": (self.init, "henaff"),
            "dtype": (dtype, torch.float32),
        }
        parts += [f"{key}={value!r}" for key, (value, usual) in settings.items() if value != usual]
        return ", ".join(parts)
