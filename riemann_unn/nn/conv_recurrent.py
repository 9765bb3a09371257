"""A recurrent layer with a state on a periodic lattice and a unitary convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..linalg.conv.algebra import frequencies, sites
from ..manifolds import OrthogonalConv, UnitaryConv
from ..tagging import remember_tags_, tag_
from .activations import ModReLU, PhaseSigmoid
from .conv import KernelInit, check_dtype, init_kernel_, lattice

__all__ = ["ConvRNN"]

_NONLINEARITIES = ("modrelu", "phase_sigmoid", "identity")


class ConvRNN(nn.Module):
    r"""A recurrent network on a torus: the state is an image, the recurrence a unitary convolution.

    .. math:: z_t = \varphi(K * z_{t-1} + V x_t + b), \qquad K^H * K = \delta

    with a kernel K as large as the lattice, the same V at every site, and a φ that acts on the
    modulus and keeps the phase. So the state neither explodes nor vanishes over any number of
    steps. ``kernel`` is tagged with ``OrthogonalConv(ndim)`` or ``UnitaryConv(ndim)``; an optimizer
    from ``riemann_unn.optim`` keeps it there.

    Shape:
        - ``input``: ``(L, N, in_channels, *size)``, ``(N, L, in_channels, *size)`` with
          ``batch_first``, or ``(L, in_channels, *size)``. Real input to a complex layer is cast.
        - ``hx``: ``(N, channels, *size)``, or ``(channels, *size)`` without a batch; zeros if left
          out.
        - Returns ``(output, h_n)``: all states, laid out like ``input``, and the last one.

    Args:
        in_channels: channels of the input.
        channels: channels of the state.
        size: of the lattice, an integer (one dimension) or one for each dimension.
        nonlinearity: ``"modrelu"``, ``"phase_sigmoid"`` or ``"identity"`` (also ``None``).
        bias: whether to add b.
        batch_first: whether batched input and output have the batch first. Does not concern ``hx``.
        init: first kernel, ``"local"``, ``"haar"`` or ``"identity"``, as in
            :class:`CircularConv2d`.
        device: where to create the parameters.
        dtype: their type; a complex one makes the kernel unitary.

    Raises:
        ValueError: an argument is out of range, or the shape or dtype of an input does not fit.

    Reference:
        Magnasco, "Convolutional unitary or orthogonal recurrent neural networks" (2023).
    """

    is_recurrent = True  # initializers treat it as one layer, not step by step

    def __init__(
        self,
        in_channels: int,
        channels: int,
        size: int | tuple[int, ...],
        nonlinearity: str | None = "modrelu",
        bias: bool = True,
        batch_first: bool = False,
        *,
        init: KernelInit = "local",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dtype = check_dtype(dtype, "ConvRNN")
        nonlinearity = "identity" if nonlinearity is None else nonlinearity
        if nonlinearity not in _NONLINEARITIES:
            raise ValueError(f"{nonlinearity=} is unknown; choose from {_NONLINEARITIES}")
        if init not in ("local", "haar", "identity"):
            raise ValueError(f"{init=} is unknown; choose 'local', 'haar' or 'identity'")
        for name, count in (("in_channels", in_channels), ("channels", channels)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.size = lattice(size, 1 if isinstance(size, int) else len(size))
        if not self.size:
            raise ValueError(f"{size=} must have at least one dimension")
        self.in_channels, self.channels = in_channels, channels
        self.nonlinearity, self.batch_first, self.init = nonlinearity, batch_first, init
        factory = {"device": device, "dtype": dtype}
        self.kernel = nn.Parameter(torch.empty(channels, channels, *self.size, **factory))  # type: ignore[arg-type]
        self.weight_ih = nn.Parameter(torch.empty(channels, in_channels, **factory))  # type: ignore[arg-type]
        if bias:
            self.bias: nn.Parameter | None = nn.Parameter(torch.empty(channels, **factory))  # type: ignore[arg-type]
        else:
            self.register_parameter("bias", None)
        self.activation: nn.Module = nn.Identity()
        if nonlinearity == "modrelu":
            self.activation = ModReLU(channels, dtype=dtype, device=device)
        elif nonlinearity == "phase_sigmoid":
            self.activation = PhaseSigmoid()
        self.reset_parameters()
        manifold = UnitaryConv if dtype.is_complex else OrthogonalConv
        tag_(self.kernel, manifold(len(self.size)))
        remember_tags_(self)

    def reset_parameters(self) -> None:
        """Draw every parameter again, from torch's global generator.

        The kernel by ``init``, ``weight_ih`` uniform with the variance of ``nn.Linear``,
        the bias zero, modReLU's thresholds from U(-0.01, 0.01).
        """
        init_kernel_(self.kernel, ndim=len(self.size), init=self.init)
        with torch.no_grad():
            weight = self.weight_ih
            real = torch.view_as_real(weight) if weight.is_complex() else weight
            real.uniform_(-1 / math.sqrt(self.in_channels), 1 / math.sqrt(self.in_channels))
            if self.bias is not None:
                self.bias.zero_()
        if isinstance(self.activation, ModReLU):
            self.activation.reset_parameters()

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run over a sequence of signals.

        Args:
            input: the sequence, batched or not.
            hx: first state; zeros if left out.

        Raises:
            ValueError: a shape or dtype does not fit.
        """
        ndim = len(self.size)
        expected = (self.in_channels, *self.size)
        if input.ndim not in (ndim + 2, ndim + 3) or tuple(input.shape[-ndim - 1 :]) != expected:
            layout = "N, L" if self.batch_first else "L, N"
            raise ValueError(
                f"ConvRNN takes input ({layout}, {', '.join(map(str, expected))}), with or "
                f"without N, got {tuple(input.shape)}"
            )
        batched = input.ndim == ndim + 3
        x = self._cast(input, "input")
        x = x.unsqueeze(1) if not batched else x.transpose(0, 1) if self.batch_first else x
        if len(x) == 0:
            raise ValueError(f"the sequence has no steps, got {input.shape=}")
        drive = torch.einsum("oi,lni...->lno...", self.weight_ih, x)
        output, last = self._run(list(drive.unbind(0)), self._first(hx, x.shape[1], batched))
        if not batched:
            return output.squeeze(1), last.squeeze(0)
        return (output.transpose(0, 1) if self.batch_first else output), last

    def evolve(self, hx: Tensor, *, steps: int) -> Tensor:
        """Iterate the recurrence without input.

        Args:
            hx: the state, ``(N, channels, *size)`` or ``(channels, *size)``.
            steps: the number of states to return.

        Returns:
            The states, ``(steps, N, channels, *size)``, without N if ``hx`` has none.

        Raises:
            ValueError: the shape or dtype does not fit, or ``steps`` is below 1.
        """
        if steps < 1:
            raise ValueError(f"{steps=} must be at least 1")
        batched = hx.ndim == len(self.size) + 2
        first = self._first(hx, len(hx) if batched else 1, batched)
        output, _ = self._run([None] * steps, first)
        return output if batched else output.squeeze(1)

    def _first(self, hx: Tensor | None, batch: int, batched: bool) -> Tensor:
        shape = (batch, self.channels, *self.size)
        if hx is None:
            return self.kernel.new_zeros(shape)
        expected = shape if batched else shape[1:]
        if tuple(hx.shape) != expected:
            raise ValueError(f"hx must have shape {expected}, got {tuple(hx.shape)}")
        return self._cast(hx, "hx").reshape(shape)

    def _cast(self, tensor: Tensor, name: str) -> Tensor:
        dtype = self.kernel.dtype
        if tensor.is_complex() and not dtype.is_complex:
            raise ValueError(
                f"{name} is {tensor.dtype} but the layer is {dtype}: build it with a complex "
                "dtype, or pass real and imaginary parts as channels"
            )
        return tensor.to(dtype)

    def _run(self, drives: list[Tensor] | list[None], state: Tensor) -> tuple[Tensor, Tensor]:
        # The kernel is transformed once for the whole sequence.
        operator = frequencies(self.kernel, len(self.size))
        bias = None if self.bias is None else self.bias.reshape(-1, *(1,) * len(self.size))
        states = []
        for drive in drives:
            state = self._convolve(operator, state)
            state = state if drive is None else state + drive
            state = self._activate(state if bias is None else state + bias)
            states.append(state)
        return torch.stack(states), state

    def _convolve(self, operator: Tensor, state: Tensor) -> Tensor:
        hat = operator @ frequencies(state, len(self.size)).mT
        new = sites(hat.mT, self.size, real=not state.is_complex())
        return new.to(state.dtype)

    def _activate(self, state: Tensor) -> Tensor:
        if not isinstance(self.activation, ModReLU):
            result: Tensor = self.activation(state)
            return result
        # modReLU has a threshold for each entry of the last dimension.
        channels_last: Tensor = self.activation(state.movedim(1, -1))
        return channels_last.movedim(-1, 1)

    def extra_repr(self) -> str:
        """Show the sizes and every setting that is not the default."""
        parts = [f"{self.in_channels}, {self.channels}, size={self.size}"]
        settings = {
            "nonlinearity": (self.nonlinearity, "modrelu"),
            "bias": (self.bias is not None, True),
            "batch_first": (self.batch_first, False),
            "init": (self.init, "local"),
            "dtype": (self.kernel.dtype, torch.float32),
        }
        parts += [f"{key}={value!r}" for key, (value, usual) in settings.items() if value != usual]
        return ", ".join(parts)
