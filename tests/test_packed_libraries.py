"""Packed layers as other libraries make them. They are no part of the test extra: `tox -e packed` has them."""

import warnings

import pytest
import torch
from torch import nn

import lora_lite as ll
from packed_checks import check, close

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def library(name, why="is not installed: tox -e packed"):
    """Import a library, or skip the test with the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name.partition('.')[0]} {why}", exc_type=ImportError)


def linear(i=64, o=32):
    torch.manual_seed(0)
    return nn.Linear(i, o).requires_grad_(False)


def torchao(name):
    q = library("torchao.quantization")
    from torchao.prototype.mx_formats import inference_workflow as mx
    from torchao.quantization.granularity import PerGroup

    config = {
        "int8": lambda: q.Int8WeightOnlyConfig(),
        "fp8": lambda: q.Float8WeightOnlyConfig(),
        "int4": lambda: q.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "int8-activations": lambda: q.Int8DynamicActivationInt8WeightConfig(),
        "nvfp4": lambda: mx.NVFP4WeightOnlyConfig(),
    }[name]()
    model = nn.Sequential(linear())
    q.quantize_(model, config)
    return model[0], model[0].weight.dequantize()


def nf4():
    module = library("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    layer = linear()
    layer.weight = nn.Parameter(module.to_nf4(layer.weight.detach(), 64, 32), requires_grad=False)
    return layer, layer.weight.get_original_weight()


def quanto(name):
    q = library("optimum.quanto")
    model = nn.Sequential(linear(256))
    q.quantize(model, weights=getattr(q, name))
    q.freeze(model)
    return model[0], model[0].weight.dequantize()


def hqq(bits, axis):
    q = library("hqq.core.quantize")
    config = q.BaseQuantizeConfig(nbits=bits, group_size=16, axis=axis)
    layer = q.HQQLinear(linear(), config, compute_dtype=torch.float32, device="cpu")
    return layer, layer.dequantize()


def gptqmodel(bits, act_order=False):
    module = library("gptqmodel.nn_modules.qlinear.torch")
    i, o, group = 64, 32, 16
    kept = linear(i, o).half()
    layer = module.TorchLinear(bits=bits, group_size=group, sym=False, desc_act=act_order, in_features=i, out_features=o, bias=True)
    g = torch.Generator().manual_seed(0)
    index = torch.arange(i) // group
    index = index[torch.randperm(i, generator=g)] if act_order else index
    zeros = torch.randint(1, 1 << bits, (o, i // group), generator=g)
    scales = torch.rand(o, i // group, generator=g) / (1 << bits) / 4
    layer.pack(kept, scales, zeros, index.int())
    layer.post_init()
    library_s = type(layer).dequantize_weight(layer)  # not the one that post_init compiles
    return layer.eval(), library_s.t().float()


def gptqmodel_awq():
    module = library("gptqmodel.nn_modules.qlinear.torch_awq")
    i, o, group = 64, 32, 16
    kept = linear(i, o).half()
    layer = module.AwqTorchLinear(bits=4, group_size=group, sym=False, desc_act=False, in_features=i, out_features=o, bias=True)
    g = torch.Generator().manual_seed(0)
    zeros, scales = torch.randint(1, 16, (o, i // group), generator=g), torch.rand(o, i // group, generator=g) / 64
    layer.pack(kept, scales, zeros)
    layer.post_init()
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    return layer.eval(), dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, group).t().float()


def autoawq():
    module = library("awq.modules.linear.gemm")
    i, o, group = 64, 32, 16
    g = torch.Generator().manual_seed(0)
    zeros, scales = torch.randint(1, 16, (i // group, o), generator=g), torch.rand(i // group, o, generator=g).half() / 64
    layer = module.WQLinear_GEMM.from_linear(linear(i, o).half(), 4, group, scales=scales, zeros=zeros)
    from awq.utils.packing_utils import dequantize_gemm

    return layer.eval(), dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, group).t().float()


def autogptq(bits):
    module = library("auto_gptq.nn_modules.qlinear.qlinear_cuda_old", "0.7 does not import beside transformers 5")
    i, o, group = 64, 32, 16
    layer = module.QuantLinear(bits, group, i, o, True)
    g = torch.Generator().manual_seed(0)
    zeros, scales = torch.randint(1, 1 << bits, (o, i // group), generator=g), torch.rand(o, i // group, generator=g) / (1 << bits) / 4
    layer.pack(linear(i, o), scales, zeros.float(), None)
    eye = torch.eye(i)
    return layer.eval(), (layer(eye.to(layer.scales.dtype)).float() - layer.bias.float()).t()


def fp8(block):
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(module, "_dequantize_fp8_weight"):
        pytest.skip("this transformers has no function for the dense weight")
    i, o = 64, 32
    layer = module.FP8Linear(i, o, block_size=block, has_bias=True).requires_grad_(False)
    layer.weight.copy_(linear(i, o).weight)
    layer.weight_scale_inv.copy_(torch.rand(layer.weight_scale_inv.shape, generator=torch.Generator().manual_seed(0)))
    layer.bias.zero_()
    own = module._dequantize_fp8_weight(layer.weight, layer.weight_scale_inv, block, torch.float32)
    return layer.eval(), own


def of_transformers(name, cls, **options):
    module = pytest.importorskip(f"transformers.integrations.{name}")
    if not hasattr(module, cls):
        pytest.skip(f"this transformers has no {cls}")
    g, i, o = torch.Generator().manual_seed(0), 64, 32
    layer = getattr(module, cls)(i, o, bias=False, **options)
    layer.weight.data = torch.randint(0, 256, layer.weight.shape, generator=g).to(layer.weight.dtype)
    layer.weight_scale.data = torch.rand(layer.weight_scale.shape, generator=g) + 0.5
    if cls == "BitLinear":
        layer.weight.data = module.pack_weights(torch.randint(-1, 2, (o, i), generator=g).float())
        return layer.eval(), module.unpack_weights(layer.weight, torch.float32) / layer.weight_scale
    layer.weight_scale.data /= 128
    return layer.eval(), layer._dequantize_weights(torch.float32).detach()


def gguf_of_diffusers():
    utils, format = library("diffusers.quantizers.gguf.utils"), library("gguf")
    kind = format.GGMLQuantizationType.Q8_0
    blocks = format.quantize(linear(64, 32).weight.detach().numpy(), kind)
    layer = utils.GGUFLinear(64, 32, compute_dtype=torch.float32)
    layer.weight = utils.GGUFParameter(torch.from_numpy(blocks.copy()), quant_type=kind)
    return layer.eval(), utils.dequantize_gguf_tensor(layer.weight).float()


def bitnet():
    return of_transformers("bitnet", "BitLinear", dtype=torch.float32)


def gemma(bits):
    return of_transformers("gemma_quant", "QuantizedLinear", num_bits=bits)


LAYERS = {
    **{f"torchao-{name}": (torchao, (name,), "TensorClassKind") for name in ("int8", "fp8", "int4", "int8-activations", "nvfp4")},
    "torchao-nf4": (nf4, (), "TensorClassKind"),
    **{f"quanto-{name}": (quanto, (name,), "QuantoKind") for name in ("qint8", "qint4", "qint2", "qfloat8")},
    **{f"hqq-{bits}-{axis}": (hqq, (bits, axis), "HQQKind") for bits in (8, 4, 3, 2, 1) for axis in (0, 1)},
    **{f"gptqmodel-{bits}": (gptqmodel, (bits,), "GPTQModelKind") for bits in (2, 3, 4, 8)},
    "gptqmodel-act-order": (gptqmodel, (4, True), "GPTQModelKind"),
    "gptqmodel-awq": (gptqmodel_awq, (), "GPTQModelAWQKind"),
    "autoawq": (autoawq, (), "AWQKind"),
    **{f"auto-gptq-{bits}": (autogptq, (bits,), "AutoGPTQKind") for bits in (2, 3, 4, 8)},
    "bitnet": (bitnet, (), "BitLinearKind"),
    "gguf-diffusers": (gguf_of_diffusers, (), "DiffusersGgufKind"),
    **{f"gemma-{bits}": (gemma, (bits,), "GemmaKind") for bits in (2, 4, 8)},
    "fp8-block": (fp8, ((16, 16),), "FP8Kind"),
    "fp8-uneven": (fp8, ((24, 24),), "FP8Kind"),
    "fp8-whole": (fp8, (None,), "FP8Kind"),
}
HALF = ("gptqmodel", "autoawq", "auto-gptq")
"""Those that round the dense weight to float16."""
NO_FORWARD = ("fp8",)
"""Those whose own forward needs a GPU."""
NOISE = {"torchao-int8-activations": 0.05, "bitnet": 0.05, "autoawq": 5e-3, "gptqmodel": 5e-3, "auto-gptq": 5e-3}
"""How far a layer's own forward may lie from its dense weight: it quantises its inputs, or computes in float16."""


