"""Threads: concurrent calls of one `adapt` are exact, whenever each makes its first."""

import threading

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import FIVE, by_name, move


@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
def test_threads_do_not_mix_up_their_params(tiny, cfg):
    model, batch = tiny("llama")
    adapt = ll.build(model, cfg)
    members = [move(adapt.init(seed=k), seed=k) for k in range(8)]
    with torch.no_grad():
        want = [adapt(params, batch).logits for params in members]
    wrong, start = [], threading.Barrier(8)

    def run(k):
        start.wait()
        with torch.no_grad():
            for turn in range(25):
                got = adapt(members[k], batch).logits
                if not torch.equal(got, want[k]):
                    wrong.append((k, turn))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert not torch.equal(want[0], want[1])


class Paused(nn.Module):
    """Count calls in a buffer, and wait in the middle of a forward while told to."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))
        self.inside, self.go, self.wait = threading.Event(), threading.Event(), threading.local()

    def forward(self, x):
        self.calls += 1
        if getattr(self.wait, "on", False):
            self.inside.set()
            assert self.go.wait(60)
        return self.lin(x) * self.calls


@pytest.mark.parametrize("under", ["plain", "grad", "vmap"])
def test_first_call_of_a_thread_while_another_is_in_the_middle_of_one(under):
    model = Paused().train()
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    one, two = (move(adapt.init(), seed=k) for k in (1, 2))
    x = torch.randn(3, 6)
    want = adapt(one, x), adapt(two, x)
    stacked = {"lin": {name: torch.stack([leaf, leaf]) for name, leaf in one["lin"].items()}}
    calls = {
        "plain": lambda: adapt(one, x),
        "grad": lambda: torch.func.grad(lambda p: adapt(p, x).sum(), has_aux=False)(one) and adapt(one, x),
        "vmap": lambda: torch.vmap(lambda p: adapt(p, x))(stacked)[0],
    }
    results = {}

    def other():
        assert model.inside.wait(60)
        try:
            results["other"] = adapt(two, x)
        except Exception as e:
            results["other"] = e
        model.go.set()

    thread = threading.Thread(target=other)
    thread.start()
    model.wait.on = True
    results["main"] = calls[under]()
    thread.join()
    assert isinstance(results["other"], torch.Tensor), results["other"]
    assert torch.equal(results["other"], want[1])
    assert not results["other"].requires_grad
    assert torch.allclose(results["main"], want[0], atol=1e-6)


@pytest.mark.parametrize("route", ["grad", "vmap", "jvp", "compile", "thread"])
def test_first_call_may_stand_inside_a_transform(route):
    """A copy made there outlives the transform: it must hold the frozen tensors themselves."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(3, 8)
    params = move(ll.build(model, ll.LoRAConfig(r=2)).init())
    want = torch.func.grad(lambda p: ll.build(model, ll.LoRAConfig(r=2))(p, x).sum())(params)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    made = []

    def loss(p):
        return adapt(p, x).sum()

    def first():
        if route == "vmap":
            torch.vmap(loss)(ll.stack([params, params]))
        elif route == "jvp":
            torch.func.jvp(loss, (params,), (params,))
        elif route == "compile":
            assert torch.compile(loss, fullgraph=True, backend="aot_eager")(params).allclose(loss(params))
        else:
            torch.func.grad(loss)(params)
        made.append(adapt._replicas.here())

    if route == "thread":
        thread = threading.Thread(target=first)
        thread.start()
        thread.join()
    else:
        first()
    frozen = [t for t in made[0].module.state_dict(keep_vars=True).values() if not t.is_meta]
    assert len(frozen) == 4
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in frozen)
    assert {t.data_ptr() for t in frozen} == {t.data_ptr() for t in model.parameters()}
    got = torch.func.grad(loss)(params)
    assert all(torch.equal(got[path][name], leaf) for path, leaves in want.items() for name, leaf in leaves.items())
