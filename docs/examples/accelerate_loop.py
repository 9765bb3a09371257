"""The loop of accelerate: model, optimizer and data are prepared, and the step stays as it is.

pip install accelerate
python docs/examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import riemann_unn as ru


def main(epochs: int = 5) -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    y = (x[:, :4] @ torch.randn(4, 3)).argmax(-1)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    model.append(nn.Linear(32, 3))
    ru.tag_(model, {"2.weight": ru.Orthogonal()})
    ru.init.warm_start_(model)
    optimizer = ru.optim.ProjUNNT(model.parameters(), lr=3e-3, rank=4, base=torch.optim.AdamW)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for epoch in range(epochs):
        for inputs, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")
    accelerator.save_state("saved")
    accelerator.load_state("saved")
    errors = ru.orthogonality_error(accelerator.unwrap_model(model))
    print(f"orthogonality error {max(e.max() for e in errors.values()):.0e}")


if __name__ == "__main__":
    main()
