"""Many adapters on one base: requests in threads, the same in one mixed batch, adapters written for other servers."""

import copy
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch

import lora_lite as ll
from cases import FIVE, TOLERANCE, by_name, move

ADAPTERS = 4


def requests(count=24):
    g = torch.Generator().manual_seed(4)
    return [(k % ADAPTERS, torch.randint(3, 64, (1, 6), generator=g)) for k in range(count)]


def served(tiny, cfg=FIVE[0]):
    model, _ = tiny("llama")
    adapt = ll.build(model, cfg)
    return model, adapt, [move(adapt.init(seed=k), seed=k) for k in range(ADAPTERS)]


@torch.inference_mode()
def answer(adapt, params, ids):
    return adapt(params, {"input_ids": ids, "use_cache": False}).logits


@pytest.mark.parametrize("cfg", FIVE, ids=by_name)
def test_threads_and_a_mixed_batch_answer_as_one_by_one(tiny, cfg):
    _, adapt, trees = served(tiny, cfg)
    wanted = [answer(adapt, trees[k], ids) for k, ids in requests()]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda request: answer(adapt, trees[request[0]], request[1]), requests()))
    assert all(torch.equal(a, b) for a, b in zip(threaded, wanted))
    index, ids = zip(*requests())
    with torch.inference_mode():
        mixed = adapt.mixed(ll.stack(trees), {"input_ids": torch.cat(ids), "use_cache": False}, list(index)).logits
    want = torch.cat(wanted)
    base = adapt.base({"input_ids": torch.cat(ids)}).logits
    assert float((mixed - want).abs().max()) <= TOLERANCE[torch.float32] * float(want.abs().max())
    assert float((want - base).abs().max()) > 1e-2


def test_adapters_may_be_switched_between_any_two_calls(tiny):
    _, adapt, trees = served(tiny)
    ids = requests()[0][1]
    first = [answer(adapt, tree, ids) for tree in trees]
    for k in (2, 0, 3, 3, 1):
        assert torch.equal(answer(adapt, trees[k], ids), first[k])
    assert len({float(out.sum()) for out in first}) == ADAPTERS


def test_adapter_trained_here_is_served_by_peft(tiny, tmp_path):
    model, adapt, trees = served(tiny)
    ids = requests()[0][1]
    step = ll.value_and_grad(lambda p: adapt(p, {"input_ids": ids, "labels": ids}).loss)
    trained = trees[0]
    for _ in range(3):
        trained = ll.tree_map(lambda p, g: p - 0.1 * g, trained, step(trained)[1])
    ll.to_peft(adapt, trained, tmp_path / "first")
    ll.to_peft(adapt, trees[1], tmp_path / "second")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "first", adapter_name="first").eval()
    theirs.load_adapter(tmp_path / "second", adapter_name="second")
    for name, tree in (("first", trained), ("second", trees[1]), ("first", trained)):
        theirs.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(theirs(input_ids=ids).logits, answer(adapt, tree, ids), rtol=1e-5, atol=1e-5)
            tokens = theirs.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(tokens, adapt.module(tree).generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0))


def test_another_variant_is_served_as_lora(tiny, tmp_path):
    model, adapt, trees = served(tiny, ll.DoRAConfig(r=2))
    ids = requests()[0][1]
    answers = {}
    for r in (2, 32):
        lora, factors, errors = ll.to_lora(adapt, trees[0], r=r)
        ll.to_peft(lora, factors, tmp_path / str(r))
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / str(r)).eval()
        with torch.no_grad():
            answers[r] = theirs(input_ids=ids).logits, max(errors.values())
    want = answer(adapt, trees[0], ids)
    assert answers[32][1] < 1e-5  # the rank of the whole matrix: nothing is lost
    torch.testing.assert_close(answers[32][0], want, rtol=1e-4, atol=1e-4)
    assert answers[2][1] > 0.01
    assert float((answers[2][0] - want).abs().max()) > 1e-3


def test_the_loop_of_the_docs_answers_requests_as_they_come(tiny):
    recipe = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "examples" / "request_loop.py"))
    _, adapt, trees = served(tiny)
    g = torch.Generator().manual_seed(5)
    lengths = [(3, 5), (7, 2), (2, 6), (5, 1), (9, 4), (4, 4), (3, 3)]
    asked = [
        recipe["Request"](k % ADAPTERS, torch.randint(3, 64, (length,), generator=g), wanted) for k, (length, wanted) in enumerate(lengths)
    ]
    loop, done, coming = recipe["Loop"](adapt, ll.stack(trees), rows=3), [], list(asked)
    while len(done) < len(asked):
        loop.waiting.extend(coming[:2])  # two come at each step, whatever runs
        del coming[:2]
        done += loop.step()
    assert [asked.index(r) for r in done] != list(range(len(asked))), "the requests left in the order in which they came"
    for request in asked:
        ids = request.prompt[None]
        for token in request.made:
            assert answer(adapt, trees[request.adapter], ids)[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        assert len(request.made) == request.wanted


def test_a_request_for_no_token_leaves_the_loop(tiny):
    """It ran until its end token, and without one for good."""
    recipe = runpy.run_path(str(Path(__file__).parent.parent / "docs" / "examples" / "request_loop.py"))
    _, adapt, trees = served(tiny)
    loop, request = recipe["Loop"](adapt, ll.stack(trees)), recipe["Request"](0, torch.tensor([3, 4]), 0)
    loop.waiting.append(request)
    assert loop.step() == [request]
    assert not loop.running
