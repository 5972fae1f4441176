"""No target is left out in silence: one whose own forward the model does not call is adapted all the same."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_lite as ll
from cases import move, tensors_of


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        x = self.lin(x)
        return self.attn(x, x, x)[0]


@pytest.mark.parametrize("cfg", [ll.LoRAConfig(r=2), ll.IA3Config(), ll.DoRAConfig(r=2)], ids=lambda c: c.name)
def test_output_projection_of_multihead_attention_is_adapted(device, cfg):
    model, x = Attention().to(device), torch.randn(2, 3, 16, device=device)
    adapt = ll.build(model, cfg)
    assert list(adapt.init()) == ["lin", "attn.out_proj"]
    params = move(adapt.init())
    merged = copy.deepcopy(model)
    assert not merged.load_state_dict(adapt.merge(params), strict=False).unexpected_keys
    torch.testing.assert_close(adapt(params, x), merged(x), rtol=1e-4, atol=1e-5)
    only = {path: {n: t if "attn" in path else torch.zeros_like(t) for n, t in leaves.items()} for path, leaves in params.items()}
    assert not torch.allclose(adapt(only, x), model(x), atol=1e-3)


@pytest.mark.parametrize(
    "cfg", [ll.LoRAConfig(r=4, exclude_names=("out_proj",)), ll.IA3Config(target_names="linear")], ids=lambda c: c.name
)
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # the user's own fused call uses them
def test_fused_encoder_is_really_adapted(cfg, activation, masked, device):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation=activation)
    model = nn.TransformerEncoder(layer, 2).to(device).eval()
    x = torch.randn(3, 5, 16, device=device)
    padding = torch.zeros(3, 5, dtype=torch.bool, device=device)
    padding[1, 3:] = True
    batch = {"src": x, "src_key_padding_mask": padding if masked else None}
    adapt = ll.build(model, cfg)
    params = move(adapt.init())
    with torch.no_grad():
        got, base = adapt(params, batch), adapt.base(batch)
        fused = model(**batch)
    slow = adapt({p: {n: t.requires_grad_() for n, t in leaves.items()} for p, leaves in params.items()}, batch)  # gradients: never fused
    keep = ~padding if masked else torch.ones_like(padding)
    assert float((got - base)[keep].abs().max()) > 1e-3
    assert torch.allclose(got[keep], slow[keep], atol=1e-6)
    assert torch.allclose(base[keep], fused[keep], atol=1e-6)


class ReadsTheWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.lin = nn.Linear(6, 4)

    def forward(self, x):
        return F.linear(self.first(x), self.lin.weight, self.lin.bias)


def test_weight_read_directly_is_adapted(device):
    model = ReadsTheWeight().to(device)
    x = torch.randn(2, 6, device=device)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    assert adapt.unused() == ["first", "lin"]
    assert torch.equal(adapt(adapt.init(), x), model(x))
    assert adapt.unused() == []
    merged = copy.deepcopy(model)
    merged.load_state_dict(adapt.merge(params), strict=False)
    torch.testing.assert_close(adapt(params, x), merged(x))


@pytest.mark.parametrize("set_on", ["first", ""], ids=["target", "root"])
def test_forward_set_on_the_instance_is_refused_by_name(set_on, device):
    model = ReadsTheWeight().to(device)
    module = model.get_submodule(set_on)
    module.forward = functools.partial(type(module).forward, module)
    with pytest.raises(ValueError, match=rf'found one set on the instance at "{set_on or "the model"}"|forward of its own at "{set_on}"'):
        ll.build(model, ll.LoRAConfig(r=2, exclude_names=("lin",)))


class Rescaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_packed_weight_of_a_subclass_with_another_forward_is_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 6), Rescaled(6, 6))
    model[1].weight = nn.Parameter(model[1].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r'forward of its own at "1" \(Rescaled\)'):
        ll.build(model, ll.LoRAConfig(r=2))


class Experts(nn.Module):
    """Route by a number: the other members are not called."""

    def __init__(self, members):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.members = members

    def forward(self, x, k):
        return self.members[k](self.first(x))


MEMBERS = {
    "list of layers": (lambda: nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), (1, 0, 2, 1)),
    "list of blocks": (lambda: nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3)), (1, 0, 2, 1)),
    "dict of blocks": (lambda: nn.ModuleDict({k: nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for k in ("de", "en")}), ("en", "de", "en")),
    "dict of layers": (lambda: nn.ModuleDict({k: nn.Linear(6, 6) for k in ("de", "en")}), ("en", "de", "en")),
}


@pytest.mark.parametrize(("members", "calls"), MEMBERS.values(), ids=MEMBERS)
def test_members_called_by_condition_are_no_error(members, calls, device):
    model = Experts(members()).to(device)
    x = torch.randn(2, 6, device=device)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    for k in calls:
        assert torch.equal(adapt(adapt.init(), (x, k)), model(x, k))
        assert not torch.allclose(adapt(params, (x, k)), model(x, k), atol=1e-3)


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(2))
        self.adapter_off = nn.Linear(6, 6)

    def forward(self, x, k):
        return self.experts[k](x)


def test_a_target_that_no_call_reaches_is_named_on_request(device):
    adapt = ll.build(Routed().to(device), ll.LoRAConfig(r=2))
    x = torch.randn(2, 6, device=device)
    adapt(adapt.init(), (x, 0))
    assert adapt.unused() == ["experts.1.0", "adapter_off"]
    adapt(adapt.init(), (x, 1))
    assert adapt.unused() == ["adapter_off"]


def test_decoder_alone_does_not_miss_the_encoder(tiny):
    model, batch = tiny("t5")
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    with torch.no_grad():
        hidden = model.encoder(batch["input_ids"], attention_mask=batch["attention_mask"])
        call = {"encoder_outputs": hidden, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
        assert torch.equal(adapt(adapt.init(), call).loss, model(**call).loss)


@pytest.mark.parametrize("name", ["qwen3_moe", "wav2vec2", "deberta_v2"])
def test_audited_model_gives_the_same_at_every_call(tiny, name):
    model, batch = tiny(name)
    adapt = ll.build(model, ll.LoRAConfig(r=2))
    params = move(adapt.init())
    first, second = adapt(params, batch), adapt(params, batch)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(first), tensors_of(second)))
