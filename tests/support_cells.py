"""The cells of the support matrix: every variant under every transform, and PEFT's methods beside, on a tiny Llama.

A cell passes only if its numbers agree with a reference: a loop, plain autograd or the same weights in another form.
`test_support_matrix.py` runs them; docs/support.md is its report.
"""

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import lora_lite as ll
from quantised_models import twins
from support_subjects import Params, Subject, Wrap, moved, tiny_llama, tokens

PAGE = Path(__file__).parent.parent / "docs" / "support.json"


class WrongNumbers(Exception):
    """A cell ran and gave something else than its reference."""


def same(got: Any, want: Any, tolerance: float = 1e-6) -> None:
    """Hold two trees against each other, relative to the largest entry."""
    pairs = list(zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True))
    largest = max(float(b.detach().abs().max()) for _, b in pairs)
    error = max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs) / largest
    if not (error <= tolerance and largest > 0):
        raise WrongNumbers(f"{error:.0e} off")


def by_autograd(subject: Subject, params: Params, ids: torch.Tensor) -> Params:
    """Return the gradients by `backward`, the reference of the others."""
    leaves = pytree.tree_map(lambda p: p.detach().clone().requires_grad_(), params)
    subject.loss(leaves, ids).backward()
    return pytree.tree_map(lambda leaf: leaf.grad, leaves)


def stacked(trees: list[Params]) -> Params:
    """Stack trees along a leading axis."""
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def grad(wrap: Wrap) -> None:
    """`torch.func.grad` against `backward`."""
    s = wrap(tiny_llama().double())
    same(torch.func.grad(s.loss)(s.params, tokens()), by_autograd(s, s.params, tokens()))


def value_and_grad(wrap: Wrap) -> None:
    """`lora_lite.value_and_grad`, for PEFT `torch.func.grad_and_value`, against `backward`."""
    s = wrap(tiny_llama().double())
    if s.adapt is not None:
        value, grads = ll.value_and_grad(s.loss)(s.params, tokens())
    else:
        grads, value = torch.func.grad_and_value(s.loss)(s.params, tokens())
    same(grads, by_autograd(s, s.params, tokens()))
    same(value, s.loss(s.params, tokens()))


def vmap_examples(wrap: Wrap) -> None:
    """`torch.vmap` of `torch.func.grad` over rows against a loop."""
    s = wrap(tiny_llama().double())
    rows = tokens()[:, None]
    same(torch.vmap(torch.func.grad(s.loss), (None, 0))(s.params, rows), stacked([by_autograd(s, s.params, row) for row in rows]))


def vmap_params(wrap: Wrap) -> None:
    """`torch.vmap` over params against a loop."""
    s = wrap(tiny_llama().double())
    members = s.members(3)
    got = torch.vmap(s.logits, (0, None))(stacked(members), tokens())
    same(got, torch.stack([s.logits(member, tokens()) for member in members]))


def mixed(wrap: Wrap) -> None:
    """Rows of one batch through adapters of their own against a loop: `adapt.mixed`, with gradients; PEFT's `adapter_names`, values."""
    s = wrap(tiny_llama().double())
    index, (one, two) = [1, 0, 1, 1], s.members(2)
    if s.adapt is None:
        return _mixed_by_name(s, index, one, two)

    def loss(stack: Params) -> torch.Tensor:
        return s.adapt.mixed(stack, tokens(), index, use_cache=False).logits.square().mean()

    got, want = ll.value_and_grad(loss)(stacked([one, two]))[1], [pytree.tree_map(torch.zeros_like, one) for _ in range(2)]
    for row, k in enumerate(index):
        found = by_autograd(s, (one, two)[k], tokens()[row : row + 1])
        want[k] = pytree.tree_map(lambda a, b: a + b / len(index), want[k], found)
    same(got, stacked(want))


