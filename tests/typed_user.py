"""A user's file for the type checker (`mypy tests/typed_user.py`): what the documentation says may be written, is no type error."""

import torch

import lora_lite as ll

CONFIGS: list[ll.AdapterConfig] = [
    ll.LoRAConfig(r=2, target_names=r"0$", layers=None),
    ll.LoRAConfig(r=2, target_names=[r"0$"], exclude_names="lm_head", target_roles="writer"),
    ll.DoRAConfig(r=2, target_names=(r"0$",), layers=[0, 1]),
    ll.VeRAConfig(r=2, target_roles=["reader", "writer"], layers=0),
]


def trained(model: torch.nn.Module, x: torch.Tensor, path: str) -> torch.Tensor:
    """Adapt, step, save and load."""
    adapt = ll.build(model, [ll.LoRAConfig(r=2, target_names="0$"), ll.IA3Config(target_names="1$")])
    params = adapt.init(seed=0)
    _, grads = ll.value_and_grad(lambda p: adapt(p, x).square().mean())(params)
    params = ll.tree_map(lambda p, g: p - 0.1 * g, params, grads)
    ll.save(adapt, params, path)
    again, read = ll.load(model, path)
    y: torch.Tensor = again(again.steer(read, 0.5), x)
    return y
