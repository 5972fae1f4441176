"""CLOVER: the paper's factors with the core between them, in one layer and across two, and heads that have no core."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import lora_lite as ll
from cases import assert_trees_equal, derived, move
from lora_lite.testing import check_variant


def layer(o=12, i=10, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(o, i, generator=g, dtype=torch.float64)
    return ll.Frozen(weight, torch.randn(o, generator=g, dtype=torch.float64) if bias else None)


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("h", [1, 4, 6])
def test_is_the_papers_core_between_its_factors(h, bias):
    W, cfg = layer(bias=bias), ll.CLOVERConfig(head_dim=h)
    _, constants = derived(cfg, W)
    dT, x = draw(12 // h, h, h), draw(3, 10, seed=2)
    ones = torch.cat([x, torch.ones(3, 1, dtype=x.dtype)], 1) if bias else x
    rows = torch.cat([W.weight, W.bias[:, None]], 1) if bias else W.weight
    want = []
    for head, core in zip(rows.split(h), dT):
        Q, R = torch.linalg.qr(head.t())
        signs = R.diagonal().sign()
        want.append(ones @ (Q * signs) @ (signs[:, None] * R + core))
    y = cfg.forward({"dT": dT}, W.with_constants(constants), x)
    torch.testing.assert_close(y, torch.cat(want, 1), rtol=0, atol=1e-10)


def test_free_cores_span_the_same_functions():
    W, x, dT = layer(), draw(3, 10, seed=2), draw(3, 4, 4)
    qr, free = ll.CLOVERConfig(head_dim=4), ll.CLOVERConfig(head_dim=4, core="free")
    _, constants = derived(qr, W)
    assert derived(free, W)[1] == {}
    want = qr.forward({"dT": dT}, W.with_constants(constants), x)
    torch.testing.assert_close(free.forward({"dT": constants["R_inv"] @ dT}, W, x), want, rtol=0, atol=1e-10)


def test_the_coordinates_are_orthonormal_ones_of_the_weight():
    W = layer(bias=False)
    R_inv = derived(ll.CLOVERConfig(head_dim=4), W)[1]["R_inv"]
    for head, inverse in zip(W.weight.split(4), R_inv):
        Q = head.t() @ inverse
        torch.testing.assert_close(Q.t() @ Q, torch.eye(4, dtype=Q.dtype), rtol=0, atol=1e-12)
        assert (inverse.diagonal() > 0).all()


def test_a_core_reaches_the_outputs_of_its_head_alone():
    W, cfg, x = layer(), ll.CLOVERConfig(head_dim=4), draw(3, 10, seed=2)
    params, constants = derived(cfg, W)
    dT = params["dT"].double().index_fill(0, torch.tensor([1]), 1.0)
    moved = cfg.forward({"dT": dT}, W.with_constants(constants), x) != W(x)
    assert moved[:, 4:8].all()
    assert not moved[:, :4].any()
    assert not moved[:, 8:].any()


def test_a_head_whose_rows_depend_on_each_other_trains_its_map_itself():
    weight = layer(bias=False).weight
    W, cfg, x, dT = ll.Frozen(torch.cat([weight[:1], weight[:11]])), ll.CLOVERConfig(head_dim=4), draw(3, 10, seed=2), draw(3, 4, 4)
    _, constants = derived(cfg, W)
    assert torch.equal(constants["R_inv"][0], torch.eye(4, dtype=dT.dtype))
    got, free = cfg.forward({"dT": dT}, W.with_constants(constants), x), ll.CLOVERConfig(head_dim=4, core="free").forward({"dT": dT}, W, x)
    assert torch.equal(got[:, :4], free[:, :4])
    assert (got[:, 4:] != free[:, 4:]).all()


def test_what_does_not_fit_a_layer_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"CLOVERConfig.head_dim: expected a divisor of o = 12, found 5. Use e.g. "):
        derived(ll.CLOVERConfig(head_dim=5), layer())
    with pytest.raises(ValueError, match=r'CLOVERConfig.head_dim: expected at most 10, .*found 12. Use core="free"'):
        derived(ll.CLOVERConfig(head_dim=12), layer(bias=False))


class Attention(nn.Module):
    """Attention with grouped queries: `heads` of the queries, `groups` of the keys and values."""

    def __init__(self, d=10, h=3, heads=4, groups=2):
        super().__init__()
        self.h, self.heads, self.groups = h, heads, groups
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, h * n) for n in (heads, groups, groups))
        self.o_proj = nn.Linear(h * heads, d)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, self.h)).transpose(-2, -3) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (t.repeat_interleave(self.heads // self.groups, -3) for t in (k, v))
        mixed = (q @ k.mT).softmax(-1) @ v
        return self.o_proj(mixed.transpose(-2, -3).flatten(-2))


def factors(attention, constants):
    """Return the paper's `U`, `S` and `Z^T` of each head, `(H, d, h)`, `(H, h)` and `(H, h, d)`, from what is stored."""
    share = attention.heads // attention.groups
    out = attention.o_proj.weight.unflatten(1, (-1, attention.h)).transpose(0, 1)
    values = attention.v_proj.weight.unflatten(0, (-1, attention.h)).repeat_interleave(share, 0)
    U, Zt = out @ constants["C_inv"], constants["G_inv"] @ values
    return U, (U.mT @ out @ values @ Zt.mT), Zt


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return nn.ModuleDict({"attn": Attention()}).double().requires_grad_(False)


