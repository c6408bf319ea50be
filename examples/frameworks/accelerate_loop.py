"""Train sparse in a loop of accelerate, and resume in the middle to the same bits."""

import tempfile

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn

from srigl_core.torch import SRigL


def train(folder: str, first: int) -> tuple[nn.Module, SRigL]:
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    srigl = SRigL(model, optimizer, sparsity=0.9, schedule=100, mode="condensed")
    accelerator.register_for_checkpointing(srigl)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(first, 100):
        if step == 42:
            (accelerator.load_state if first else accelerator.save_state)(folder)
        for rows in torch.randint(len(x), (2, 64)):
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x[rows] / 16), y[rows]))
                if accelerator.sync_gradients:
                    srigl.after_backward(scaler=accelerator.scaler)
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    srigl.step()
                    optimizer.zero_grad()
    return model, srigl


with tempfile.TemporaryDirectory() as folder:
    (model, srigl), (resumed, _) = train(folder, first=0), train(folder, first=42)
assert all(map(torch.equal, model.parameters(), resumed.parameters()))
print(srigl.report())
