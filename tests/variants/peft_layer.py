"""A linear layer adapted by PEFT and by ours with the same numbers: the update of each to `W x + b`, and the gradients."""

import copy

import peft
import torch
from torch import nn

import lora_lite as ll

LAYERS = {"wide-bias": (24, 32, True), "tall-bias": (32, 24, True), "wide-plain": (24, 32, False), "tall-plain": (32, 24, False)}
"""`(i, o, bias)` of the layers that each variant is compared on."""


def compare(layer, cfg, theirs, leaves, train=False, scale=0.1):
    """Require the updates and the gradients of `cfg` to be those of PEFT's config `theirs`, to 1e-5 in float32.

    `leaves` maps each of our names to PEFT's attribute and to its neutral value, which ours is the deviation from.
    """
    i, o, bias = LAYERS[layer]
    model = nn.Sequential(nn.Linear(i, o, bias=bias))
    x, weights = torch.randn(2, 3, i), torch.randn(2, 3, o)
    wrapped = peft.get_peft_model(copy.deepcopy(model), theirs).train(train)
    adapted = wrapped.base_model.model.get_submodule("0")
    tensors = {name: getattr(getattr(adapted, attribute)["default"], "weight", None) for name, (attribute, _) in leaves.items()}
    tensors = {name: getattr(adapted, leaves[name][0])["default"] if t is None else t for name, t in tensors.items()}
    assert {id(t) for t in tensors.values()} == {id(p) for p in wrapped.parameters() if p.requires_grad}
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(scale * torch.randn(tensor.shape))
    torch.manual_seed(3)
    y = wrapped(x)
    (y * weights).sum().backward()  # first: COFT changes the numbers in its forward
    params = {name: tensor.detach() - leaves[name][1] for name, tensor in tensors.items()}
    adapt = ll.build(model.train(train), cfg)
    torch.manual_seed(3)
    ours = adapt({"0": params}, x)
    close(ours - model(x), (y - model(x)).detach(), "the update")
    assert (ours - model(x)).abs().max() > 0.01
    torch.manual_seed(3)
    _, grads = ll.value_and_grad(lambda p: (adapt({"0": p}, x) * weights).sum())(params)
    for name, tensor in tensors.items():
        close(grads[name], tensor.grad, f"the gradient of {name}")


def close(got, want, what, tolerance=1e-5):
    """Hold two tensors against each other, relative to the largest entry."""
    assert got.shape == want.shape, what
    error, bound = float((got - want).detach().abs().max()), tolerance * max(1.0, float(want.abs().max()))
    assert error <= bound, f"{what}: {error:.1e} off, allowed {bound:.1e}"


def matrix(f, params, size, **statics):
    """Return the matrix of a pure function over the identity as frozen weight, in the params' dtype."""
    eye = torch.eye(size, dtype=next(iter(params.values())).dtype)
    return f(params, eye, eye, **statics).t()
