"""`AdapterTrainer`: transformers' `Trainer` whose checkpoints hold the adapter, not the base model.

`Trainer(adapt.module(params))` trains, saves and resumes as it is, but each of its checkpoints holds the base model too, and
`from_pretrained` on one would drop the adapter. Here a checkpoint holds the file that `lora_lite.save` writes. The state of the
optimizer, the schedule and the random numbers lie beside it, so that a resumed run goes on as if it had not stopped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.trainer import TRAINING_ARGS_NAME

from lora_lite.adapt import Adapt
from lora_lite.clone.params import write_params
from lora_lite.core.config_json import departures
from lora_lite.core.errors import exactly, listed, require_type
from lora_lite.core.tree import Tree
from lora_lite.files.adapter_file import load, save
from lora_lite.prepare.heads import output_heads

ADAPTER_FILE = "adapter.safetensors"
"""The name of the adapter's file in a checkpoint. `lora_lite.load` reads it."""


class AdapterSaving:
    """Mixin that saves and loads adapters, for a class of your own: list it before your subclass of `Trainer`.

    Args:
        adapt: the adapted model.
        params: where training starts; they are copied.
        options: keywords of the `Trainer`, `model` excepted.

    Raises:
        ValueError: where `params` does not fit, the arguments ask for FSDP or DeepSpeed, which save in their own way, or the output head is
            adapted and the trainer reads its weight; where `sync_ref_model` would move a reference that shares the base weights.
        TypeError: where `adapt` is no `Adapt`, or a model is given beside it.
    """

    model: Any
    args: Any
    state: Any
    processing_class: Any

    def __init__(self, adapt: Adapt, params: Mapping[str, Mapping[str, Tensor]], **options: Any) -> None:
        call = "AdapterTrainer(adapt, params, args=args)"
        require_type(isinstance(adapt, Adapt), call, "adapt", "what build or load returned", adapt)
        given = [name for name in ("model", "model_init") if options.get(name) is not None]
        if given:
            raise TypeError(f'AdapterTrainer: expected adapt and params in the place of a model, found "{given[0]}". Leave it out.')
        self.adapt = adapt
        args = options.get("args")
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise ValueError(
                "AdapterTrainer: expected one process or several under DDP, found fsdp or deepspeed in the arguments. Train on "
                "adapt.shard(mesh) in a loop of your own, or give adapt.module(params) to Trainer itself."
            )
        adapt._require(params, "AdapterTrainer")  # a stack would train, and fail when it is saved
        module = adapt.module(params)
        if getattr(module, "is_quantized", False):
            vars(module)["_hf_peft_config_loaded"] = True  # how Trainer asks whether a quantised model has something to train
        called = vars(module).get("forward")
        super().__init__(model=module, **options)  # type: ignore[call-arg]
        if vars(self.model).get("forward") is not called:  # as TRL's trainers do, to compute the head's output in parts
            self._require_called_head()
        if getattr(self.args, "sync_ref_model", False):
            self._require_own_reference()

    def _require_called_head(self) -> None:
        """Raise where the output head is a target: a trainer that replaces the model's forward reads the head's weight."""
        heads = output_heads(self.model)
        adapted = [target.path for target in self.adapt.targets if target.path in heads]
        if adapted:
            raise ValueError(
                f'{type(self).__name__}: expected an output head that is not adapted, found "{adapted[0]}" among the targets. This trainer '
                "reads the head's weight, and the adapter would have no part in the loss. Leave it out: "
                f'exclude_names=(r"{exactly(adapted[0])}",).'
            )

    def _require_own_reference(self) -> None:
        """Raise unless the reference has the model's parameters in memory of its own: TRL's `sync_ref_model` writes to each of them."""
        reference = getattr(self, "ref_model", None)
        own, its = dict(self.model.named_parameters()), {} if reference is None else dict(reference.named_parameters())
        shared = [name for name in own if name in its and own[name].data_ptr() == its[name].data_ptr()]
        if own.keys() != its.keys() or shared:
            found = f"the same memory at {listed(shared, 2)}" if shared else "a model without the adapter's, or none"
            raise ValueError(
                f"{type(self).__name__}: expected for sync_ref_model a reference with the model's parameters in memory of its own, since "
                f"it moves them all, found {found}. Pass ref_model=copy.deepcopy(adapt.module(params)) where the trainer takes one, or "
                "leave sync_ref_model off."
            )

    def params(self) -> Tree:
        """Return copies of the params as they are now."""
        return self.adapt.params(self.model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapter where `Trainer` would write the model."""
        folder = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        save(self.adapt, self.params(), folder / ADAPTER_FILE)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Fill the module with the adapter of a checkpoint.

        Raises:
            FileNotFoundError: where the checkpoint holds no adapter, as those of `Trainer` itself.
            ValueError: where the checkpoint's configs are others, or its constants: derived from other weights or other calibration data.
        """
        file, plan = Path(resume_from_checkpoint) / ADAPTER_FILE, self.adapt._plan
        if not file.is_file():
            raise FileNotFoundError(
                f'AdapterTrainer: expected {ADAPTER_FILE} in "{resume_from_checkpoint}", found none, as in the checkpoints of Trainer '
                "itself. Resume those with Trainer(adapt.module(params)); to go on here, load their model.safetensors into "
                "adapt.module(params), and start from adapt.params(module)."
            )
        other, params = load(plan.base, file, variants=list(map(type, self.adapt.configs)), kinds=plan.kinds)
        self.adapt._require(params, "AdapterTrainer")
        there = dict(zip((t.path for t in other.targets), other.configs))
        fields = [d for target, cfg in zip(self.adapt.targets, self.adapt.configs) for d in departures(cfg, there[target.path])]
        if fields:
            raise ValueError(
                f'AdapterTrainer: expected the configs of "{file}", found others: {listed(dict.fromkeys(fields))}. A run resumes under '
                "its own: use adapt, params = ll.load(model, that file), and train that adapt. Or start a new run from params."
            )
        differ = [path for path, own in self.adapt.constants.items() if not _same(own, other.constants.get(path, {}))]
        if differ:
            raise ValueError(
                f'AdapterTrainer: expected the constants of "{file}", found others at {listed(differ)}, derived from other weights or '
                "other calibration data. Use adapt, params = ll.load(model, that file), and train that adapt."
            )
        write_params(self.model, params)

    def _load_best_model(self) -> None:
        """Fill the module with the adapter of the best checkpoint."""
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _same(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> bool:
    """Whether constants are those of a file, up to what another machine's decomposition rounds otherwise."""
    return set(own) == set(stored) and all(
        c.shape == stored[name].shape
        and torch.allclose(c.double(), stored[name].double(), rtol=1e-3, atol=1e-3 * float(c.abs().max() or 1))
        for name, c in own.items()
    )


class AdapterTrainer(AdapterSaving, transformers.Trainer):
    """transformers' `Trainer` on an adapted model. Its checkpoints hold the adapter alone.

    Everything else is `Trainer`'s: arguments, evaluation, callbacks, mixed precision, DDP under `torchrun`. `trainer.params()` reads
    the params at any time.

    Example:
        >>> import tempfile, torch, transformers, lora_lite as ll
        >>> from lora_lite.integrations.trainer import AdapterTrainer
        >>> config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=8)
        >>> adapt = ll.build(transformers.GPT2LMHeadModel(config), ll.LoRAConfig(r=2))
        >>> rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     args = transformers.TrainingArguments(folder, max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True)
        ...     trainer = AdapterTrainer(adapt, adapt.init(seed=0), args=args, train_dataset=rows)
        ...     trainer.remove_callback(transformers.PrinterCallback)  # its log
        ...     steps = trainer.train().global_step
        >>> steps, list(trainer.params()["transformer.h.0.mlp.c_fc"])
        (2, ['A', 'B'])
    """
