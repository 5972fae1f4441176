"""Every bad input is an error that says what was expected, what was found and how to fix it; and nothing changes."""

import copy
import dataclasses
import json
import math
import random
import re
from types import SimpleNamespace

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import lora_lite as ll
from lora_lite.variants.loreft import orthonormal

LoRA = ll.LoRAConfig


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.up_proj, self.down_proj, self.norm = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x):
        x = x + self.q_proj(self.norm(x))
        return x + self.down_proj(self.up_proj(x).tanh())


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.lm_head = nn.ModuleList([Block(), Block()]), nn.Linear(16, 9)
        self.config = SimpleNamespace(hidden_size=16)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def narrow():
    """The same paths, other widths."""
    model = Tiny()
    for layer in model.layers:
        layer.up_proj, layer.down_proj = nn.Linear(16, 24), nn.Linear(24, 16)
    return model


@pytest.fixture
def world(tmp_path):
    """A model, an `adapt`, its params and its file: what a case may break."""
    torch.manual_seed(0)
    model = Tiny().eval()
    adapt = ll.build(model, LoRA(r=4))
    params = adapt.init()
    ll.save(adapt, params, tmp_path / "good.safetensors")
    pissa = ll.build(model, ll.PiSSAConfig(r=4))
    ll.save(pissa, pissa.init(), tmp_path / "pissa.safetensors")
    dora = ll.build(model, ll.DoRAConfig(r=4))
    ll.save(dora, dora.init(), tmp_path / "dora.safetensors")
    (tmp_path / "folder").mkdir()
    return SimpleNamespace(
        model=model, adapt=adapt, params=params, x=torch.randn(2, 16), folder=tmp_path, good=tmp_path / "good.safetensors"
    )


def changed(params, path, **leaves):
    """Return params with leaves of one target changed; None takes a leaf away."""
    layer = {name: leaf for name, leaf in {**params[path], **leaves}.items() if leaf is not None}
    return {**params, path: layer}


def without(tree, key):
    return {k: v for k, v in tree.items() if k != key}


Q = "layers.0.q_proj"


def build(model=None, cfg=None, **options):
    return lambda w: ll.build(w.model if model is None else model(), LoRA() if cfg is None else cfg, **options)


def targets(**fields):
    return lambda w: ll.find_targets(w.model, LoRA(**fields))


def config(cls=LoRA, **fields):
    return lambda w: cls(**fields)


def call(change):
    return lambda w: w.adapt(change(w.params), w.x)


