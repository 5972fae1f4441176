"""Names of other libraries, with advice for errors about those that are not here."""

from collections.abc import Collection
from typing import NoReturn

from lora_lite.core.errors import nearest

CALLS = {
    **dict.fromkeys(("save", "save_adapter", "save_checkpoint"), "Call ll.save(adapt, params, path)"),
    **dict.fromkeys(("save_pretrained", "push_to_hub"), "Call ll.to_peft(adapt, params, folder), or ll.save(adapt, params, path)"),
    **dict.fromkeys(("load", "load_adapter", "from_pretrained"), "Call ll.load(model, path), or ll.from_peft(model, folder)"),
    **dict.fromkeys(("print_trainable_parameters", "get_nb_trainable_parameters"), "Use adapt.summary() and adapt.num_params"),
    **dict.fromkeys(("merge_and_unload", "merge_adapter"), "Use model.load_state_dict(adapt.merge(params), strict=False)"),
    **dict.fromkeys(("set_adapter", "add_adapter", "active_adapter", "delete_adapter"), "Pass another tree: adapt(other, batch)"),
    **dict.fromkeys(("disable_adapter", "disable_adapters", "unload", "get_base_model", "unmerge_adapter"), "Use adapt.base(batch)"),
    "add_weighted_adapter": "Call ll.combine(adapt, [a, b], [0.5, 0.5])",
}
"""Advice for the methods of an adapted model."""

NAMES = {
    **dict.fromkeys(("get_peft_model", "inject_adapter_in_model"), "Call build(model, cfg)"),
    **dict.fromkeys(
        ("PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig", "CartridgeConfig"),
        "A prefix or a prompt is a tree beside the adapter's, docs/prompts.md",
    ),
    "PeftModel": "Call from_peft(model, folder), or build(model, cfg)",
    "PeftConfig": "Call from_peft(model, folder), whose adapt.configs are those of the folder",
    "prepare_model_for_kbit_training": "It is not needed: the base is frozen as it is",
    "TaskType": "It follows from the model's class",
    "AdapterTrainer": "Import it from lora_lite.integrations.trainer",
}
"""Advice for the names of a package."""


def refuse_name(module: str, name: str, names: Collection[str]) -> NoReturn:
    """Raise an AttributeError for a name that a module has not, with the way that it has instead or the closest of its `names`."""
    ours = next((known for known in names if known.lower() == name.lower()), None)  # LoraConfig
    shown = [known for known in names if not known.startswith("_")]
    way = f"It is called {ours} here" if ours else {**CALLS, **NAMES}.get(name, f"Closest: {nearest(name, shown)}")
    raise AttributeError(f"module {module!r} has no attribute {name!r}. {way}.", name=name)
