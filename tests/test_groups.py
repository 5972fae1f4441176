"""Rules for the gradients of LoRA's factors: LoRA+, Riemannian preconditioning and LoRA-FA, beside PEFT's optimizers."""

import copy
import functools

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer, lorafa
from torch import nn

import lora_lite as ll


@pytest.mark.parametrize(
    ("cfg", "slow", "fast"),
    [
        (ll.LoRAConfig(r=2), {(2, 6)}, {(4, 2)}),
        (ll.DoRAConfig(r=2), {(2, 6), (4,)}, {(4, 2)}),
        (ll.PiSSAConfig(r=2), {(2, 6)}, {(4, 2)}),
        (ll.IA3Config(), {(4,)}, None),
    ],
    ids=lambda part: getattr(part, "name", ""),
)
def test_the_output_factor_learns_faster(cfg, slow, fast):
    params = ll.build(nn.Sequential(nn.Linear(6, 4)), cfg).init()
    groups = ll.lora_plus(params, lr=1e-3, ratio=4.0)
    assert [{tuple(leaf.shape) for leaf in group["params"]} for group in groups] == [shapes for shapes in (slow, fast) if shapes]
    assert [group["lr"] for group in groups] == [1e-3, 4e-3][: len(groups)]
    before = ll.tree_map(torch.clone, params)
    optimizer = torch.optim.SGD(groups)
    for leaf in ll.tree_leaves(params):
        leaf.grad = torch.ones_like(leaf)
    optimizer.step()
    for name, leaf in params["0"].items():
        rate = 4e-3 if name in ("B", "dB") else 1e-3
        torch.testing.assert_close(leaf, before["0"][name] - rate)


def test_rates_out_of_range_are_refused():
    for rates, named in (
        ({"lr": 0.0}, r"lr as a finite number > 0, found 0\.0"),
        ({"lr": float("inf")}, "lr as a finite number"),
        ({"lr": 1.0, "ratio": 0.5}, r"ratio as a finite number >= 1, found 0\.5"),
        ({"lr": 1.0, "ratio": float("nan")}, "ratio as a finite number"),
    ):
        with pytest.raises(ValueError, match=f"lora_plus: expected {named}"):
            ll.lora_plus({}, **rates)
    for wrong in (None, "1e-4", True, [1e-4], torch.ones(2), torch.tensor(1j), torch.ones((), device="meta")):
        with pytest.raises(TypeError, match="lora_plus: expected lr as a number"):
            ll.lora_plus({}, lr=wrong)
    params = {"0": {"A": torch.ones(2), "B": torch.ones(2)}}
    assert [group["lr"] for group in ll.lora_plus(params, torch.tensor(1.0), 4)] == [1.0, 4.0]