def variant(then=lambda adapt: None, **members):
    """Build with a variant of LoRA that has other methods or facts."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(type("Outside", (LoRA,), {**members, "__module__": __name__}))
    return lambda w: then(ll.build(w.model, cls(r=4)))


class Merges(ll.Kind):
    """A kind of `nn.Linear` that merges by itself."""

    classes = (nn.Linear,)
    returned = None

    def merged(self, f, params):
        return self.returned


def merged(returned):
    """Merge with a kind whose `merged` returns something else."""
    kind = type("Merges", (Merges,), {"returned": returned})

    def do(w):
        adapt = ll.build(w.model, LoRA(r=4, target_names=r"0\.q_proj$"), kinds=(kind,))
        return adapt.merge(adapt.init())

    return do


class Yields(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, x):
        yield self.proj(x)


# id: (what is done, the error, and the parts of its message in order: expected, found, fix)
BAD = {
    # targets
    "no name matches": (targets(target_names="q_prj$"),
        ValueError, 'LoRAConfig.target_names: expected "q_prj', "no match among 7", r'Closest: "(layers\.0\.)?q_proj'),
    "one of two names": (targets(target_names=("q_proj", "gate")),
        ValueError, 'target_names: expected "gate" to match', "no match", "Closest: "),
    "a name of excluded layers": (targets(target_names="lm_head"),
        ValueError, '"lm_head" to match a linear', "exclude_names", "Change"),
    "a name of other kinds": (targets(target_names="norm$"),
        ValueError, '"norm\\$" to match a linear', r"norm \(LayerNorm\)", "Name nn.Linear or Conv1D"),
    "everything excluded": (targets(exclude_names=("proj", "head")), ValueError, "at least one linear layer", "found none", "Widen one"),
    "a layer that is not there": (targets(layers=(0, 7)),
        ValueError, "LoRAConfig.layers: expected indices", r"\[7\].*blocks 0 to 1", r"among \[0, 1\]"),
    "a name outside the layers": (targets(target_names=r"0\.up", layers=(1,)),
        ValueError, r'"0\\\.up" to match a linear', r"layers=\(1,\)", "Change"),
    "one name outside the layers": (targets(target_names=(r"0\.up", "down"), layers=(1,)),
        ValueError, r'"0\\\.up" to match a linear', r"layers=\(1,\)", "Change"),
    "a role without a layer": (targets(target_roles="inner"),
        ValueError, "at least one linear layer", "found none.*d_model=16", "Widen one"),
    "one role without a layer": (targets(target_roles=("reader", "inner")),
        ValueError, 'a layer with role "inner"', "none with d_model=16", "Leave it out"),
    "no linear layer": (build(lambda: nn.Sequential(nn.Conv2d(1, 1, 1))),
        ValueError, "model with nn.Linear or Conv1D", "none in Sequential", "Name other layers, which are taken by name alone"),
    # fields of a config
    "role unknown": (config(target_roles="readers"), ValueError, "target_roles: expected any of", '"readers"', 'Did you mean "reader"'),
    "name not a regex": (config(target_names="q_proj("), ValueError, "target_names: expected a regular", r'"q_proj\(" \(', "Escape"),
    "exclude not a regex": (config(exclude_names="*"), ValueError, "exclude_names: expected a regular", r'"\*"', "Escape"),
    "names not strings": (config(target_names=(1,)), TypeError, "target_names: expected a string", r"\(1,\)", "Write it as"),
    "layers negative": (config(layers=(0, -1)), ValueError, "layers: expected block indices >= 0", r"\(0, -1\)", "Name at least one"),
    "layers empty": (config(layers=()), ValueError, "layers: expected block indices", r"\(\)", "None for all"),
    "layers a string": (config(layers="0"), TypeError, "layers: expected block indices", "'0'", "Write e.g. layers="),
    "r zero": (config(r=0), ValueError, "LoRAConfig.r: expected an integer >= 1", "0", "Set r to the rank"),
    "r a string": (config(r="8"), TypeError, "LoRAConfig.r: expected an integer >= 1", "'8'", "Set r to the rank"),
    "r True": (config(r=True), TypeError, "LoRAConfig.r: expected an integer >= 1", "True", "Set r to the rank"),
    "r a float": (config(ll.DoRAConfig, r=8.0), TypeError, "DoRAConfig.r: expected an integer >= 1", "8.0", "Set r to the rank"),
    "alpha nan": (config(alpha=float("nan")), ValueError, "LoRAConfig.alpha: expected a finite number >= 0", "nan", "Use e.g. alpha=16.0"),
    "alpha infinite": (config(alpha=float("inf")), ValueError, "LoRAConfig.alpha: expected a finite number >= 0", "inf", "Use e.g."),
    "alpha negative": (config(alpha=-1.0), ValueError, "LoRAConfig.alpha: expected a finite number >= 0", "-1.0", "Use e.g. alpha=16.0"),
    "alpha a string": (config(alpha="16"), TypeError, "LoRAConfig.alpha: expected a finite number >= 0", "'16'", "Use e.g. alpha=16.0"),
    "pissa's alpha zero": (config(ll.PiSSAConfig, alpha=0),
        ValueError, "PiSSAConfig.alpha: expected a finite number > 0", "0", "Use e.g. alpha=16.0"),
    "dropout one": (config(dropout=1.0), ValueError, r"dropout: expected a number in \[0.0, 1.0\)", "1.0", "Use e.g. dropout=0.0"),
    "dropout nan": (config(dropout=float("nan")), ValueError, "dropout: expected a number", "nan", "Use e.g. dropout=0.0"),
    "rslora a number": (config(rslora=1), TypeError, "rslora: expected True or False", "1", "Use e.g. rslora=False"),
    "dtype integer": (config(dtype=torch.int32), TypeError, "dtype: expected a floating", "torch.int32", "Use torch.float32"),
    "dtype unknown": (config(dtype="bf16"), TypeError, "dtype: expected a floating", "'bf16'", "Use torch.float32"),
    # build
    "pissa's r too large": (build(cfg=ll.PiSSAConfig(r=17)),
        ValueError, r"PiSSAConfig.r: expected at most min\(i, o\) = 16", "17", "Lower r"),
    "a class": (build(cfg=LoRA), TypeError, "build: expected a variant's config", "LoRAConfig", "Pass an instance"),
    "a dict": (build(cfg={"r": 8}), TypeError, "build: expected a variant's config", r"\{'r': 8\}", "Pass an instance"),
    "a string": (build(cfg="lora"), TypeError, "build: expected a variant's config", "'lora'", "Pass an instance"),
    "an empty list": (build(cfg=[]), ValueError, "build: expected a config or a non-empty sequence", "an empty one", "Pass e.g."),
    "a list with a class": (build(cfg=[LoRA(), ll.IA3Config]),
        TypeError, "build: expected a variant's config", "IA3Config", "Pass an instance"),
    "a model's class": (lambda w: ll.build(Tiny, LoRA()),
        TypeError, "build: expected model as a torch.nn.Module", "type", "Pass the model itself"),
    "two configs on a layer": (build(cfg=[LoRA(), ll.IA3Config(target_names="q_")]),
        ValueError, "each layer in one", f"{Q}.*LoRA.*IA3", "Narrow target_names"),
    "remat of nothing": (build(remat=r"blocks\.\d$"), ValueError, "build: expected remat=.* to match a block", "found none", "Closest: "),
    "remat not a regex": (build(remat="layers("), ValueError, "build: expected remat", r"layers\(", "Write e.g."),
    # params
    "missing path": (call(lambda p: without(p, Q)), ValueError, f'adapt: expected params .*"{Q}"', "found nothing", r"Use adapt.init\("),
    "missing leaf": (call(lambda p: changed(p, Q, B=None)), ValueError, "adapt: expected params", f'missing "{Q}.B"', r"Use adapt.init\("),
    "unexpected path": (call(lambda p: {**p, "head": {}}), ValueError, "adapt: expected params", 'unexpected "head"', r"Use adapt.init\("),
    "unexpected leaf": (call(lambda p: changed(p, Q, m=torch.ones(16))),
        ValueError, "adapt: expected", f'unexpected "{Q}.m"', r"Use adapt.init\("),
    "wrong shape": (call(lambda p: changed(p, Q, A=p[Q]["A"].t())),
        ValueError, f'"{Q}.A": expected shape .4, 16.', r"\(16, 4\)", r"Use adapt.init\("),
    "integer leaf": (call(lambda p: changed(p, Q, A=p[Q]["A"].int())),
        ValueError, f'"{Q}.A": expected a floating', "int32", r"Use adapt.init\("),
    "leaf not a tensor": (call(lambda p: changed(p, Q, A=[1.0])),
        ValueError, f'"{Q}.A": expected a tensor', "found list", r"Use adapt.init\("),
    "layer not a mapping": (call(lambda p: {**p, Q: p[Q]["A"]}),
        ValueError, f'"{Q}": expected a mapping with "A", "B"', "Tensor", r"Use adapt.init\("),
    "params a list": (call(lambda p: list(p.values())), ValueError, "adapt: expected params", "found list", r"Use adapt.init\("),
    "params None": (call(lambda p: None), ValueError, "adapt: expected params", "found NoneType", r"Use adapt.init\("),
    "another variant's tree": (lambda w: w.adapt(ll.build(w.model, ll.IA3Config()).init(), w.x),
        ValueError, "adapt: expected", "missing.*A", "Use adapt.init"),
    "another rank's tree": (lambda w: w.adapt(ll.build(w.model, LoRA(r=2)).init(), w.x),
        ValueError, r"expected shape \(4, 16\)", r"\(2, 16\)", "Use adapt.init"),
    "saving a wrong tree": (lambda w: ll.save(w.adapt, without(w.params, Q), w.good),
        ValueError, "save: expected params", "found nothing", "Use adapt.init"),
    "merging a wrong tree": (lambda w: w.adapt.merge(without(w.params, Q)),
        ValueError, "merge: expected params", "found nothing", "Use adapt.init"),
    "a module of a wrong tree": (lambda w: w.adapt.module({}), ValueError, "module: expected params", "found nothing", "Use adapt.init"),
    "steering a wrong tree": (lambda w: w.adapt.steer({}, 0.5), ValueError, "steer: expected params", "found nothing", "Use adapt.init"),
    "params of another module": (lambda w: w.adapt.params(w.model),
        ValueError, "adapt.params: expected a module made by", "found Tiny", "Pass the module itself"),
    # batches, seeds, values
    "batch a string": (lambda w: w.adapt(w.params, "text"),
        TypeError, "adapt: expected batch as a mapping", "found str", r"Wrap a single argument as \(argument,\)"),
    "batch a number": (lambda w: w.adapt(w.params, 3),
        TypeError, "adapt: expected batch as a mapping", "found int", "Wrap a single argument"),
    "batch None": (lambda w: w.adapt(w.params, None),
        TypeError, "adapt: expected batch as a mapping", "found NoneType", "Wrap a single argument"),
    "base's batch a set": (lambda w: w.adapt.base({1}), TypeError, "expected batch as a mapping", "found set", "Wrap a single argument"),
    "seed a float": (lambda w: w.adapt.init(seed=1.0),
        TypeError, "adapt.init: expected seed as an integer", "1.0", r"Use e.g. adapt.init\(seed=0\)"),
    "seed a string": (lambda w: w.adapt.init("0"), TypeError, "adapt.init: expected seed as an integer", "'0'", "Use e.g. adapt.init"),
    "seed None": (lambda w: w.adapt.init(None), TypeError, "adapt.init: expected seed as an integer", "None", "Use e.g. adapt.init"),
    "a loss by row": (lambda w: ll.value_and_grad(lambda p: w.adapt(p, w.x))(w.params),
        ValueError, "f to return a scalar", r"shape \(2, 9\)", "Reduce it"),
    "a loss that is no tensor": (lambda w: ll.value_and_grad(lambda p: 1.0)(w.params),
        ValueError, "f to return a scalar", "found float", "Reduce it"),
    "gradients of integers": (lambda w: ll.value_and_grad(lambda p: p)({"a": torch.ones(2).int()}),
        TypeError, "floating tensors", "int32", "Pass other"),
    "saving into no directory": (lambda w: ll.save(w.adapt, w.params, w.folder / "no" / "a"),
        FileNotFoundError, "save: expected the directory", "none", "Create it"),
    "saving onto a directory": (lambda w: ll.save(w.adapt, w.params, w.folder / "folder"),
        IsADirectoryError, "save: expected the path of a file", "the directory .*folder", "Name a file"),
    "leaves of a module": (lambda w: ll.tree_leaves(w.adapt.module(w.params)),
        TypeError, "tree_leaves: expected a tree", "Tiny", r"adapt.params\(module\)"),
    "leaves of a state dict": (lambda w: ll.tree_leaves(w.adapt.module(w.params).state_dict()),
        TypeError, "tree_leaves: expected a tree", "OrderedDict of Tensor", "as adapt.init returns them"),
    "a map of what load returned": (lambda w: ll.tree_map(torch.clone, ll.load(w.model, w.good)),
        TypeError, "tree_map: expected a tree", "tuple", "as adapt.init returns them"),
    "a map beside None": (lambda w: ll.tree_map(torch.add, w.params, None),
        TypeError, "tree_map: expected a tree", "NoneType", "as adapt.init returns them"),
    "a map beside a smaller tree": (lambda w: ll.tree_map(torch.add, w.params, without(w.params, Q)),
        ValueError, "tree_map: expected trees with the leaves of the first", f'without "{Q}.A"', "Map trees of one adapt"),
    "a mixed batch of a list of trees": (lambda w: w.adapt.mixed([w.params, w.params], w.x, [0, 1]),
        TypeError, "stack: expected a stack of params trees", "list", r"Make it with ll.stack\(\[params"),
    "members of a module": (lambda w: ll.unstack(w.adapt.module(w.params)),
        TypeError, "stack: expected a stack of params trees", "Tiny", "Make it with ll.stack"),
    "a stack of nothing": (lambda w: ll.stack(None),
        TypeError, "stack: expected trees as a list of params trees", "NoneType", "Call stack"),
    "a stack of state dicts": (lambda w: ll.stack([w.adapt.module(w.params).state_dict()] * 2),
        TypeError, "stack: expected tree 0 as a params tree", "OrderedDict", "Call stack"),
    "groups of a module": (lambda w: ll.lora_plus(w.adapt.module(w.params), lr=1e-3),
        TypeError, "lora_plus: expected params as a tree", "Tiny", r"Call lora_plus\(params"),
    "preconditioned gradients of another tree": (lambda w: ll.riemannian(w.params, changed(w.params, Q, A=torch.ones(2, 16))),
        ValueError, "riemannian: expected gradients that fit", r"\(2, 16\)", "Pass what ll.value_and_grad"),
    "projected gradients that are none": (lambda w: ll.lora_fa(w.params, None, scale=1.0),
        TypeError, "lora_fa: expected grads as a tree", "NoneType", r"Call lora_fa\(params, grads, scale"),
    "a budget of LoRA": (lambda w: ll.AdaLoRAConfig(total_step=9).update(w.params, w.params),
        ValueError, "AdaLoRAConfig.update: expected params of AdaLoRA", "none", "Pass the tree"),
    "a budget without gradients": (lambda w: ll.AdaLoRAConfig(total_step=9).update(w.params, {}),
        ValueError, "AdaLoRAConfig.update: expected gradients that fit", "nothing", "Pass what ll.value_and_grad"),
    "the orthogonality of LoRA": (lambda w: ll.variants.adalora.orthogonality(w.params),
        ValueError, "orthogonality: expected params of AdaLoRA", "none", "Pass the tree"),
    "the regularisation of LoRA": (lambda w: ll.variants.kasa.regularisation(w.params, {}, ll.KaSAConfig()),
        ValueError, "regularisation: expected params of KaSA", "none", "Pass the tree"),
    "a variant that is no list": (lambda w: ll.load(w.model, w.good, variants=LoRA),
        TypeError, "load: expected variants as a sequence", "LoRAConfig", r"Write \[ItsConfig\]"),
    "variants that are no classes": (lambda w: ll.load(w.model, w.good, variants=[LoRA()]),
        TypeError, "load: expected variants as a sequence", "LoRAConfig", r"Write \[ItsConfig\]"),
    "variants by name that are no classes": (lambda w: ll.load(w.model, w.good, variants={"lora": LoRA()}),
        TypeError, "load: expected variants as a sequence", "LoRAConfig", r"Write \[ItsConfig\]"),
    # fields, and what a variant returns
    "a rank by place": (lambda w: LoRA(4), TypeError, "LoRAConfig: expected fields by name", "4", r"LoRAConfig\(r=4\)"),
    "modules by place": (lambda w: ll.FullConfig("0"), TypeError, "expected fields by name", "0", r"FullConfig\(target_names='0'\)"),
    "tokens below 0": (config(ll.ALoRAConfig, invocation_tokens=(5, -1)),
        ValueError, "invocation_tokens: expected ids >= 0", "-1", "as the tokeniser"),
    "a partner that is no path": (variant(partner=lambda cfg, path: 3),
        TypeError, r'Outside.partner at "layers\.0\.q_proj": expected the path', "3", r"Return e\.g\."),
    "a group that is no mapping": (variant(share_groups=lambda cfg, layers: {Q: None}),
        TypeError, r'Outside.share_groups at "layers\.0\.q_proj": expected a mapping', "None", "Return a dict"),
    "a strength of nothing": (variant(lambda adapt: adapt.steer(adapt.init(), 0.5), steer=lambda cfg, params, c: {}),
        TypeError, "Outside.steer: expected params of shapes", "{}", "Return all"),
    "a fact that is a word": (variant(linear="no"), TypeError, "Outside.linear: expected True or False", "no", r"linear = True"),
    "a formula that is a number": (variant(trained=3), TypeError, "Outside.trained: expected a formula", "3", "Write"),
    "a tolerance below 0": (variant(identity=-1.0), ValueError, "Outside.identity: expected a tolerance >= 0", "-1", "Write"),
    "merged weights of no kind": (merged(None), TypeError, "Merges.merged: expected a mapping", "NoneType", "Return"),
    "merged weights that are numbers": (merged({"weight": 1.0}), TypeError, "Merges.merged: expected a mapping", "float", "Return"),
    "merged weights of another shape": (merged({"weight": torch.zeros(3, 3)}),
        ValueError, "merge: expected targets", r"Merges.merged returned 'weight' of shape \(3, 3\), found \(16, 16\)", "layout"),
    "a config of find_targets": (lambda w: ll.find_targets(w.model, None), TypeError, "find_targets: expected a variant", "None", "Pass"),
    # the model
    "a forward that yields": (build(Yields), ValueError, "build: expected a model whose call returns", r"Yields.forward is a gen", "Build"),
    "complex weights": (build(lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64))),
        ValueError, "build: expected real weights", r'"0 \(torch.complex64\)"', "Leave such"),
    # calibration and original weights
    "calibration on meta": (build(cfg=ll.EVAConfig(r=2), calibration=[torch.zeros(2, 16, device="meta")]),
        ValueError, "build: expected batch 0 of the calibration data with values", "on meta", "Make it on"),
    "a dataset for batches": (build(cfg=ll.EVAConfig(r=2), calibration=torch.utils.data.TensorDataset(torch.zeros(2, 16))),
        TypeError, "expected calibration as an iterable", "TensorDataset", "a dataset in a DataLoader"),
    "original weights that are a module": (lambda w: ll.build(w.model, ll.LoftQConfig(r=2), original=w.model),
        TypeError, "build: expected original as a state dict", "Tiny", "Call build"),
    "original weights that are numbers": (lambda w: ll.build(w.model, ll.LoftQConfig(r=2), original=dict.fromkeys(w.model.state_dict(), 3)),
        ValueError, "expected the original weights", r"layers\.0\.q_proj\.weight.*found int", "Pass"),
    # calls
    "an index by name": (lambda w: w.adapt.mixed(ll.stack([w.params]), w.x, {0: 0}),
        TypeError, "expected index as integers", "0: 0", "Give"),
    "an index without values": (lambda w: w.adapt.mixed(ll.stack([w.params]), w.x, torch.zeros(2, dtype=torch.long, device="meta")),
        ValueError, "adapt.mixed: expected index with values", "on meta", "Give"),
    "a module's index without values": (lambda w: w.adapt.module(ll.stack([w.params]), torch.zeros(2, dtype=torch.long, device="meta")),
        ValueError, "adapt.module: expected index with values", "on meta", "Give"),
    "an axis below 0": (lambda w: w.adapt.mixed(ll.stack([w.params] * 2), w.x, [0, 1], row_map={"proj": -1}),
        ValueError, "expected row_map to give 'proj' an axis >= 0", "-1", "Count"),
    "an axis that is not there": (lambda w: w.adapt.mixed(ll.stack([w.params] * 2), w.x, [0, 1], row_map={"proj": 5}),
        ValueError, r"expected row_map to give an axis of an input of shape \(2, 16\)", "5", "Count"),
    "a strength on meta": (lambda w: w.adapt.steer(w.params, torch.ones((), device="meta")),
        ValueError, "adapt.steer: expected c with a value", "on meta", "Pass a number"),
    "merged weights on meta": (lambda w: w.adapt.merge_error(w.params, {n: t.to("meta") for n, t in w.adapt.merge(w.params).items()}),
        ValueError, "merge_error: expected merged tensors with values", "on meta", "Pass what merge"),
    "a stack of integers": (lambda w: ll.stack([w.params, ll.tree_map(lambda p: p.long(), w.params)]),
        ValueError, "stack: expected dense leaves of a floating dtype", "int64 at .* in tree 1", "Convert"),
    "a Hessian of many values": (lambda w: ll.hvp(lambda p: w.adapt(p, w.x))(w.params, w.params),
        ValueError, "hvp: expected f to return a scalar tensor", "shape", "Reduce"),
    "a curvature of many values": (lambda w: ll.ggn_vp(lambda p: w.adapt(p, w.x), lambda y: y)(w.params, w.params),
        ValueError, "ggn_vp: expected loss_fn to return a scalar tensor", "shape", "Reduce"),
    "a complex loss": (lambda w: ll.value_and_grad(lambda p: w.adapt(p, w.x).sum() * 1j)(w.params),
        ValueError, "value_and_grad: expected f to return a real number", "complex64", "Return"),
    "checks that are a word": (lambda w: ll.set_typecheck("off"), TypeError, "set_typecheck: expected on as True", "str", "Call"),
    "a checked number": (lambda w: ll.checked(3), TypeError, "checked: expected fn as a function", "int", "Call"),
    "a negative rank of an SVD": (lambda w: ll.linalg.truncated_svd(torch.eye(3), -1),
        ValueError, "truncated_svd: expected", "r=-1", "Call"),
    "no rank of an SVD": (lambda w: ll.linalg.truncated_svd(torch.eye(3), None), TypeError, "expected r as an integer", "NoneType", "Call"),
    "a kind without a layer": (lambda w: ll.testing.check_kind(Merges, lambda: 3),
        TypeError, "check_kind: expected what make_layer returns as a layer", "int", "Call"),
    # files
    "remat of no block in a file": (lambda w: ll.load(w.model, w.good, remat="nope"),
        ValueError, 'load: expected remat="nope" to match', "none", "Closest"),
    "remat that is no regex in a file": (lambda w: ll.load(w.model, w.good, remat="("),
        ValueError, "load: expected remat as a regular", r"\(", "Write"),
    "a file for PEFT's folder": (lambda w: ll.from_peft(w.model, w.good),
        NotADirectoryError, "from_peft: expected a folder with adapter_config.json", "the file .*good", "Pass its folder.*ll.load"),
    "a folder inside that is none": (lambda w: ll.from_peft(w.model, w.folder, subfolder=None),
        TypeError, "from_peft: expected subfolder as the name", "NoneType", "Call from_peft"),
    "an empty path of PEFT's folder": (lambda w: ll.to_peft(w.adapt, w.params, ""),
        FileNotFoundError, "to_peft: expected the path of a folder", "an empty one", "Name a folder"),
    "tags in one string": (lambda w: ll.model_card(w.adapt, w.params, tags="math"),
        TypeError, "model_card: expected tags as a list", "str", "Call"),
    "a title that is none": (lambda w: ll.model_card(w.adapt, w.params, title=None),
        TypeError, "model_card: expected title as a string", "NoneType", "Call"),
    "results in a list": (lambda w: ll.model_card(w.adapt, w.params, metrics=[("a", 1)]),
        TypeError, "model_card: expected metrics as a mapping", "list", "Call"),
    "a licence in a list": (lambda w: ll.model_card(w.adapt, w.params, license=["mit"]),
        TypeError, "model_card: expected license as a string", "list", "Call"),
    "a base that is no name": (lambda w: ll.model_card(w.adapt, w.params, base=3),
        TypeError, "model_card: expected base as the name", "int", "Call"),
}  # fmt: skip


def snapshot(world):
    """The bytes of everything that a call could spoil."""
    model = {name: tensor.numpy().tobytes() for name, tensor in world.model.state_dict().items()}
    facts = [(type(m), m.training, len(m._forward_hooks), [p.requires_grad for p in m.parameters()]) for m in world.model.modules()]
    params = {f"{path}.{name}": leaf.numpy().tobytes() for path, leaves in world.params.items() for name, leaf in leaves.items()}
    files = {path.name: path.read_bytes() for path in world.folder.iterdir() if path.is_file()}
    return model, facts, params, files


def refuse(world, do, error, expected, found, fix):
    """Hold a call to its error, the three parts of the message in order, and nothing changed."""
    before = snapshot(world)
    with pytest.raises(error) as raised:
        do(world)
    assert type(raised.value) is error
    message = str(raised.value)
    head, _, tail = message.partition("found")
    assert "expected" in head, message
    assert tail, message
    assert re.search(f"{expected}.*{found}.*({fix})", message, re.DOTALL), message
    assert snapshot(world) == before


@pytest.mark.parametrize("case", BAD)
def test_a_bad_input_is_refused_with_expected_found_and_fix(world, case):
    refuse(world, *BAD[case])


def test_a_params_error_lists_every_fault_and_bounds_the_list(world):
    broken = changed(without(world.params, "layers.1.q_proj"), Q, A=torch.ones(3), B=None)
    with pytest.raises(ValueError, match="adapt: expected params") as raised:
        world.adapt({**broken, "head": {}}, world.x)
    for part in (
        'unexpected "head"',
        f'"{Q}.A": expected shape (4, 16), found (3,)',
        f'missing "{Q}.B"',
        '"layers.1.q_proj": expected a mapping',
    ):
        assert part in str(raised.value)
    with pytest.raises(ValueError, match=r"and 22 more") as raised:
        world.adapt({f"head{k}": {} for k in range(34)} | world.params, world.x)
    assert len(str(raised.value).splitlines()) < 20


# Files. Each row damages a good file: how, what `load` must say, on which model.


def rewritten(edit):
    """Return the good file's bytes with its tensors or its metadata changed in place by `edit(tensors, header)`."""

    def damage(world, source="good.safetensors"):
        with safetensors.safe_open(world.folder / source, framework="pt") as file:
            header, tensors = dict(file.metadata()), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        edit(tensors, header)
        return safetensors.torch.save(tensors, header)

    return damage