def _mixed_by_name(s: Subject, index: list[int], one: Params, two: Params) -> None:
    s.module.float().add_adapter("second", s.module.peft_config["default"])
    s.module.double().eval()
    values = {**one, **{name.replace("default", "second"): leaf for name, leaf in two.items()}}
    s.module.load_state_dict(values, strict=False)
    names, ids = ["default", "second"], tokens()
    with torch.no_grad():
        got = s.module(ids, adapter_names=[names[k] for k in index], use_cache=False).logits
        alone = []
        for name in names:
            s.module.set_adapter(name)
            alone.append(s.module(ids, use_cache=False).logits)
    if torch.equal(*alone):
        raise WrongNumbers("two adapters give the same logits")
    same(got, torch.stack([alone[k][row] for row, k in enumerate(index)]))


def jvp(wrap: Wrap) -> None:
    """`torch.func.jvp` of the loss against the gradient in that direction."""
    s = wrap(tiny_llama().double())
    along = moved(pytree.tree_map(torch.zeros_like, s.params), 5)
    with sdpa_kernel(SDPBackend.MATH):
        got = torch.func.jvp(lambda p: s.loss(p, tokens()), (s.params,), (along,))[1]
    slopes = zip(pytree.tree_leaves(by_autograd(s, s.params, tokens())), pytree.tree_leaves(along))
    same(got, sum((g * v).sum() for g, v in slopes), 1e-5)


def hvp(wrap: Wrap) -> None:
    """`lora_lite.hvp` against differences of gradients."""
    s = wrap(tiny_llama().double())
    along = moved(pytree.tree_map(torch.zeros_like, s.params), 5)
    got = ll.hvp(lambda p: s.loss(p, tokens()))(s.params, along)
    step = 1e-4  # a larger one steps over kinks of rectifiers; in a smaller one the noise shows: Llama's norms compute in float32
    sides = [by_autograd(s, pytree.tree_map(lambda p, v, e=e: p + e * v, s.params, along), tokens()) for e in (step, -step)]
    same(got, pytree.tree_map(lambda a, b: (a - b) / (2 * step), *sides), 1e-2)


def remat(wrap: Wrap) -> None:
    """A training step with recomputed blocks against one without: `build(remat=...)`; PEFT's, by its own `backward`."""
    s = wrap(tiny_llama().double())
    want = by_autograd(s, s.params, tokens())
    if s.adapt is not None:
        lean = wrap(tiny_llama().double(), remat=r"layers\.\d+$")
        return same(ll.value_and_grad(lean.loss)(s.params, tokens())[1], want)
    s.module.load_state_dict(s.params, strict=False)
    s.module.train().gradient_checkpointing_enable()
    s.module.enable_input_require_grads()
    s.module(tokens(), use_cache=False).logits.square().mean().backward()
    same({name: s.module.get_parameter(name).grad for name in s.params}, want)


def compile(wrap: Wrap) -> None:
    """`torch.compile` of `torch.func.grad` in one graph, and not again for other params, against `backward`."""
    s = wrap(tiny_llama(layers=1).double())
    torch.compiler.reset()
    compiled = torch.compile(torch.func.grad(s.loss), fullgraph=True, backend="aot_eager")
    same(compiled(s.params, tokens()), by_autograd(s, s.params, tokens()))
    with torch.compiler.set_stance("fail_on_recompile"):
        other = s.members(1)[0]
        same(compiled(other, tokens()), by_autograd(s, other, tokens()))


def bfloat16(wrap: Wrap) -> None:
    """A bfloat16 model with float32 params against the same numbers in float64."""
    model = tiny_llama().bfloat16()
    s = wrap(model, torch.float32)
    exact = _onto(s, tiny_llama().bfloat16().double()) or wrap(tiny_llama().bfloat16().double())
    params = pytree.tree_map(lambda p: p.double(), s.params)
    out = s.logits(s.params, tokens())
    if out.dtype != torch.bfloat16:
        raise WrongNumbers(f"logits in {out.dtype}")
    same(out, exact.logits(_under(exact, params), tokens()), 1e-1)  # 8 bits of mantissa through two blocks, moved far off their start
    same(_in_order(by_autograd(s, s.params, tokens())), _in_order(by_autograd(exact, _under(exact, params), tokens())), 1e-1)


