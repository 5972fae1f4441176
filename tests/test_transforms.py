"""`value_and_grad` is torch.func's, by the plain autograd path where nothing else is active."""

from collections import OrderedDict

import pytest
import torch
from torch.utils import _pytree as pytree

import lora_lite as ll
from cases import FIVE, assert_trees_equal, by_name, move
from lora_lite.transforms import gradients


def tree():
    return {"a": {"w": torch.randn(3, 4), "unused": torch.randn(2)}, "b": [torch.randn(4), (torch.randn(()),)]}


def f(params, x, gain=2.0):
    return (gain * (x @ params["a"]["w"] + params["b"][0]).tanh() * params["b"][1][0].exp()).sum()


def with_aux(params, x, gain=2.0):
    return f(params, x, gain), {"x": x * params["b"][1][0], "parts": [x.sum()]}


def expect(got, want):
    assert pytree.tree_structure(got) == pytree.tree_structure(want)
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want)):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture
def x():
    return torch.randn(5, 3)


def reference(function, has_aux=False):
    """Return torch.func's own, with its pair the other way round."""

    def run(*args):
        grads, value = torch.func.grad_and_value(function, has_aux=has_aux)(*args)
        return value, grads

    return run


@pytest.mark.parametrize("args", [(), (3.0,)], ids=["one argument", "two arguments"])
@pytest.mark.parametrize(("function", "has_aux"), [(f, False), (with_aux, True)], ids=["value", "aux"])
def test_equals_torch_func(function, has_aux, args, x):
    params = tree()
    got = ll.value_and_grad(function, has_aux=has_aux)(params, x, *args)
    want = reference(function, has_aux)(params, x, *args)
    expect(got, want)
    leaves = [t for t in pytree.tree_leaves(got) if isinstance(t, torch.Tensor)]
    assert not any(t.requires_grad for t in leaves), "the plain path hands out a graph"


def test_unused_leaves_and_constant_values_give_zeros(x):
    params = tree()
    _, grads = ll.value_and_grad(f)(params, x)
    assert torch.equal(grads["a"]["unused"], torch.zeros(2))
    with pytest.warns(UserWarning, match="depends on none of the params"):
        value, grads = ll.value_and_grad(lambda p: torch.tensor(3.0))(params)
    assert float(value) == 3.0
    assert ll.value_and_grad(lambda p: torch.tensor(3.0))({})[1] == {}  # there is nothing that the value could have forgotten
    assert all(torch.equal(g, torch.zeros_like(p)) for g, p in zip(pytree.tree_leaves(grads), pytree.tree_leaves(params)))


def test_a_value_that_forgets_the_params_is_reported(x):
    params = tree()

    @torch.no_grad()
    def unwatched(p):
        return f(p, x)

    other = torch.ones(2, requires_grad=True)
    for forgets in (unwatched, lambda p: f(p, x).detach(), lambda p: f(params, x), lambda p: f(params, x) + other.sum()):
        with pytest.warns(UserWarning, match="the value depends on none of the params"):
            _, grads = ll.value_and_grad(forgets)(params)
        assert not any(g.any() for g in pytree.tree_leaves(grads))


def test_params_made_in_inference_mode_have_gradients(x):
    params = tree()
    with torch.inference_mode():
        same = pytree.tree_map(torch.clone, params)
    expect(ll.value_and_grad(f)(same, x)[1], ll.value_and_grad(f)(params, x)[1])
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(same))


def test_errors_of_a_mapped_function_stay_its_own():
    def wrong(leaf):
        raise KeyError("own")

    with pytest.raises(KeyError, match="own"):
        ll.tree_map(wrong, {"0": {"A": torch.ones(2)}})


def test_tree_structure_is_kept(x):
    params = OrderedDict(z=torch.randn(3), a=(torch.randn(3), [torch.randn(3)]))
    _, grads = ll.value_and_grad(lambda p: sum((leaf * leaf).sum() for leaf in pytree.tree_leaves(p)))(params)
    expect(grads, pytree.tree_map(lambda t: 2 * t, params))
    assert list(grads) == ["z", "a"]