def header(key, edit):
    """Return the good file's bytes with one JSON value of its header changed in place."""

    def change(_, metadata):
        value = json.loads(metadata[key])
        metadata[key] = json.dumps(edit(value) or value)

    return rewritten(change)


def constants(variant, edit):
    """As `rewritten`, from the file of a variant that has constants."""
    return lambda world: rewritten(edit)(world, f"{variant}.safetensors")


def cut(length):
    return lambda world: world.good.read_bytes()[:length]


def pickled(world):
    torch.save(world.params, world.folder / "pickled")
    return (world.folder / "pickled").read_bytes()


def swapped(name, tensor):
    return lambda tensors, _: tensors.update({name: tensor})


BROKEN, FIT, AGAIN = "to be a whole safetensors file", "to fit this Tiny", "Load it onto the model that it was made for"
A, START, NORMS = f"{Q}.A", f"constant/{Q}.A0", f"constant/{Q}.sqnorm"

FILES = {
    "empty": (cut(0), BROKEN, "an empty file", "Save it again"),
    "one byte": (cut(1), BROKEN, "a truncated or foreign", "Save it again"),
    "the length only": (cut(8), BROKEN, "a truncated or foreign", "Save it again"),
    "half a header": (cut(200), BROKEN, "a truncated or foreign", "Save it again"),
    "half a file": (lambda w: w.good.read_bytes()[: w.good.stat().st_size // 2], BROKEN, "a truncated or foreign", "Save it again"),
    "a byte short": (cut(-1), BROKEN, "a truncated or foreign", "Save it again"),
    "a byte more": (lambda w: w.good.read_bytes() + b"\0", BROKEN, "a truncated or foreign", "Save it again"),
    "random bytes": (lambda w: random.Random(0).randbytes(4096), BROKEN, "a truncated or foreign", "Save it again"),
    "text": (lambda w: b"weights: 1, 2, 3\n" * 9, BROKEN, "a truncated or foreign", "Save it again"),
    "a pointer": (lambda w: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", BROKEN, "the pointer of git-lfs", "git lfs pull"),
    "pickled": (pickled, BROKEN, "a pickled file", "pickled files are never opened"),
    "cut, its length like a pickle's start": (lambda w: (0x280).to_bytes(8, "little") + b'{"a":', BROKEN, "a truncated", "Save"),
    "foreign": (lambda w: safetensors.torch.save({"a": torch.ones(2)}),
        "lora_lite format 1", "ll.save did not write", "Load a file written by"),
    "another version": (rewritten(lambda _, h: h.update(lora_lite_format="99")),
        "lora_lite format 1", "format version 99", "Load a file written by"),
    "header not JSON": (rewritten(lambda _, h: h.update(targets="{damaged")),
        "its configs and targets", "a damaged header", "Save it again"),
    "header without configs": (rewritten(lambda _, h: h.pop("configs")),
        "its configs and targets", "damaged header .*configs", "Save it again"),
    "configs not a list": (header("configs", lambda c: {"r": 4}), "its configs and targets", "a damaged header", "Save it again"),
    "a config not a mapping": (header("configs", lambda c: ["lora"]), "its configs and targets", "a damaged header", "Save it again"),
    "targets not a mapping": (header("targets", lambda t: list(t)), "targets", "a damaged header", "Save it again"),
    "a target without its width": (header("targets", lambda t: t[Q].pop("i") and None), "targets", "a damaged header", "Save it again"),
    "a target without its params": (header("targets", lambda t: t[Q].pop("params") and None),
        "targets", "a damaged header", "Save it again"),
    "a target of infinite width": (header("targets", lambda t: t[Q].update(i=math.inf)), "targets", "a damaged header", "Save it again"),
    "a target of no config": (header("targets", lambda t: t[Q].update(config=5)), "targets", "a damaged header", "Save it again"),
    "a config of no variant": (header("configs", lambda c: c[0].pop("name") and None), "configs", "a damaged header", "Save it again"),
    "a variant that is a number": (header("configs", lambda c: c[0].update(name=3)), "configs", "a damaged header", "Save it again"),
    "a shape that is a word": (header("targets", lambda t: t[Q].update(params="A")), "targets", "a damaged header", "Save it again"),
    "unknown variant": (header("configs", lambda c: c[0].update(name="loraa")),
        "one of the variants", '"loraa".*Closest: "lora"', r"load\(..., variants="),
    "unknown field": (header("configs", lambda c: c[0].update(rank=4)),
        "LoRAConfig: expected the fields", '"rank"', "Load the file with the version"),
    "a field of another type": (header("configs", lambda c: c[0].update(r="4")), "LoRAConfig.r: expected an integer", "'4'", "Set r to"),
    "a dtype that is none": (header("configs", lambda c: c[0].update(dtype="load")),
        "LoRAConfig.dtype: expected a floating torch.dtype", "'load'", "Use torch.float32"),
    "a header too deep": (rewritten(lambda _, h: h.update(configs="[" * 100_000)), "configs", "a damaged header", "Save it again"),
    "missing tensor": (rewritten(lambda t, _: t.pop(A)), FIT, f'missing "{A}"', AGAIN),
    "extra tensor": (rewritten(swapped("head.A", torch.ones(2))), FIT, 'unexpected "head.A"', AGAIN),
    "wrong shape": (rewritten(swapped(A, torch.ones(3, 16))), FIT, rf'"{A}": expected shape \(4, 16\), found \(3, 16\)', AGAIN),
    "integer tensor": (rewritten(swapped(A, torch.ones(4, 16, dtype=torch.int64))),
        FIT, f'"{A}": expected .*dtype.*, found .*int64', AGAIN),
    "missing constant": (constants("pissa", lambda t, _: t.pop(START)), FIT, f'missing "{START}"', AGAIN),
    "wrong constant": (constants("pissa", swapped(START, torch.ones(1, 16))),
        FIT, rf'{START}": expected shape \(4, 16\), found \(1, 16\)', AGAIN),
    "a constant that broadcasts": (constants("dora", swapped(NORMS, torch.ones(1))),
        FIT, rf'{NORMS}": expected shape \(16,\), found \(1,\)', AGAIN),
    "integer constant": (constants("pissa", swapped(START, torch.ones(4, 16, dtype=torch.int64))),
        FIT, f'{START}": expected .*found .*int64', AGAIN),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_damaged_file_is_refused_with_expected_found_and_fix(world, case):
    damage, expected, found, fix = FILES[case]
    bad = world.folder / "bad.safetensors"
    bad.write_bytes(damage(world))
    refuse(world, lambda w: ll.load(w.model, bad), ValueError, f".*{expected}", found, fix)


def test_a_wrong_value_in_a_file_names_its_field(world):
    bad = world.folder / "bad.safetensors"
    bad.write_bytes(header("configs", lambda c: c[0].update(r=0))(world))
    refuse(world, lambda w: ll.load(w.model, bad), ValueError, "LoRAConfig.r: expected an integer >= 1", "0", "Set r to the rank")


# id: (the model it is loaded onto, what `load` must say)
OTHERS = {
    "no such path": (lambda: nn.Sequential(Block(), Block()),
        "to fit this Sequential", r'"layers\.0\.q_proj": expected a linear layer, found nothing; closest: "0\.q_proj'),
    "other widths": (narrow, "to fit this Tiny", r'"layers\.0\.up_proj": expected a layer of shape \(32, 16\), found \(24, 16\)'),
    "other kinds": (lambda: nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"q_proj": nn.Identity()})])}),
        "to fit this ModuleDict", "found Identity"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_the_file_of_another_model_is_refused_with_each_fault(world, case):
    make, expected, found = OTHERS[case]
    refuse(world, lambda w: ll.load(make(), w.good), ValueError, f"load: expected .*{expected}", found, AGAIN)