def tiny_peft(**options):
    """Return one model as PEFT's LoRA and as ours, off the start, with the same numbers, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"], **options))
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    adapt = ll.build(model, ll.LoRAConfig(r=2, alpha=6, **({"rslora": True} if options else {})))
    at = {path: theirs.base_model.model.get_submodule(path) for path in adapt.shapes}
    params = {
        p: {"A": m.lora_A["default"].weight.detach().clone(), "B": m.lora_B["default"].weight.detach().clone()} for p, m in at.items()
    }
    return theirs, at, adapt, params, torch.randn(16, 6), torch.randn(16, 4)


def assert_same_factors(at, params, **tolerance):
    for path, m in at.items():
        torch.testing.assert_close(params[path]["A"], m.lora_A["default"].weight.detach(), **tolerance)
        torch.testing.assert_close(params[path]["B"], m.lora_B["default"].weight.detach(), **tolerance)


def torch_step(optimizer, leaves, grads):
    for p, g in zip(leaves, ll.tree_leaves(grads), strict=True):
        p.grad = g
    optimizer.step()


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_riemannian_steps_are_those_of_peft(optimizer_class):
    theirs, at, adapt, params, x, y = tiny_peft()
    optimizer = create_riemannian_optimizer(theirs, optimizer_class, lr=1e-2, reg=1e-2)
    ours = optimizer_class(ll.tree_leaves(params), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        (theirs(x) - y).square().mean().backward()
        optimizer.step()
        _, grads = ll.value_and_grad(lambda p: (adapt(p, x) - y).square().mean())(params)
        torch_step(ours, ll.tree_leaves(params), ll.riemannian(params, grads, reg=1e-2))
    assert_same_factors(at, params, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_lora_fa_steps_are_those_of_peft(monkeypatch, options):
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # PEFT's projection is in float32 then
    theirs, at, adapt, params, x, y = tiny_peft(**options)
    optimizer = create_lorafa_optimizer(theirs, r=2, lora_alpha=6, lr=1e-2)
    mean, square = (ll.tree_map(torch.zeros_like, params) for _ in range(2))
    for n in range(1, 6):
        optimizer.zero_grad()
        (theirs(x) - y).square().mean().backward()
        optimizer.step()
        _, grads = ll.value_and_grad(lambda p: (adapt(p, x) - y).square().mean())(params)
        grads = ll.lora_fa(params, grads, scale=6 / 2**0.5 if options else 6 / 2)
        mean = ll.tree_map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        square = ll.tree_map(lambda v, g: 0.999 * v + 0.001 * g * g, square, grads)
        rate = 1e-2 * (1 - 0.999**n) ** 0.5 / (1 - 0.9**n)  # PEFT's Adam adds eps to the root before the bias is taken off
        params = ll.tree_map(lambda p, m, v, rate=rate: p - rate * m / (v.sqrt() + 1e-6), params, mean, square)
    assert_same_factors(at, params, rtol=1e-5, atol=1e-6)


def test_lora_plus_steps_are_those_of_peft():
    theirs, at, adapt, params, x, y = tiny_peft()
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0)
    ours = torch.optim.AdamW(ll.lora_plus(params, lr=1e-3, ratio=8.0), weight_decay=0.0)
    for _ in range(5):
        optimizer.zero_grad()
        (theirs(x) - y).square().mean().backward()
        optimizer.step()
        torch_step(ours, ll.tree_leaves(params), ll.value_and_grad(lambda p: (adapt(p, x) - y).square().mean())(params)[1])
    assert_same_factors(at, params, rtol=1e-5, atol=1e-6)


def test_a_stack_is_preconditioned_member_by_member_and_other_leaves_stay():
    adapt = ll.build(nn.Sequential(nn.Linear(6, 4)), ll.DoRAConfig(r=2))
    trees = [ll.tree_map(lambda p: p + torch.randn_like(p), adapt.init(seed=n)) for n in range(6)]
    params, grads = trees[:3], trees[3:]
    for rule in (ll.riemannian, functools.partial(ll.lora_fa, scale=2.0)):
        whole = rule(ll.stack(params), ll.stack(grads))
        for got, p, g in zip(ll.unstack(whole), params, grads, strict=True):
            want = rule(p, g)
            assert want["0"]["m"] is g["0"]["m"]
            ll.tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6), got, want)


def test_rules_refuse_trees_without_factors_and_numbers_out_of_range():
    params = ll.build(nn.Sequential(nn.Linear(6, 4)), ll.IA3Config()).init()
    with pytest.raises(
        ValueError, match=r'riemannian: expected targets with the leaves "A" and "B", found \[.*\]\. Use it with LoRAConfig'
    ):
        ll.riemannian(params, params)
    with pytest.raises(ValueError, match=r"riemannian: expected reg as a finite number > 0, found 0"):
        ll.riemannian(params, params, reg=0)
    with pytest.raises(ValueError, match=r"lora_fa: expected scale as a finite number > 0, found 0"):
        ll.lora_fa(params, params, scale=0)
    with pytest.raises(ValueError, match=r"lora_fa: expected reg as a finite number >= 0, found -1"):
        ll.lora_fa(params, params, scale=1, reg=-1)


@pytest.mark.parametrize("rule", [ll.riemannian, lambda p, g: ll.lora_fa(p, g, scale=1.0)], ids=["riemannian", "lora_fa"])
def test_rules_refuse_trees_that_no_gradient_belongs_to(rule):
    params = {"0": {"A": torch.randn(2, 6), "B": torch.randn(4, 2)}}
    for other, error, named in (
        (None, TypeError, "expected params as a tree"),
        (ll.tree_map(lambda p: p.long(), params), ValueError, r'in params "0\.A": expected a floating dtype'),
        (ll.tree_map(lambda p: p.to("meta"), params), ValueError, r'"0\.A": expected device meta, found cpu'),
    ):
        with pytest.raises(error, match=named):
            rule(other, params)
    with pytest.raises(ValueError, match=r'"0\.A": expected device cpu, found meta'):
        rule(params, ll.tree_map(lambda p: p.to("meta"), params))


def test_factor_that_has_no_inverse_is_named_and_the_way_out_works():
    params = {"0": {"A": torch.ones(2, 6), "B": torch.ones(4, 2)}}
    with pytest.raises(ValueError, match=r'lora_fa: at "0" expected a factor of full rank for reg=1e-08.*Raise reg'):
        ll.lora_fa(params, params, scale=1.0)
    assert ll.lora_fa(params, params, scale=1.0, reg=1e-4)["0"]["B"].isfinite().all()
