"""Files of image tools: keys as the tools write them, by hand, against the formula; and what is refused, by name."""

import json

import peft
import pytest
import safetensors.torch
import torch
import transformers as tf
from torch import nn

import lora_lite as ll
from lora_lite.cli import main


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 12, bias=False), nn.ModuleList([nn.Linear(12, 8), nn.Dropout(0.0)])

    def forward(self, x):
        return self.to_out[0](self.to_q(x))


class UNet(nn.Module):
    """A convolution of 3, one of 1, and an attention, named as diffusers does."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.proj_in = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.down_blocks = nn.ModuleList([nn.ModuleDict({"attn1": Attention()})])

    def forward(self, x):
        return self.down_blocks[0]["attn1"](self.proj_in(self.conv_in(x)).flatten(2).mT)


Q, OUT = "down_blocks.0.attn1.to_q", "down_blocks.0.attn1.to_out.0"
PATHS = ("conv_in", "proj_in", Q, OUT)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@pytest.fixture
def unet():
    return UNet().eval()


def flat(path):
    return path.replace(".", "_")


def shape_of(unet, path):
    return tuple(unet.get_parameter(f"{path}.weight").shape)


def write(path, tensors, metadata=None):
    safetensors.torch.save_file({key: t.clone().contiguous() for key, t in tensors.items()}, path, metadata)
    return path


def lora_tensors(unet, r=2, alpha=3.0, names=("lora_down.weight", "lora_up.weight"), name=lambda path: f"lora_unet_{flat(path)}"):
    """Return tensors as kohya writes them, and the updates that they mean."""
    tensors, updates = {}, {}
    for path in PATHS:
        o, *kernel = shape_of(unet, path)
        down, up = draw(r, *kernel), draw(o, r, *([1] * (len(kernel) - 1)), seed=1)
        tensors |= {f"{name(path)}.{names[0]}": down, f"{name(path)}.{names[1]}": up}
        tensors |= {} if alpha is None else {f"{name(path)}.alpha": torch.tensor(alpha)}
        updates[path] = (1.0 if alpha is None else alpha / r) * (up.flatten(1) @ down.flatten(1)).reshape(o, *kernel)
    return tensors, updates


def assert_updates(unet, adapt, params, updates):
    assert {target.path for target in adapt.targets} == set(updates)
    merged = adapt.merge(params)
    for path, update in updates.items():
        moved = merged[f"{path}.weight"] - unet.get_parameter(f"{path}.weight")
        assert torch.allclose(moved, update, atol=1e-5), path


@pytest.mark.parametrize("alpha", [3.0, 0.25, None])
def test_lora_of_kohya(unet, tmp_path, alpha):
    tensors, updates = lora_tensors(unet, alpha=alpha)
    adapt, params = ll.from_kohya(unet, write(tmp_path / "a.safetensors", tensors))
    assert_updates(unet, adapt, params, updates)
    x = draw(2, 4, 5, 5)
    other = UNet()
    other.load_state_dict({**unet.state_dict(), **adapt.merge(params)})
    assert torch.allclose(adapt(params, x), other(x), atol=1e-4)
    assert not torch.allclose(adapt(params, x), unet(x), atol=1e-1)


def test_ranks_and_alphas_of_single_layers(unet, tmp_path):
    tensors, updates = lora_tensors(unet)
    for key, t in lora_tensors(unet, r=4, alpha=1.0)[0].items():
        tensors |= {key: t} if flat(Q) in key else {}
    updates[Q] = lora_tensors(unet, r=4, alpha=1.0)[1][Q]
    adapt, params = ll.from_kohya(unet, write(tmp_path / "a.safetensors", tensors))
    assert_updates(unet, adapt, params, updates)
    assert {cfg.r for cfg in adapt.configs} == {2, 4}


def test_core_between_the_factors_of_a_convolution(unet, tmp_path):
    down, mid, up = draw(2, 4, 1, 1), draw(2, 2, 3, 3), draw(8, 2, 1, 1)
    keys = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    path = write(tmp_path / "a.safetensors", {f"lora_unet_conv_in.{key}": t for key, t in keys.items()})
    composed = torch.einsum("or,rskl,sc->ockl", up[..., 0, 0], mid, down[..., 0, 0])
    assert_updates(unet, *ll.from_kohya(unet, path), {"conv_in": composed})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("alpha", [3.0, -3.0])
def test_narrow_dtypes_are_read_as_the_numbers_that_they_are(dtype, alpha, unet, tmp_path):
    """The core of a convolution is multiplied out in full, and signs can be turned: torch does neither in 8 bits."""
    down, mid, up = (draw(*shape).to(dtype) for shape in ((2, 4, 1, 1), (2, 2, 3, 3), (8, 2, 1, 1)))
    keys = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(alpha)}
    path = write(tmp_path / "a.safetensors", {f"lora_unet_conv_in.{key}": t for key, t in keys.items()})
    composed = torch.einsum("or,rskl,sc->ockl", up[..., 0, 0].float(), mid.float(), down[..., 0, 0].float())
    assert_updates(unet, *ll.from_kohya(unet, path), {"conv_in": alpha / 2 * composed})


def test_loha_of_lycoris(unet, tmp_path):
    tensors, updates = {}, {}
    for path in PATHS:
        o, *kernel = shape_of(unet, path)
        i, r = torch.Size(kernel).numel(), 3
        own = {"w1_a": draw(o, r), "w1_b": draw(r, i), "w2_a": draw(o, r, seed=2), "w2_b": draw(r, i, seed=3)}
        tensors |= {f"lora_unet_{flat(path)}.hada_{name}": t for name, t in own.items()}
        tensors[f"lora_unet_{flat(path)}.alpha"] = torch.tensor(1.5)
        updates[path] = (0.5 * (own["w1_a"] @ own["w1_b"]) * (own["w2_a"] @ own["w2_b"])).reshape(o, *kernel)
    adapt, params = ll.from_kohya(unet, write(tmp_path / "a.safetensors", tensors))
    assert_updates(unet, adapt, params, updates)
    assert {cfg.name for cfg in adapt.configs} == {"loha"}


def test_lokr_of_lycoris(unet, tmp_path):
    """Whole matrices mean a scale of 1, whatever alpha says; a factored one is scaled."""
    w1, w2 = draw(2, 2), draw(6, 4)
    a, b = draw(4, 1), draw(1, 6)
    kernel = draw(4, 2, 3, 3)
    tensors = {
        **{f"lora_unet_{flat(Q)}.lokr_w1": w1, f"lora_unet_{flat(Q)}.lokr_w2": w2, f"lora_unet_{flat(Q)}.alpha": torch.tensor(9.0)},
        **{f"lora_unet_{flat(OUT)}.lokr_w1": w1, f"lora_unet_{flat(OUT)}.lokr_w2_a": a, f"lora_unet_{flat(OUT)}.lokr_w2_b": b},
        **{f"lora_unet_{flat(OUT)}.alpha": torch.tensor(0.5)},
        **{"lora_unet_conv_in.lokr_w1": w1, "lora_unet_conv_in.lokr_w2": kernel, "lora_unet_conv_in.alpha": torch.tensor(1.0)},
    }
    updates = {
        Q: torch.kron(w1, w2),
        OUT: 0.5 * torch.kron(w1, a @ b),
        "conv_in": torch.einsum("ab,cdkl->acbdkl", w1, kernel).reshape(8, 4, 3, 3),
    }
    assert_updates(unet, *ll.from_kohya(unet, write(tmp_path / "a.safetensors", tensors)), updates)


KEYS_OF_DIFFUSERS = {
    "now": ("lora_A.weight", "lora_B.weight"),
    "before": ("lora.down.weight", "lora.up.weight"),
}


@pytest.mark.parametrize("names", KEYS_OF_DIFFUSERS.values(), ids=KEYS_OF_DIFFUSERS)
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_lora_of_diffusers(unet, tmp_path, names, alpha):
    tensors, updates = lora_tensors(unet, alpha=alpha, names=names, name=lambda path: f"unet.{path}")
    write(tmp_path / "pytorch_lora_weights.safetensors", tensors)
    assert_updates(unet, *ll.from_diffusers(unet, tmp_path), updates)


def test_attention_processors_of_diffusers(unet, tmp_path):
    attention = "unet.down_blocks.0.attn1.processor"
    tensors = {
        **{f"{attention}.to_q_lora.down.weight": draw(2, 8), f"{attention}.to_q_lora.up.weight": draw(12, 2)},
        **{f"{attention}.to_out_lora.down.weight": draw(2, 12), f"{attention}.to_out_lora.up.weight": draw(8, 2)},
    }
    updates = {Q: draw(12, 2) @ draw(2, 8), OUT: draw(8, 2) @ draw(2, 12)}
    assert_updates(unet, *ll.from_diffusers(unet, write(tmp_path / "a.safetensors", tensors)), updates)


def test_alpha_in_the_metadata_of_diffusers(unet, tmp_path):
    tensors, updates = lora_tensors(unet, alpha=None, names=KEYS_OF_DIFFUSERS["now"], name=lambda path: f"unet.{path}")
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 6, "unet.alpha_pattern": {"to_q": 1}})}
    adapt, params = ll.from_diffusers(unet, write(tmp_path / "a.safetensors", tensors, metadata))
    assert_updates(unet, adapt, params, {path: (0.5 if path == Q else 3.0) * update for path, update in updates.items()})


@pytest.mark.parametrize("read", [ll.from_kohya, ll.from_diffusers])
def test_file_of_peft_is_not_read_without_its_config(unet, tmp_path, read):
    adapt = ll.build(unet, ll.LoRAConfig(r=2))
    ll.to_peft(adapt, adapt.init(), tmp_path / "peft")
    with pytest.raises(ValueError, match=rf'{read.__name__}: .*one of PEFT.s, whose scale is in adapter_config.*ll\.from_peft\(model, "'):
        read(unet, tmp_path / "peft" / "adapter_model.safetensors")


METADATA = {
    "pissa": ({"init_lora_weights": "pissa"}, "to ask for a plain LoRA, found pissa"),
    "dora": ({"use_dora": True}, "to ask for a plain LoRA, found dora"),
    "bias": ({"lora_bias": True}, "to ask for a plain LoRA, found lora_bias"),
    "another method": ({"peft_type": "ADALORA", "total_step": 9}, "to ask for a plain LoRA, found adalora"),
    "a field of the future": ({"from_the_future": True}, "from_the_future: expected it off, found True"),
    "patterns": ({"alpha_pattern": "x"}, "alpha_pattern: expected numbers by expression, found 'x'"),
    "no expression": ({"alpha_pattern": {"(": 1}}, r"alpha_pattern: expected regular expressions, found '\('"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_asks_for_more_than_the_factors_is_refused(unet, tmp_path, case):
    fields, message = METADATA[case]
    tensors, _ = lora_tensors(unet, alpha=None, names=KEYS_OF_DIFFUSERS["now"], name=lambda path: f"unet.{path}")
    own = {f"unet.{name}": value for name, value in {"r": 2, "lora_alpha": 6, **fields}.items()}
    place = write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(own)})
    with pytest.raises(ValueError, match=rf"(?s)from_diffusers: expected .*{message}"):
        ll.from_diffusers(unet, place)


def test_whole_config_of_peft_in_the_metadata_is_read(unet, tmp_path):
    tensors, updates = lora_tensors(unet, alpha=None, names=KEYS_OF_DIFFUSERS["now"], name=lambda path: f"unet.{path}")
    fields = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], use_rslora=True, init_lora_weights="gaussian").to_dict()
    own = {f"unet.{name}": list(value) if isinstance(value, set) else value for name, value in fields.items()}
    place = write(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(own)})
    assert_updates(unet, *ll.from_diffusers(unet, place), {path: 6 / 2**0.5 * update for path, update in updates.items()})


TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "eos_token_id": 2}
OLDER = {
    "kohya": (ll.from_kohya, "lora_te1", "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_{}.weight", ("down", "up")),
    "diffusers": (ll.from_diffusers, "text_encoder", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight", "AB"),
}


@pytest.mark.parametrize("tool", OLDER)
@pytest.mark.parametrize("of", [tf.CLIPTextModel, tf.CLIPTextModelWithProjection])
def test_text_encoder_under_the_names_of_older_transformers(tool, of, tmp_path):
    read, prefix, key, ends = OLDER[tool]
    torch.manual_seed(0)
    model = of(tf.CLIPTextConfig(**TEXT))
    pair = {key.format(end): draw(*shape) for end, shape in zip(ends, ((2, 32), (32, 2)))}
    alphas = {f"{prefix}.lora_alpha": 2, f"{prefix}.alpha_pattern": {"^text_model.encoder.layers.0.self_attn.q_proj": 6}}
    metadata = {"lora_adapter_metadata": json.dumps(alphas)} if tool == "diffusers" else None
    adapt, params = read(model, write(tmp_path / "a.safetensors", pair, metadata), prefix=prefix)
    path = next(path for path, _ in model.named_modules() if path.endswith("encoder.layers.0.self_attn.q_proj"))
    down, up = pair.values()
    assert_updates(model, adapt, params, {path: (3.0 if metadata else 1.0) * (up @ down)})
    ll.to_kohya(adapt, params, tmp_path / "b.safetensors", prefix="lora_te1" + "_text_model" * path.startswith("encoder"))
    with safetensors.safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert OLDER["kohya"][2].format("up") in file.keys()  # noqa: SIM118
    again, same = ll.from_kohya(model, tmp_path / "b.safetensors")
    assert torch.equal(again.merge(same)[f"{path}.weight"], adapt.merge(params)[f"{path}.weight"])


WRITTEN = {
    "lora": ll.LoRAConfig(r=2, alpha=3.0, target_names=PATHS),
    "lora, rank-stabilised": ll.LoRAConfig(r=3, alpha=3.0, rslora=True, target_names=PATHS),
    "loha": ll.LoHaConfig(r=2, alpha=3.0, target_names=PATHS),
    "lokr": ll.LoKrConfig(r=1, alpha=3.0, decompose_both=True, decompose_factor=4, target_names=PATHS),
    "lokr, whole": ll.LoKrConfig(r=64, alpha=3.0, decompose_factor=2, target_names=PATHS),
}


@pytest.mark.parametrize("cfg", WRITTEN.values(), ids=WRITTEN)
def test_written_and_read_again(unet, tmp_path, cfg):
    adapt = ll.build(unet, cfg)
    params = ll.tree_map(lambda p: p + draw(*p.shape), adapt.init(seed=0))
    ll.to_kohya(adapt, params, tmp_path / "a.safetensors")
    again, read = ll.from_kohya(unet, tmp_path / "a.safetensors")
    x = draw(2, 4, 5, 5)
    want = adapt(params, x) - unet(x)
    assert torch.allclose(again(read, x) - unet(x), want, rtol=1e-4, atol=1e-4 * float(want.detach().abs().max()))
    if cfg.name != "lora":
        with pytest.raises(ValueError, match="to_lora"):
            ll.to_diffusers(adapt, params, tmp_path / "b.safetensors")
        return
    ll.to_diffusers(adapt, params, tmp_path / "b.safetensors")
    again, read = ll.from_diffusers(unet, tmp_path / "b.safetensors")
    assert torch.allclose(again(read, x) - unet(x), want, rtol=1e-4, atol=1e-4 * float(want.detach().abs().max()))
    tensors = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert tensors["unet.conv_in.lora_A.weight"].shape == (cfg.r, 4, 3, 3)
    assert tensors["unet.conv_in.lora_B.weight"].shape == (8, cfg.r, 1, 1)
    tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert tensors["lora_unet_conv_in.lora_down.weight"].shape == (cfg.r, 4, 3, 3)
    assert tensors[f"lora_unet_{flat(OUT)}.alpha"].shape == ()


def test_one_part_of_a_pipeline(unet, tmp_path):
    tensors, updates = lora_tensors(unet)
    tensors |= {"lora_te1_text_model_q_proj.lora_down.weight": draw(2, 3), "lora_te1_text_model_q_proj.lora_up.weight": draw(3, 2)}
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=r"'lora_te1', 'lora_unet'.* prefix="):
        ll.from_kohya(unet, path)
    assert_updates(unet, *ll.from_kohya(unet, path, prefix="lora_unet"), updates)
    text = nn.ModuleDict({"text_model": nn.ModuleDict({"q_proj": nn.Linear(3, 3)})})
    assert [t.path for t in ll.from_kohya(text, path, prefix="lora_te1")[0].targets] == ["text_model.q_proj"]
    with pytest.raises(ValueError, match="'lora_te2'"):
        ll.from_kohya(unet, path, prefix="lora_te2")


def test_ambiguous_names_are_refused(tmp_path):
    model = nn.ModuleDict({"a": nn.ModuleDict({"b_c": nn.Linear(4, 4)}), "a_b": nn.ModuleDict({"c": nn.Linear(4, 4)})})
    path = write(tmp_path / "a.safetensors", {"lora_unet_a_b_c.lora_down.weight": draw(1, 4), "lora_unet_a_b_c.lora_up.weight": draw(4, 1)})
    with pytest.raises(ValueError, match=r'lora_unet_a_b_c": ambiguous.*a\.b_c.*a_b\.c'):
        ll.from_kohya(model, path)
    adapt = ll.build(model, ll.LoRAConfig(r=1, target_names=r"a\.b_c"))
    with pytest.raises(ValueError, match=r"a\.b_c.*a_b\.c"):
        ll.to_kohya(adapt, adapt.init(), tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


REFUSED = {
    "another model": ({"lora_unet_mid.lora_down.weight": draw(1, 4), "lora_unet_mid.lora_up.weight": draw(4, 1)}, "no such layer"),
    "half a layer": ({"lora_unet_conv_in.lora_down.weight": draw(1, 4, 3, 3)}, "no lora_up.weight"),
    "DoRA": ({"lora_unet_conv_in.dora_scale": draw(8, 1)}, '"lora_unet_conv_in.dora_scale", of another method .* Merge the file by'),
    "two methods": ({"lora_unet_conv_in.lora_down.weight": draw(1, 4, 3, 3), "lora_unet_conv_in.hada_w1_a": draw(8, 1)}, "no method alone"),
    "another width": ({"lora_unet_conv_in.lora_down.weight": draw(1, 5, 3, 3), "lora_unet_conv_in.lora_up.weight": draw(8, 1)}, "shape"),
    "a product of other sizes": ({"lora_unet_proj_in.lokr_w1": draw(2, 2), "lora_unet_proj_in.lokr_w2": draw(2, 4)}, "whose product"),
    "a kernel that lies": (
        {"lora_unet_conv_in.lora_down.weight": draw(2, 12, 3, 1), "lora_unet_conv_in.lora_up.weight": draw(8, 2)},
        "kernel",
    ),
    "nothing": ({}, "no tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_files(unet, tmp_path, case):
    tensors, expected = REFUSED[case]
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(ValueError, match=expected):
        ll.from_kohya(unet, path)


def test_refused_variants_and_places(unet, tmp_path):
    for cfg in (ll.DoRAConfig(r=2), ll.LoRAConfig(r=2, lora_bias=True)):
        adapt = ll.build(unet, cfg)
        with pytest.raises(ValueError, match=r"ll\.to_lora"):
            ll.to_kohya(adapt, adapt.init(), tmp_path / "a.safetensors")
    with pytest.raises(FileNotFoundError, match="none"):
        ll.from_kohya(unet, tmp_path / "none.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"\x80\x02pickle")
    with pytest.raises(ValueError, match="never opened"):
        ll.from_diffusers(unet, tmp_path / "b.safetensors")
    with pytest.raises(TypeError, match="from_kohya"):
        ll.from_kohya(tmp_path, unet)
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


def test_command_line_with_files_of_image_tools(unet, tmp_path, capsys):
    tensors, updates = lora_tensors(unet)
    tensors |= {"lora_te_q_proj.lora_down.weight": draw(2, 3), "lora_te_q_proj.lora_up.weight": draw(3, 2)}
    write(tmp_path / "a.safetensors", tensors)
    write(tmp_path / "base.safetensors", unet.state_dict())
    run = lambda *args: main([str(arg) for arg in args])  # noqa: E731
    base = ("--base", tmp_path / "base.safetensors", "--prefix", "lora_unet")
    assert run("info", tmp_path / "a.safetensors") == 0
    assert "lora_te_q_proj" in capsys.readouterr().out
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 2
    assert "--base" in capsys.readouterr().err
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", *base) == 0
    assert_updates(unet, *ll.load(unet, tmp_path / "b.safetensors"), updates)
    assert run("convert", tmp_path / "b.safetensors", tmp_path / "c.safetensors", "--to", "kohya") == 0
    assert_updates(unet, *ll.from_kohya(unet, tmp_path / "c.safetensors"), updates)
    assert run("convert", tmp_path / "b.safetensors", tmp_path / "d.safetensors", "--to", "diffusers") == 0
    assert_updates(unet, *ll.from_diffusers(unet, tmp_path / "d.safetensors"), updates)
    assert run("convert", tmp_path / "b.safetensors", tmp_path / "peft") == 0
    assert_updates(unet, *ll.from_peft(unet, tmp_path / "peft"), updates)
    merge = ("merge", tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "m.safetensors")
    assert run(*merge, "--prefix", "lora_unet") == 0
    merged = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert all(torch.allclose(merged[f"{path}.weight"] - unet.get_parameter(f"{path}.weight"), updates[path], atol=1e-5) for path in PATHS)