def test_an_absent_file_is_named(world):
    absent = world.folder / "absent.safetensors"
    refuse(world, lambda w: ll.load(w.model, absent), FileNotFoundError, r'a file at ".*absent\.safetensors"', "none", "Pass the path")
    refuse(world, lambda w: ll.load(w.model, w.folder), FileNotFoundError, "a file at", "a directory", "read by ll.from_peft")


def test_a_file_of_image_tools_and_our_own_lead_to_their_readers(world):
    """The one was told of PEFT alone, the other that each tensor is of an unknown method."""
    there = world.folder / "kohya.safetensors"
    ll.to_kohya(world.adapt, world.params, there)
    refuse(world, lambda w: ll.load(w.model, there), ValueError, "format 1", "did not write", "image tools by ll.from_kohya")
    for read in (ll.from_kohya, ll.from_diffusers):
        refuse(world, lambda w, read=read: read(w.model, w.good), ValueError, "an image tool", "ll.save wrote", "Read it: ll.load")


def test_loading_onto_something_else_than_a_module_is_refused(world):
    refuse(
        world,
        lambda w: ll.load(w.good, w.model),
        TypeError,
        "load: expected model as a torch.nn.Module",
        "PosixPath|WindowsPath",
        r"Call load\(model, path\)",
    )


def test_rows_that_depend_on_each_other_have_no_orthonormal_ones():
    with pytest.raises(torch.linalg.LinAlgError):
        orthonormal(torch.eye(2, 8)[[0, 1, 0]])


@pytest.mark.parametrize("name", ["parameters", "to", "state_dict", "lm_head"])
def test_what_a_module_has_is_named_where_an_adapt_is_taken_for_one(world, name):
    with pytest.raises(AttributeError, match=rf"no attribute '{name}'\. It is a function .*use adapt\.module\(params\)\.{name}\."):
        getattr(world.adapt, name)
    assert getattr(world.adapt.module(world.params), name) is not None
    assert not hasattr(world.adapt, name)
    with pytest.raises(AttributeError, match=r"no attribute 'nowhere'\.$"):
        _ = world.adapt.nowhere
    assert torch.equal(copy.deepcopy(world.adapt)(world.params, world.x), world.adapt(world.params, world.x))