@pytest.mark.parametrize("name", LAYERS)
def test_an_adapter_is_that_of_the_dense_weight(name, tmp_path):
    make, args, kind = LAYERS[name]
    check(*make(*args), kind, tmp_path / "a.safetensors", 2e-3 if name.startswith(HALF) else 1e-5)


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith(NO_FORWARD)])
def test_the_base_is_the_library_s_own_forward(name):
    make, args, _ = LAYERS[name]
    layer, dense = make(*args)
    dtype = torch.float16 if name.startswith(HALF) else torch.float32
    x = torch.randn(5, dense.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    adapt = ll.build(nn.Sequential(layer), ll.LoRAConfig(r=2))
    with torch.no_grad():
        close(adapt.base(x).float(), layer(x).float(), next((v for k, v in NOISE.items() if name.startswith(k)), 1e-5))


def test_what_quanto_has_not_made_ready_is_refused():
    q = library("optimum.quanto")
    model = nn.Sequential(linear())
    q.quantize(model, weights=q.qint8)
    with pytest.raises(ValueError, match=r"is not quantised yet: freeze\(model\)"):
        ll.build(model, ll.LoRAConfig(r=2))
    q.freeze(model)
    ll.build(model, ll.LoRAConfig(r=2))
    other = nn.Sequential(linear())
    q.quantize(other, weights=q.qint8, activations=q.qint8)
    q.freeze(other)
    with pytest.raises(ValueError, match="quantises its activations"):
        ll.build(other, ll.LoRAConfig(r=2))
