"""What holds on every packed layer: the adapted model is that of the dense weight, and the user's stays as it was."""

import copy

import torch
from torch import nn

import lora_lite as ll
from cases import move


def close(got, want, tolerance=1e-5):
    leaves = ([t] if isinstance(t, torch.Tensor) else ll.tree_leaves(t) for t in (got, want))
    for a, b in zip(*leaves, strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(1.0, float(b.abs().max()))


def bytes_of(value):
    """Return the bytes of a tensor, of each inside where it is of a class of its own."""
    if hasattr(value, "__tensor_flatten__"):
        return {name: bytes_of(getattr(value, name)) for name in value.__tensor_flatten__()[0]}
    return torch.empty(value.numel(), dtype=value.dtype).copy_(value.detach().reshape(-1)).view(torch.uint8).tolist()


def facts(layer: nn.Module):
    """Return what must not change in a user's layer: its attributes by identity, its tensors to the byte."""
    held = {**vars(layer), **layer._parameters, **layer._buffers, **(getattr(layer, "meta", None) or {})}
    return {name: (id(v), bytes_of(v) if isinstance(v, torch.Tensor) else None) for name, v in held.items()}


def models(layer: nn.Module, dense: torch.Tensor):
    """Return the layer in a model, and its dense twin."""
    o, i = dense.shape
    bias = layer.bias
    twin = nn.Linear(i, o, bias=bias is not None)
    twin.weight.data = dense.float()
    if bias is not None:
        twin.bias.data = bias.detach().float().clone()
    torch.manual_seed(1)
    last = nn.Linear(o, 6)
    return nn.Sequential(layer, nn.Tanh(), last).eval(), nn.Sequential(twin, nn.Tanh(), last).eval()


def derived(adapt, params, other, x):
    """Return what transforms make of an adapter."""

    def loss(p, x):
        return adapt(p, x).square().sum()

    return (
        torch.func.grad(loss)(params, x),
        torch.func.grad(loss, argnums=1)(params, x),
        torch.vmap(torch.func.grad(loss), (None, 0))(params, x),
        torch.func.jvp(lambda p: adapt(p, x), (params,), (other,))[1],
        adapt.mixed(ll.stack([params, other]), x, [0, 1, 0, 1, 0]),
    )


def check(layer, dense, kind, path, tolerance=1e-5):
    """Compare every use of an adapter on a packed layer with that on the dense weight."""
    packed, plain = models(layer, dense)
    before = facts(layer)
    x = torch.randn(5, dense.shape[1], generator=torch.Generator().manual_seed(2))
    for cfg in (ll.LoRAConfig(r=2), ll.DoRAConfig(r=2), ll.PiSSAConfig(r=2)):
        adapt, twin = ll.build(packed, cfg), ll.build(plain, cfg)
        assert next(t.kind for t in adapt.targets if t.path == "0").__name__ == kind
        params, other = move(twin.init(seed=0)), move(twin.init(seed=0), seed=1)

        close(adapt.base(x), twin.base(x), tolerance)
        close(adapt(params, x) - adapt.base(x), twin(params, x) - twin.base(x), tolerance)
        for got, want in zip(derived(adapt, params, other, x), derived(twin, params, other, x), strict=True):
            close(got, want, tolerance)
        merged = adapt.merge(params)
        close(merged["0.weight"], twin.merge(params)["0.weight"], tolerance)
        fresh = copy.deepcopy(plain)
        fresh.load_state_dict(merged)
        close(fresh(x).detach(), adapt(params, x), tolerance)
        ll.save(adapt, params, path)
        again, read = ll.load(packed, path)
        assert torch.equal(again(read, x), adapt(params, x))
    assert facts(layer) == before
