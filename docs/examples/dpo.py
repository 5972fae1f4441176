"""TRL's DPO of an adapter, with the frozen model as the reference."""

import torch
import trl

import lora_lite as ll
from lora_lite.integrations.trainer import AdapterSaving


class AdapterDPO(AdapterSaving, trl.DPOTrainer):
    """TRL's trainer, whose checkpoints hold the adapter alone."""


def dpo(model, tokenizer, pairs, args, cfg=ll.LoRAConfig(r=8)):  # noqa: B008  # configs are frozen
    """Return the adapted model and its params after training on rows of `prompt`, `chosen` and `rejected`."""
    adapt = ll.build(model, cfg)
    params = adapt.init(seed=0)
    reference = adapt.module(ll.tree_map(torch.zeros_like, params))  # the frozen model; its weights are shared
    trainer = AdapterDPO(adapt, params, ref_model=reference, args=args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    return adapt, trainer.params()