def test_params_are_left_alone(x):
    params = tree()
    before = pytree.tree_map(torch.clone, params)
    ll.value_and_grad(f)(params, x)
    expect(params, before)
    assert not any(leaf.requires_grad or leaf.grad is not None for leaf in pytree.tree_leaves(params))


def test_params_that_require_grad_get_no_grad_of_their_own(x):
    params = pytree.tree_map(lambda t: t.requires_grad_(), tree())
    value, grads = ll.value_and_grad(f)(params, x)
    assert all(leaf.grad is None for leaf in pytree.tree_leaves(params))
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(grads))
    expect((value, grads), pytree.tree_map(torch.detach, reference(f)(params, x)))


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_grad_mode_outside_does_not_matter(context, x):
    params = tree()
    want = reference(f)(params, x)
    if context is torch.inference_mode and not gradients._gradients_in_inference_mode():
        pytest.skip("this torch gives zeros there, which the next test finds refused")
    with context():
        expect(ll.value_and_grad(f)(params, x), want)
        assert torch.is_grad_enabled() == (context is torch.enable_grad)


def test_inference_mode_is_refused_where_its_gradients_are_zeros(x, monkeypatch):
    monkeypatch.setattr(gradients, "_gradients_in_inference_mode", lambda: False)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of inference mode"):
        ll.value_and_grad(f)(tree(), x)


def test_inside_vmap(x):
    params = tree()
    got = torch.vmap(ll.value_and_grad(f), in_dims=(None, 0))(params, x)
    want = [reference(f)(params, row) for row in x]
    expect(got, pytree.tree_map(lambda *rows: torch.stack(rows), *want))


def test_inside_vmap_with_aux(x):
    params = tree()

    def run(row):
        return ll.value_and_grad(lambda p, r: (f(p, r), r * p["b"][1][0]), has_aux=True)(params, row)

    (value, aux), _ = torch.vmap(run)(x)
    assert torch.allclose(value, torch.stack([f(params, row) for row in x]))
    assert torch.allclose(aux, x * params["b"][1][0])


def test_inside_grad_and_jvp_gives_second_derivatives(x):
    params, direction = tree(), tree()

    def slope(p, transform):
        return sum((g * v).sum() for g, v in zip(pytree.tree_leaves(transform(f)(p, x)[1]), pytree.tree_leaves(direction)))

    expect(torch.func.grad(lambda p: slope(p, ll.value_and_grad))(params), torch.func.grad(lambda p: slope(p, reference))(params))
    got = torch.func.jvp(lambda p: ll.value_and_grad(f)(p, x), (params,), (direction,))
    expect(got, torch.func.jvp(lambda p: reference(f)(p, x), (params,), (direction,)))


def test_a_transform_inside_it(x):
    params = tree()

    def inner(p):
        return torch.vmap(lambda row: f(p, row))(x).square().sum()

    expect(ll.value_and_grad(inner)(params), reference(inner)(params))

    def penalty(p):
        return sum(g.square().sum() for g in pytree.tree_leaves(torch.func.grad(f)(p, x)))

    expect(ll.value_and_grad(penalty)(params), reference(penalty)(params))


def test_one_inside_another_gives_second_derivatives(x):
    params = tree()

    def after_a_step(p, transform):
        grads = transform(f)(p, x)[1]
        return f(pytree.tree_map(lambda t, g: t - 0.1 * g, p, grads), x)

    expect(ll.value_and_grad(after_a_step)(params, ll.value_and_grad), reference(after_a_step)(params, reference))

    def fails(p):
        raise KeyError

    with pytest.raises(KeyError):
        ll.value_and_grad(fails)(params)
    params["a"]["w"].requires_grad_()
    assert not ll.value_and_grad(f)(params, x)[0].requires_grad  # the plain path again


