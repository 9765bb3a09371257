"""A 4-qubit Fourier transform out of two-qubit gates, found from random ones.

    python docs/examples/qft.py

Each gate is unitary, 4×4, on one of the pairs of qubits, which have two each. The loss is the
infidelity 1 - |tr(Fᴴ C)| / 16 of the circuit C, which leaves its global phase open.
"""

import math
from itertools import combinations

import torch
from torch import Tensor, nn

import riemann_unn as ru

QUBITS = 4
PAIRS = 2 * list(combinations(range(QUBITS), 2))


def fourier(n: int) -> Tensor:
    k = torch.arange(n, dtype=torch.float64)
    return torch.polar(torch.full((n, n), n**-0.5).double(), 2 * math.pi / n * torch.outer(k, k))


def circuit(gates: Tensor) -> Tensor:
    states = torch.eye(2**QUBITS, dtype=gates.dtype).reshape(*[2] * QUBITS, -1)
    for gate, pair in zip(gates, PAIRS, strict=True):
        gate = gate.reshape(2, 2, 2, 2)
        states = torch.tensordot(gate, states, dims=([2, 3], pair)).movedim((0, 1), pair)
    return states.reshape(2**QUBITS, -1)


def compile_from(seed: int, target: Tensor) -> float:
    generator = torch.Generator().manual_seed(seed)
    start = ru.Unitary().random(len(PAIRS), 4, 4, dtype=torch.complex128, generator=generator)
    gates = ru.tag_(nn.Parameter(start.as_subclass(Tensor)), ru.Unitary())
    optimizer = ru.optim.LBFGS([gates], max_iter=50)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 1 - (target.conj() * circuit(gates)).sum().abs() / 2**QUBITS
        loss.backward()
        return loss

    last, now = 2.0, 1.0
    while now > 1e-12 and now < 0.9 * last:
        last = float(optimizer.step(closure).detach())
        now = float(closure().detach())
    error = float(ru.orthogonality_error(gates).max())
    count = optimizer.state[gates]["func_evals"]
    print(f"start {seed}: infidelity {now:.1e} after {count} evaluations, error {error:.1e}")
    return now


if __name__ == "__main__":
    # Twelve gates are few, so some starts end at another minimum.
    for seed in range(10):
        if compile_from(seed, fourier(2**QUBITS)) < 1e-10:
            break
