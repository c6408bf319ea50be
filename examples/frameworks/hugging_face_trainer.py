"""Train a Hugging Face model sparse, resume in the middle to the same bits, save and load it."""

import tempfile

import torch
from sklearn.datasets import load_digits
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from srigl_core.integrations.transformers import SRigLCallback, from_pretrained, save_pretrained
from srigl_core.reference import UpdateSchedule
from srigl_core.torch import report

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
pixels = zip(*load_digits(return_X_y=True), strict=True)
DATA = [{"input_ids": torch.tensor(x).long(), "labels": int(y)} for x, y in pixels]


def make_trainer(folder: str) -> tuple[Trainer, SRigLCallback]:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=17, intermediate_size=64, num_labels=10, **SIZES)
    settings = {"max_steps": 20, "save_steps": 10, "gradient_accumulation_steps": 2}
    args = TrainingArguments(folder, **settings, logging_steps=5, use_cpu=True, report_to=[])
    trainer = Trainer(BertForSequenceClassification(config), args, train_dataset=DATA)
    schedule = UpdateSchedule(t_end=15, delta_t=3)
    return trainer, SRigLCallback(trainer, sparsity=0.8, schedule=schedule, mode="condensed")


with tempfile.TemporaryDirectory() as folder:
    trainer, _ = make_trainer(folder)
    trainer.train()
    resumed, callback = make_trainer(folder)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-10")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
    save_pretrained(resumed.model, f"{folder}/model")
    model = from_pretrained(BertForSequenceClassification, f"{folder}/model")
print(callback.srigl.report())
print(report(model))
