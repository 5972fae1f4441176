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
