"""`combine`: a weighted sum of adapters, or a merge of them by other methods, as one adapter. It works on updates, not on params."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lora_lite.adapt import Adapt
from lora_lite.core.alike import made_alike
from lora_lite.core.errors import listed, nearest, require_type, several
from lora_lite.core.progress import shown
from lora_lite.core.tracing import require_read
from lora_lite.core.tree import AnyTree, Tree, tree_map
from lora_lite.prepare.start import generator_for
from lora_lite.transforms.held import Held, assembled, hold
from lora_lite.transforms.merging import METHODS, Method
from lora_lite.transforms.places import Part, Place, places_of
from lora_lite.transforms.updates import Update, lost, norm

CALL = "combine(adapt, trees, weights)"


@made_alike
def combine(
    adapt: Adapt | Sequence[Adapt],
    trees: Sequence[AnyTree],
    weights: Sequence[float] | Tensor,
    method: str = "cat",
    r: int | None = None,
    density: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Adapt, Tree, dict[str, float]]:
    """Combine adapters of linear variants into one whose update is the weighted sum of theirs, or their merge by another method.

    An update is the change of a layer's weight and bias, so that a weight of 1 is the adapter itself, -1 its opposite and 0 the base model.
    Variants whose update is linear in their params (IA3, BitFit, SHiRA, ...) keep their form in a sum, modules trained as a whole and
    trained tokens always. All others become LoRA of scale 1, with a bias where one was moved.

    Args:
        adapt: the adapted model of all trees, or one for each tree, over the same frozen weights. Their configs may differ.
        trees: the params trees of K adapters, at least one. They are constants: no gradient goes back to them.
        weights: a number for each, `(K,)`, of either sign; dimensionless. With `"cat"` and `"linear"` and no `r` the params are
            differentiable in a tensor of them.
        method: `"cat"` or `"linear"`, the sum, with the factors side by side or on one basis of at most the layer's own rank; `"svd"`, its
            best approximation. `"magnitude_prune"` and `"dare_linear"`, the sum of each one's largest or of random entries; `"ties"` and
            `"dare_ties"`, the mean of those of them that agree in sign.
        r: rank of every target's LoRA, >= 1 and no more than the widest layer has; what it does not hold is lost. None for that of all of a
            sum, and for the largest adapter's elsewhere.
        density: share of the entries that are kept, in (0, 1], for the four methods that take some; the others do not read it.
        seed: of the random entries, for `"dare_linear"` and `"dare_ties"`, any integer.
        progress: show a progress bar on stderr when it takes more than a second.

    Returns:
        `(adapt, params, errors)`: an `Adapt` over the frozen weights of the first, its params in at least float32, and for each target the
        Frobenius norm of what is lost over that of the combined update: rounding only where it is exact. Where the updates cancel, it is
        over theirs.

    Raises:
        ValueError: where a tree does not fit its adapt or is of a `torch.func` transform, `torch.vmap` maps over the weights, adapts are of
            other weights, a variant is not linear, a module is trained as a whole in one adapter and adapted in another, or an argument is
            out of range; it names each target.
        TypeError: where an argument is of another type, as in another order.

    Example:
        >>> import torch, lora_lite as ll
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6, bias=False))
        >>> lora, dora = ll.build(model, ll.LoRAConfig(r=2)), ll.build(model, ll.DoRAConfig(r=1))
        >>> a, b = (ll.tree_map(lambda p: p + 0.1, adapt.init()) for adapt in (lora, dora))
        >>> both, params, errors = ll.combine([lora, dora], [a, b], [1.0, -0.5])
        >>> x = torch.ones(1, 8)
        >>> wanted = model(x) + (lora(a, x) - model(x)) - 0.5 * (dora(b, x) - model(x))
        >>> bool(((both(params, x) - wanted).abs() < 1e-5).all()), errors["0"] < 1e-6
        (True, True)
    """
    parts = _parts(adapt, trees)
    strengths, tracked = _strengths(weights, len(parts))
    how = _method(method, density)
    if tracked:
        _require_differentiable(how, method, r)
    require_type(isinstance(seed, Integral) and not isinstance(seed, bool), CALL, "seed", "an integer", seed)
    _require_rank(r, places := places_of(parts))
    return _combined(parts, shown(places, "combine", progress), strengths, how, r, density, seed)


def _combined(
    parts: Sequence[Part], places: Iterable[Place], weights: Sequence[Tensor], how: Method, r: int | None, density: float | None, seed: int
) -> tuple[Adapt, Tree, dict[str, float]]:
    found: list[Held] = []
    errors, faults = {}, []
    for place in places:
        try:
            updates = place.updates(parts)
        except ValueError as e:
            faults.append(f'"{place.path}": {type(place.cfg).__name__} {e}')
            continue
        names = dict.fromkeys(name for update in updates for name in update)
        own = [weights[k].to(updates[0][next(iter(names))].device) for k, _ in place.owners]
        generator = generator_for(seed, place.path)
        wanted: Update = {}
        for name in names:
            having = [(update[name], w) for update, w in zip(updates, own) if name in update]
            wanted[name] = how([t for t, _ in having], [w for _, w in having], density, generator)
        held = hold(parts, place, updates, wanted, own, how.keep if r is None else None, r)
        terms = math.hypot(*(float(w.detach()) * norm(t.detach() for t in update.values()) for w, update in zip(own, updates)))
        errors[place.path] = lost(held.update, wanted, terms)
        found.append(held)
    if faults:
        raise ValueError(f"combine: expected targets whose update can be told, found:\n{several(faults)}\nLeave them out when building.")
    return *assembled(parts, found, r), errors


def _parts(adapt: Any, trees: Any) -> list[Part]:
    """Pair each tree with its adapt, and check that it fits."""
    one = isinstance(adapt, Adapt)
    several_adapts = isinstance(adapt, Sequence) and len(adapt) > 0 and all(isinstance(a, Adapt) for a in adapt)
    require_type(one or several_adapts, CALL, "adapt", "what build or load returned, or a list of them, one for each tree", adapt)
    in_list = isinstance(trees, Sequence) and not isinstance(trees, str)
    require_type(in_list, CALL, "trees", "a list of params trees; ll.unstack(stacked) makes one of a stack", trees)
    if not trees:
        raise ValueError("combine: expected at least one params tree, found none. Pass e.g. [params_a, params_b].")
    adapts = [adapt] * len(trees) if one else list(adapt)
    if len(adapts) != len(trees):
        raise ValueError(
            f"combine: expected one adapt for all trees, or one for each of {len(trees)}, found {len(adapts)}. Pair them in the same order."
        )
    for k, (own, tree) in enumerate(zip(adapts, trees)):
        require_type(isinstance(tree, Mapping), CALL, f"tree {k}", "a params tree, e.g. adapt.init()", tree)
        own._require_whole("combine")
        own._require(tree, f"combine (tree {k})")
        own._require_finite(tree, f"combine (tree {k})")
    known = {id(own): own for own in adapts}
    # Plain autograd would take a part of the way for the gradient: the factors of an update are found without one.
    constant = [tree_map(lambda p: p.detach() if p.requires_grad else p, tree) for tree in trees]
    return [Part(known[id(own)], tree) for own, tree in zip(adapts, constant)]


def _strengths(weights: Any, count: int) -> tuple[list[Tensor], bool]:
    """Return the weights in float64, one tensor each, and whether a gradient is asked of them."""
    in_list = isinstance(weights, Sequence) and not isinstance(weights, str)
    numbers = in_list and all(isinstance(w, Tensor | Real) and not isinstance(w, bool) for w in weights)
    tensors = [w for w in ([weights] if isinstance(weights, Tensor) else weights if numbers else ()) if isinstance(w, Tensor)]
    real = not any(w.dtype is torch.bool or w.is_complex() or w.is_meta for w in tensors)
    require_type((numbers or isinstance(weights, Tensor)) and real, CALL, "weights", "a list of numbers, or a tensor of them", weights)
    shape = tuple(weights.shape) if isinstance(weights, Tensor) else (len(weights),)
    if shape != (count,):
        raise ValueError(f"combine: expected weights of shape ({count},), one for each tree, found {shape}. Give each tree its weight.")
    given = [w if isinstance(w, Tensor) else torch.tensor(float(w), dtype=torch.float64) for w in weights]
    tracked = torch.is_grad_enabled() and any(w.requires_grad or torch._C._functorch.is_gradtrackingtensor(w) for w in given)
    require_read(given, "combine", "weights", mapped=True)
    strange = [w for w in given if w.dim() or not math.isfinite(float(w.detach()))]
    if strange:
        raise ValueError(f"combine: expected finite numbers as weights, found {strange[0].detach().tolist()}. Give each tree one.")
    return [w.to(torch.float64) for w in given], tracked


def _method(method: Any, density: Any) -> Method:
    if not isinstance(method, str) or method not in METHODS:
        wanted, ends = (str(method), "_svd")
        if wanted.endswith(ends) and wanted.removesuffix(ends) in METHODS:
            way = f'Here every method works on updates, as that one of PEFT does: method="{wanted.removesuffix(ends)}", with r for svd_rank'
        else:
            way = f"Did you mean {nearest(wanted, METHODS, 1)}?"
        raise ValueError(f"combine: expected method to be any of {listed(METHODS, 9)}, found {method!r}. {way}.".replace("?.", "?"))
    number = isinstance(density, Real) and not isinstance(density, bool)
    if density is None and METHODS[method].prune is None:
        return METHODS[method]
    if not number or not 0 < density <= 1:
        raise ValueError(
            f"combine: expected density in (0, 1], the share of entries that {method!r} keeps, found {density!r}. Use e.g. density=0.5."
        )
    return METHODS[method]


def _require_differentiable(how: Method, method: str, r: int | None) -> None:
    if how.keep is None or r is not None:
        raise ValueError(
            f"combine: expected weights without a gradient for method={method!r}{'' if r is None else f' with r={r}'}, found a tensor that "
            'has one. Use "cat" or "linear" without r to search strengths by gradient, or pass weights.detach().'
        )


def _require_rank(r: Any, places: Sequence[Place]) -> None:
    if r is None:
        return
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"combine: expected r as an integer >= 1, found {r!r}. Set r to the rank of the result, or leave it out.")
    most = max((min(place.target.i, place.target.o) for place in places if not place.whole and not place.rows), default=None)
    if most is not None and r > most:
        raise ValueError(
            f"combine: expected r of at most {most}, the most that any of these layers has, found {r}. Lower r, or leave it out."
        )
