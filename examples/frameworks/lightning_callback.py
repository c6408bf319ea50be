"""Train a LightningModule sparse, and resume after an epoch to the same bits."""

import tempfile

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn

from srigl_core.integrations.lightning import SRigLCallback


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.1)]
        self.layers = nn.Sequential(*hidden, nn.Linear(256, 10)).double()

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.layers(batch[0] / 16), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(folder: str, resume: str | None = None) -> tuple[Digits, SRigLCallback]:
    tensors = map(torch.tensor, load_digits(return_X_y=True))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), 64, shuffle=True)
    srigl = SRigLCallback(sparsity=0.9, schedule=116, mode="condensed")
    callbacks = [srigl, ModelCheckpoint(folder, "{epoch}", save_top_k=-1)]
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=4, callbacks=callbacks, logger=False)
    trainer.fit(module := Digits(), data, ckpt_path=resume)
    return module, srigl


with tempfile.TemporaryDirectory() as folder:
    (module, callback), (resumed, _) = fit(folder), fit(folder, f"{folder}/epoch=1.ckpt")
assert all(map(torch.equal, module.parameters(), resumed.parameters()))
print(callback.srigl.report())
