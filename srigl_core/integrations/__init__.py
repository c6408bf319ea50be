"""SRigL in the training tools of other packages, one module for each.

`srigl_core.integrations.transformers` is for Hugging Face's ``Trainer`` and its models, and
`srigl_core.integrations.lightning` for Lightning. Hugging Face's accelerate needs no module: it
saves and loads an `SRigL` by ``accelerator.register_for_checkpointing(srigl)``.
"""
