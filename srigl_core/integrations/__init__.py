"""SRigL in the training tools and layers of other packages, one module for each.

`srigl_core.integrations.transformers` is for Hugging Face's ``Trainer`` and its models, and
`srigl_core.integrations.lightning` for Lightning. Hugging Face's accelerate needs no module: it
saves and loads an `SRigL` by ``accelerator.register_for_checkpointing(srigl)``.

`srigl_core.integrations.flax_nnx`, `srigl_core.integrations.flax_linen` and
`srigl_core.integrations.equinox` have the condensed layer as a module of these libraries of JAX.
"""