@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
def test_whole_model(tiny, cfg):
    model, batch = tiny("llama")
    adapt = ll.build(model, cfg)
    params = move(adapt.init())

    def loss(p):
        return adapt(p, batch).loss

    value, grads = ll.value_and_grad(loss)(params)
    want_grads, want = torch.func.grad_and_value(loss)(params)
    assert torch.equal(value, want)
    assert_trees_equal(grads, want_grads, 1e-6)
    assert max(float(g.abs().max()) for leaves in grads.values() for g in leaves.values()) > 1e-4


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (lambda p: p, ValueError, r"value_and_grad: expected f to return a scalar tensor, found shape \(3,\)\. Reduce it"),
        (lambda p: float(p.sum()), ValueError, "expected f to return a scalar tensor, found float"),
        (lambda p: (p.sum(), 1), ValueError, "expected f to return a scalar tensor, found tuple"),
    ],
    ids=["vector", "float", "pair"],
)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")  # the mistake under test makes it
def test_value_must_be_a_scalar_tensor(function, error, match):
    with pytest.raises(error, match=match):
        ll.value_and_grad(function)(torch.randn(3))


@pytest.mark.parametrize(
    ("params", "found"),
    [({"n": torch.arange(3)}, r"torch\.int64"), ({"n": 1.0}, "float"), ({"n": "text"}, "str")],
    ids=["int", "float", "str"],
)
def test_params_must_be_floating_tensors(params, found):
    with pytest.raises(TypeError, match=f"value_and_grad: expected floating tensors in params, found {found}"):
        ll.value_and_grad(lambda p: torch.tensor(0.0))(params)


def test_aux_must_be_a_pair():
    with pytest.raises(ValueError, match="has_aux"):
        ll.value_and_grad(lambda p: p.sum(), has_aux=True)(torch.randn(3))


READ = {
    "module": lambda adapt, params: adapt.module(params),
    "merge_error": lambda adapt, params: adapt.merge_error(params, {}),
    "save": lambda adapt, params: ll.save(adapt, params, "never.safetensors"),
    "to_kohya": lambda adapt, params: ll.to_kohya(adapt, params, "never.safetensors"),
    "to_lora": lambda adapt, params: ll.to_lora(adapt, params, 2),
    "combine": lambda adapt, params: ll.combine(adapt, [params], [1.0]),
}


@pytest.mark.parametrize("call", READ)
def test_values_are_not_read_inside_a_transform(call):
    adapt = ll.build(torch.nn.Sequential(torch.nn.Linear(3, 4)), ll.LoRAConfig(r=2))
    params, ones = move(adapt.init()), torch.ones(3)

    def f(p):
        READ[call](adapt, p)
        return adapt(p, ones)

    with pytest.raises(ValueError, match=rf"{call}.*: expected params whose values can be read, .*torch\.vmap.*, once for each"):
        torch.vmap(f)(ll.stack([params, params]))
    with pytest.raises(ValueError, match=rf"{call}.*: expected params whose values can be read, .*torch\.func\.grad"):
        torch.func.jvp(f, (params,), (params,))


def test_what_is_made_inside_a_transform_is_as_outside():
    model, x = torch.nn.Sequential(torch.nn.Linear(3, 4)), torch.randn(2, 3)
    adapt = ll.build(model, ll.VeRAConfig(r=2))
    params = adapt.init(seed=1)

    def inside(move):
        again = ll.build(model, ll.VeRAConfig(r=2))
        fresh, module = again.init(seed=1), again.module(params)
        return again(ll.tree_map(lambda p: p + move, fresh), x) + module(x)

    moves = torch.tensor([0.0, 0.5])
    want = torch.stack([adapt(ll.tree_map(lambda p, m=m: p + m, params), x) for m in moves]) + adapt(params, x)
    torch.testing.assert_close(torch.vmap(inside)(moves), want)