CFG = ll.CLOVERConfig(head_dim=3, core="vo", target_names="o_proj", dtype=torch.float64)


@pytest.fixture
def built(attention):
    return attention["attn"], ll.build(attention["attn"], CFG).constants["o_proj"], {"dT": draw(4, 3, 3)}


def test_the_joint_factors_are_the_singular_vectors_of_both_weights(built):
    attention, constants, _ = built
    U, S, Zt = factors(attention, constants)
    eye = torch.eye(3, dtype=S.dtype).expand(4, 3, 3)
    torch.testing.assert_close(U.mT @ U, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(Zt @ Zt.mT, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(S, torch.diag_embed(S.diagonal(dim1=1, dim2=2)), rtol=0, atol=1e-12)
    for head, singular in enumerate(S.diagonal(dim1=1, dim2=2)):
        both = attention.o_proj.weight[:, 3 * head : 3 * head + 3] @ attention.v_proj.weight[3 * (head // 2) : 3 * (head // 2) + 3]
        torch.testing.assert_close(singular, torch.linalg.svdvals(both)[:3], rtol=0, atol=1e-12)


def test_the_joint_core_is_the_papers_model_through_attention(built):
    attention, constants, params = built
    x, o_proj = draw(2, 5, 10, seed=3), attention.o_proj
    U, S, Zt = factors(attention, constants)
    theirs = Attention(groups=4).double().requires_grad_(False)  # a head of the values for each of the queries
    theirs.q_proj.load_state_dict(attention.q_proj.state_dict())
    for name in ("weight", "bias"):
        heads = getattr(attention.k_proj, name).unflatten(0, (-1, 3)).repeat_interleave(2, 0).flatten(0, 1)
        getattr(theirs.k_proj, name).copy_(heads)
    bias = attention.v_proj.bias.unflatten(0, (-1, 3)).repeat_interleave(2, 0)[..., None]
    theirs.v_proj.weight.copy_(Zt.flatten(0, 1))
    theirs.v_proj.bias.copy_((constants["G_inv"] @ bias).flatten())
    theirs.o_proj.weight.copy_((U @ (S + params["dT"])).transpose(0, 1).flatten(1))
    theirs.o_proj.bias.copy_(o_proj.bias)
    adapt = ll.build(attention, CFG)
    torch.testing.assert_close(adapt({"o_proj": params}, x), theirs(x), rtol=0, atol=1e-10)
    assert float((theirs(x) - attention(x)).abs().max()) > 0.1


def test_the_joint_core_starts_at_the_base_and_needs_the_values_at_build_alone(attention, tmp_path):
    attention, x = attention["attn"].float(), draw(2, 5, 10).float()
    adapt = ll.build(attention, ll.CLOVERConfig(head_dim=3, core="vo", target_names="o_proj"))
    assert torch.equal(adapt(adapt.init(), x), attention(x))
    params = move(adapt.init())
    ll.save(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.load(attention, tmp_path / "a.safetensors")
    assert_trees_equal(read, params)
    assert torch.equal(again(read, x), adapt(params, x))


@dataclass(frozen=True, kw_only=True)
class Given(ll.CLOVERConfig):
    """The joint core with values of its own, for layers that have none beside them."""

    name = "given"
    core: str = "vo"

    def partner(self, path):
        return None

    def constants(self, W, generator, stats=None):
        return super().constants(W, generator, ll.Frozen(torch.randn(W.in_features // 2, 20, generator=generator).to(W.dtype)))


def test_the_joint_core_passes_the_kit():
    check_variant(Given(head_dim=4))


def test_partners_that_are_missing_or_do_not_fit_are_named(attention):
    with pytest.raises(
        ValueError, match=r'partner of each target of CLOVERConfig.*\n.*"attn.o_proj": expected a linear layer at "attn.value"'
    ):
        ll.build(attention, ll.CLOVERConfig(head_dim=3, core="vo", target_names="o_proj", values="value"))
    with pytest.raises(ValueError, match=r"CLOVERConfig.values: expected the name of a projection whose heads of 4 divide the 12 inputs"):
        ll.build(attention, ll.CLOVERConfig(head_dim=4, core="vo", target_names="o_proj"))
    with pytest.raises(ValueError, match=r'clover: expected W as a Frozen with the constants C_inv and G_inv for core="vo", found none'):
        ll.functional.clover({"dT": draw(4, 3, 3)}, attention["attn"].o_proj.weight, draw(2, 12), core="vo")
