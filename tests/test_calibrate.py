"""Calibration: the statistics are those of the tokens that count, shared inputs count once, and nothing else is kept or touched."""

import copy
import gc
import re
import sys

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.build import choose
from lora_lite.core import progress as _progress
from lora_lite.core.statistics import Statistics
from lora_lite.prepare.calibrate import gather

CALIBRATED = [
    ll.EVAConfig(r=4),
    ll.CorDAConfig(r=4),
    ll.ASVDConfig(r=4),
    *(ll.AntiPaSTOConfig(r=8, basis=basis) for basis in ("wanda", "corda", "asvd")),
]


def label(cfg):
    return f"{cfg.name}-{getattr(cfg, 'basis', '')}"


def measure(model, cfg, batches):
    return gather(model, choose(model, cfg), batches, progress=False)


def close(got, want, tolerance):
    assert (got.double() - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


def same(stats, x, tolerance=1e-12):
    """Hold statistics against direct ones over the tokens `(n, i)`, in float64."""
    x = x.double()
    assert stats.count == len(x)
    for got, want in (
        (stats.mean, x.mean(0)),
        (stats.mean_abs, x.abs().mean(0)),
        (stats.second_moment, x.T @ x / len(x)),
        (stats.covariance, torch.cov(x.T, correction=0)),
    ):
        close(got, want, tolerance)


def text(k, labels=True):
    g = torch.Generator().manual_seed(k)
    ids, mask = torch.randint(3, 64, (3, 6 + k), generator=g), torch.ones(3, 6 + k, dtype=torch.long)
    mask[0, 4:], mask[2, :2] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ids < 20, -100) if labels else ids}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("label_mask", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_statistics_are_those_of_the_unmasked_tokens(tiny, name, label_mask, dtype, tolerance):
    model, batches = tiny(name)[0].to(dtype), [text(k) for k in range(3)]
    cfg = ll.EVAConfig(r=4, label_mask=label_mask)
    stats = measure(model, cfg, batches)
    inputs, watched = {path: [] for path in stats}, copy.deepcopy(model)
    for path in stats:
        watched.get_submodule(path).register_forward_pre_hook(lambda _, args, path=path: inputs[path].append(args[0]))
    with torch.no_grad():
        for batch in batches:
            watched(**batch)
    keep = [(b["attention_mask"] == 1) & ((b["labels"] != -100) if label_mask else True) for b in batches]
    wide = [path for path in stats if inputs[path][0].dim() == 3]
    assert len(wide) >= 8
    for path in wide:
        same(stats[path], torch.cat([x[k] for x, k in zip(inputs[path], keep)]), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_large_mean_does_not_swamp_the_covariance(dtype, tolerance):
    x = (torch.randn(300, 8) * torch.arange(1, 9) + 100 * torch.arange(8)).to(dtype)
    stats = Statistics()
    for rows in x.split([1, 99, 50, 150]):
        stats = stats.add(rows)
    same(stats, x, tolerance)


def test_layers_with_the_same_input_share_one_statistic(tiny):
    model, batch = tiny("llama")
    stats = measure(model, ll.EVAConfig(r=4), [batch, batch])
    layer = "model.layers.1."
    assert stats[f"{layer}self_attn.q_proj"] is stats[f"{layer}self_attn.k_proj"] is stats[f"{layer}self_attn.v_proj"]
    assert stats[f"{layer}mlp.gate_proj"] is stats[f"{layer}mlp.up_proj"]
    assert len({id(s) for s in stats.values()}) == 2 * 4
    assert {s.count for s in stats.values()} == {2 * int(batch["attention_mask"].sum())}


class Fork(nn.Module):
    """Two layers with one input, until a batch sets them apart."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how = nn.Linear(5, 4), nn.Linear(5, 4), how

    def forward(self, x, apart):
        x = x + 0
        y = self.a(x)
        if apart:
            x = x.mul_(2) if self.how == "written" else 2 * x
        return y + self.b(input=x)


@pytest.mark.parametrize("how", ["written", "another"])
def test_sharing_ends_where_the_inputs_part(how):
    xs = torch.randn(4, 7, 5)
    apart = (False, True, False, True)
    stats = measure(Fork(how).double(), ll.EVAConfig(r=4), [(x.double(), flag) for x, flag in zip(xs, apart)])
    same(stats["a"], xs.reshape(-1, 5))
    same(stats["b"], torch.cat([2 * x if flag else x for x, flag in zip(xs, apart)]))


class Flat(nn.Module):
    """Layers over tokens in one axis, over one vector a row, and over tokens with a further axis."""

    def __init__(self):
        super().__init__()
        self.flat, self.pooled, self.heads = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(3, 2)

    def forward(self, x, attention_mask):
        return self.flat(x.reshape(-1, 6)), self.pooled(x[:, 0]), self.heads(x.unflatten(-1, (2, 3)))


def test_mask_is_matched_by_position():
    x, mask = torch.randn(4, 6, 6), torch.ones(4, 6)  # as many tokens as features: (4, 6) is also the shape of what is pooled
    mask[:, 3:] = 0
    stats = measure(Flat(), ll.EVAConfig(r=2), [{"x": x, "attention_mask": mask}])
    same(stats["flat"], x[:, :3].reshape(-1, 6), 1e-5)
    same(stats["pooled"], x[:, 0], 1e-5)
    same(stats["heads"], x[:, :3].reshape(-1, 3), 1e-5)


def test_memory_does_not_grow_with_the_data():
    model, held = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), []
    gc.collect()
    gc.freeze()  # what other tests left is not looked through for each batch

    def batches():
        for _ in range(12):
            gc.collect()
            held.append(sum(t.numel() for t in gc.get_objects() if type(t) is torch.Tensor))
            yield torch.randn(500, 8)

    measure(model, ll.EVAConfig(r=2), batches())
    assert held[2:] == [held[2]] * 10
    assert held[2] - held[0] < 500 * 8 + 1000  # the running batch and the sums, (8, 8) and (16, 16), but no input of the second layer


def test_users_model_is_untouched_and_runs_in_evaluation_mode():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    model[1].running_mean.fill_(0.3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x, random, tables = torch.randn(20, 6), torch.get_rng_state(), [(m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    stats = measure(model, ll.EVAConfig(r=2), [x])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert tables == [(m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    assert torch.equal(random, torch.get_rng_state())
    with torch.no_grad():
        same(stats["3"], copy.deepcopy(model).eval()[:3](x), 1e-5)
    adapt = ll.build(model, ll.EVAConfig(r=2), calibration=[x])
    assert not any(m._forward_pre_hooks for m in adapt.module(adapt.init()).modules())


@pytest.mark.parametrize("cfg", CALIBRATED, ids=label)
def test_loads_without_data_or_decomposition(cfg, tmp_path, monkeypatch):
    model, x = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10)), torch.randn(60, 12)
    adapt = ll.build(model, cfg, calibration=x.split(20))
    ll.save(adapt, adapt.init(seed=1), tmp_path / "a.safetensors")

    def refuse(*args, **kwargs):
        raise AssertionError("decomposed again")

    for name in ("eigh", "svd", "cholesky", "qr", "inv", "solve"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    again, params = ll.load(model, tmp_path / "a.safetensors")
    assert torch.equal(again(params, x), adapt(adapt.init(seed=1), x))
    for path, leaves in again.init(seed=1).items():
        assert all(torch.equal(leaf, params[path][name]) for name, leaf in leaves.items())


def test_configs_with_and_without_calibration_go_together():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(30, 8)
    cfgs = [cls(r=2, target_names=f"^{k}$") for k, cls in enumerate((ll.EVAConfig, ll.ASVDConfig, ll.LoRAConfig))]
    adapt = ll.build(model, cfgs, calibration=[x])
    assert torch.equal(adapt(adapt.init(), x), model(x))
    assert list(measure(model, cfgs, [x])) == ["0", "1"]


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x, attention_mask=None):
        return self.experts[0](x)


EVA = ll.EVAConfig(r=2)
X = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("cfg", "calibration", "error", "message"),
    [
        (EVA, None, ValueError, 'build: expected calibration data for "EVAConfig".*found none.*calibration=batches'),
        ([EVA, ll.LoRAConfig(target_names="1")], [X], ValueError, "in both"),
        (ll.LoRAConfig(), [X], ValueError, 'build: expected no calibration, since none of "LoRAConfig" uses data, found some'),
        (ll.AntiPaSTOConfig(r=4), [X], ValueError, "build: expected no calibration"),
        (EVA, [], ValueError, "build: expected at least one batch of calibration data, found none"),
        (EVA, {"x": X}, TypeError, r"expected calibration as an iterable of batches, found dict\. Wrap a single batch as \[batch\]"),
        (EVA, X, TypeError, "expected calibration as an iterable of batches, found Tensor"),
        (EVA, 3, TypeError, "expected calibration as an iterable of batches, found int"),
        (EVA, [X], ValueError, r'expected each calibrated layer to see a token, found none in 1 batches at "experts\.1"'),
        (EVA, [{"x": X, "attention_mask": torch.zeros(2, 3)}], ValueError, 'found none in 1 batches at "experts.0", "experts.1"'),
        (ll.EVAConfig(r=2, target_names="0"), [X, X / 0 * 0], ValueError, r'expected finite inputs.*found inf or nan at "experts\.0"'),
    ],
)
def test_refuses(cfg, calibration, error, message):
    with pytest.raises(error, match=message):
        ll.build(Routed(), cfg, calibration=calibration)


def test_error_in_a_batch_names_it():
    with pytest.raises(TypeError, match="expected batch as a mapping") as caught:
        ll.build(Routed(), EVA, calibration=[X, "text"])
    assert "in batch 1 of the calibration data" in caught.value.__notes__


def test_error_of_the_model_in_a_batch_says_what_both_have():
    with pytest.raises(TypeError, match="unexpected keyword") as caught:
        ll.build(Routed(), EVA, calibration=[{"x": X, "text": X}])
    assert re.search(r'The batch has x: .*, text: .*; Routed takes "x".*lies on cpu\. Pass batches as adapt', caught.value.__notes__[1])


@pytest.mark.parametrize("cfg", CALIBRATED, ids=label)
def test_constants_by_hand_says_what_it_lacks(cfg):
    with pytest.raises(ValueError, match=r"expected.*stats\.\w+ of.*found none"):
        cfg.constants(ll.Frozen(torch.randn(12, 12)), torch.Generator())
    with pytest.raises(ValueError, match=r"expected.*stats\.\w+ of.*12.*found shape"):
        cfg.constants(ll.Frozen(torch.randn(12, 12)), torch.Generator(), Statistics().add(torch.randn(20, 7)))


@pytest.mark.parametrize("tqdm", [True, False])
def test_progress_is_shown_and_can_be_switched_off(tqdm, capsys, monkeypatch):
    monkeypatch.setattr(_progress, "PATIENCE", 0.0)
    if not tqdm:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    model = nn.Sequential(nn.Linear(4, 4))
    ll.build(model, EVA, calibration=[torch.randn(9, 4)])
    shown = capsys.readouterr()
    assert "calibration" in shown.err
    assert not shown.out
    ll.build(model, EVA, calibration=[torch.randn(9, 4)], progress=False)
    assert capsys.readouterr().err == ""