def four_bit(wrap: Wrap) -> None:
    """A training step on a 4-bit base against the same adapter on the dequantised weights."""
    _quantised(wrap, 4)


def eight_bit(wrap: Wrap) -> None:
    """The same on an 8-bit base."""
    _quantised(wrap, 8)


def _quantised(wrap: Wrap, bits: int) -> None:
    model, dense = twins(tiny_llama(), {4: "nf4", 8: "8-bit"}[bits])
    setattr(model, f"is_loaded_in_{bits}bit", True)  # PEFT goes by it
    s = wrap(model, torch.float32)
    exact = _onto(s, dense) or wrap(dense, torch.float32)
    tolerance = 1e-5 if s.adapt is not None else 1e-1  # PEFT runs the backend's own kernels, which round and quantise activations
    if s.adapt is None:
        s.module.train()  # in evaluation bitsandbytes takes kernels without a gradient
    params = _under(s, exact.params)
    same(s.logits(params, tokens()), exact.logits(exact.params, tokens()), tolerance)
    same(_in_order(by_autograd(s, params, tokens())), _in_order(by_autograd(exact, exact.params, tokens())), tolerance)


def _onto(subject: Subject, model: torch.nn.Module) -> Subject | None:
    """Put one of our adapters on another form of its model, constants and all: derived anew they would differ with the rounding."""
    if subject.adapt is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        ll.save(subject.adapt, subject.params, f"{folder}/adapter.safetensors")
        adapt, params = ll.load(model, f"{folder}/adapter.safetensors")
    return Subject(lambda p, ids: adapt(p, ids, use_cache=False).logits, params, adapt=adapt)


def _in_order(params: Params) -> list[torch.Tensor]:
    return pytree.tree_leaves(params)


def _under(subject: Subject, params: Params) -> Params:
    """Return the numbers of another subject's params under this one's names: PEFT's differ with the kind of layer."""
    return pytree.tree_unflatten(pytree.tree_leaves(params), pytree.tree_structure(subject.params))


CELLS: dict[str, Callable[[Wrap], None]] = {
    f.__name__: f
    for f in (grad, value_and_grad, vmap_examples, vmap_params, mixed, jvp, hvp, remat, compile, bfloat16, four_bit, eight_bit)
}
"""The columns of the matrix."""

EXPECTED = {
    ("dora", "hvp"): "wrong numbers",  # the norm is held fixed in the gradient, whose derivative is then another function's
    ("full", "four_bit"): "ValueError",  # packed weights cannot be trained as a whole
    ("full", "eight_bit"): "ValueError",
}
"""Cells of ours with another outcome than ok: the first word of it."""


def outcome(cell: Callable[[Wrap], None], wrap: Wrap) -> str:
    """Run a cell: `ok`, or why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cell(wrap)
    except WrongNumbers as e:
        return f"wrong numbers: {e}"
    except Exception as e:
        words = " ".join(str(e).split())
        return f"{type(e).__name__}: {words if len(words) <= 120 else words[:120].rpartition(' ')[0] + ' …'}"
    return "ok"


def kind(said: str) -> str:
    """Return an outcome without its particulars: `ok`, `wrong numbers` or the exception's name."""
    return said.partition(":")[0]


def page() -> dict[str, Any]:
    """Read the file that docs/support.md is made from."""
    return json.loads(PAGE.read_text("utf-8"))


def columns() -> dict[str, str]:
    """Return each cell's comparison, in its own words."""
    return {name: " ".join((cell.__doc__ or "").split()) for name, cell in CELLS.items()}
