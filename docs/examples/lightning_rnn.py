"""An orthogonal RNN in Lightning, with a schedule, clipping and a checkpoint.

pip install lightning
python docs/examples/lightning_rnn.py
"""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import riemann_unn as ru


class Recall(lightning.LightningModule):
    """Tell, after 60 steps of noise, which of four symbols came first."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = ru.nn.OrthogonalRNN(4, 32), nn.Linear(32, 4)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.rnn(x.movedim(0, 1))[1][-1]), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        groups = ru.param_groups(self, lr=3e-3, tagged_lr=1e-4)
        optimizer = ru.optim.ProjUNNT(groups, lr=3e-3, base=torch.optim.RMSprop)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def main(epochs: int = 8) -> None:
    torch.manual_seed(0)
    y = torch.randint(4, (1024,))
    x = 0.1 * torch.randn(len(y), 60, 4)
    x[:, 0] += nn.functional.one_hot(y, 4)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        gradient_clip_val=1.0,
        logger=False,
        callbacks=[ModelCheckpoint("checkpoints", save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Recall()
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
    print(f"loss {trainer.callback_metrics['loss']:.3f}")
    print(f"orthogonality error {max(e.max() for e in ru.orthogonality_error(model).values()):.0e}")


if __name__ == "__main__":
    main()
