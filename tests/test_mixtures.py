"""Mixtures of adapters of the page of that name, beside PEFT's."""

import copy
import types

import peft
import pytest
import torch

import lora_lite as ll
from test_docs import DOCS, blocks

ON = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def page():
    module = types.ModuleType("mixtures")
    for _, code in blocks(DOCS / "mixtures.md"):
        exec(code, vars(module))
    return module


@pytest.fixture
def folders(page, tmp_path):
    """Return PEFT's files of the page's experts."""
    for k, expert in enumerate(page.experts):
        ll.to_peft(page.lora, expert, tmp_path / str(k))
    return [str(tmp_path / str(k)) for k in range(len(page.experts))]


def of_path(theirs, path):
    return next(module for name, module in theirs.named_modules() if name.endswith(path))


def test_poly_is_that_of_peft(page):
    config = peft.PolyConfig(task_type="CAUSAL_LM", r=3, n_tasks=4, n_skills=3, n_splits=2, target_modules=ON)
    theirs = peft.get_peft_model(copy.deepcopy(page.model), config).eval()
    leaves, skills = [], {}
    for path in page.poly.shapes:
        layer = of_path(theirs, path)
        own = layer.poly_lora_A["default"], layer.poly_lora_B["default"], layer.poly_router["default"].module_logits
        with torch.no_grad():
            for p in own:
                p.add_(0.3 * torch.randn_like(p))
        leaves += own
        A, B, logits = (p.detach() for p in own)
        skills[path] = {"A": A.mT.contiguous(), "B": B.mT.contiguous(), "logits": logits.view(4, 2, 3)}
    want = theirs(**page.batch, task_ids=torch.tensor(page.tasks))
    loss, grads = ll.value_and_grad(lambda s: page.poly.mixed(page.of_tasks(s), page.batch, page.tasks).loss)(skills)
    logits = page.poly.mixed(page.of_tasks(skills), page.batch, page.tasks).logits
    assert (logits - page.model(**page.batch).logits).abs().max() > 1e-2
    torch.testing.assert_close(logits, want.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, want.loss.detach())
    found = iter(torch.autograd.grad(want.loss, leaves))
    for got in grads.values():
        for name in ("A", "B"):
            torch.testing.assert_close(got[name].mT, next(found), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got["logits"].flatten(1), next(found), rtol=1e-5, atol=1e-5)


def test_arrow_is_that_of_peft(page, folders):
    config = peft.ArrowConfig(top_k=2, router_temperature=1.0, rng_seed=0)
    theirs = peft.create_arrow_model(copy.deepcopy(page.model), folders, config).eval()
    with torch.no_grad():
        theirs(**page.batch)  # makes the prototypes
    routed = {}
    for path, leaves in ll.stack(page.experts).items():
        layer = of_path(theirs, path)
        prototype = next(m for m in layer.modules() if hasattr(m, "prototypes")).prototypes
        routed[path] = {**leaves, "prototype": prototype}
        exact = page.with_prototypes({path: leaves})[path]["prototype"]
        assert ((exact * prototype).sum(-1).abs() > 0.9).all()  # as near as 15 steps of a power iteration come
    words = page.model.get_input_embeddings()(page.ids)
    ours, others = words.clone().requires_grad_(), words.clone().requires_grad_()
    got = page.arrow(routed, {"inputs_embeds": ours, "labels": page.ids})
    want = theirs(inputs_embeds=others, labels=page.ids)
    assert (got.logits - page.model(**page.batch).logits).abs().max() > 1e-3
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(o.loss, w)[0] for o, w in ((got, ours), (want, others))), rtol=1e-5, atol=1e-5)


def test_xlora_is_that_of_peft(page, folders):
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        xlora_depth=1,
        layerwise_scalings=True,
        adapters={str(k): folder for k, folder in enumerate(folders)},
    )
    base = copy.deepcopy(page.model)
    base.config.use_cache = False  # PEFT asks for it
    theirs = peft.get_peft_model(base, config).eval()
    last = theirs.base_model.internal_xlora_classifier.layers[-1]
    order = [
        name.removeprefix("base_model.lora_model.model.") for name, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    ]
    stacked = {next(p for p in page.stacked if name.endswith(p)): None for name in order}
    stacked = {path: page.stacked[path] for path in stacked}
    want = theirs(**page.batch)
    classifier = {"classifier": {"weight": last.weight.detach(), "bias": last.bias.detach()}}

    def call(router):
        return page.routed_call(page.adapt, stacked, router["classifier"], page.batch)

    loss, grads = ll.value_and_grad(lambda p: call(p).loss)(classifier)
    logits = call(classifier).logits
    assert (logits - page.model(**page.batch).logits).abs().max() > 1e-3
    torch.testing.assert_close(logits, want.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, want.loss.detach())
    found = torch.autograd.grad(want.loss, [last.weight, last.bias])
    for name, grad in zip(("weight", "bias"), found, strict=True):
        torch.testing.assert_close(grads["classifier"][name], grad, rtol=1e-5, atol=1e-5)
