"""Packed layers built by hand in other libraries' layouts, each with the dense weight that it stands for.

The packing is written code by code from the layouts' descriptions, apart from the library's unpacking. The classes bear the names that
the kinds know them by.
"""

import pytest
import torch
from torch import nn

WIDTH_IN, WIDTH_OUT, GROUP = 32, 32, 8


def named(name: str, module: str, base: type = nn.Module, **members):
    """Make a class of that name which says it is of that module, with a forward that cannot be used."""

    def forward(self, x):
        raise AssertionError(f"{name}.forward is not to be called")

    return type(name, (base,), {"__module__": module, "forward": forward, **members})


def _groups(bits: int, g: torch.Generator):
    """Draw codes `(o, i)`, and a scale and a zero for each group of inputs `(o, i / GROUP)`."""
    codes = torch.randint(0, 1 << bits, (WIDTH_OUT, WIDTH_IN), generator=g)
    zeros = torch.randint(1, 1 << bits, (WIDTH_OUT, WIDTH_IN // GROUP), generator=g)
    scales = (torch.rand(WIDTH_OUT, WIDTH_IN // GROUP, generator=g) * 0.2 / (1 << bits) + 0.01).half()
    return codes, scales, zeros


def _stream(values, bits: int) -> list[int]:
    """Write values after one another, lowest bits first, into int32 words."""
    whole = sum(int(v) << bits * k for k, v in enumerate(values))
    words = [whole >> 32 * k & 0xFFFFFFFF for k in range(len(values) * bits // 32)]
    return [w - (1 << 32) if w >> 31 else w for w in words]


def _columns(values: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.tensor([_stream(column, bits) for column in values.t().tolist()], dtype=torch.int32).t().contiguous()


def gptq(bits: int, library: str, act_order: bool = False):
    g = torch.Generator().manual_seed(bits)
    codes, scales, zeros = _groups(bits, g)
    group = torch.arange(WIDTH_IN) // GROUP
    group = group[torch.randperm(WIDTH_IN, generator=g)] if act_order else group
    old = library == "auto_gptq"
    names = (
        ("QuantLinear", "auto_gptq.nn_modules.qlinear.qlinear_cuda_old") if old else ("TorchLinear", "gptqmodel.nn_modules.qlinear.torch")
    )
    layer = named(*names)()
    sizes = ("infeatures", "outfeatures") if old else ("in_features", "out_features")
    vars(layer).update({sizes[0]: WIDTH_IN, sizes[1]: WIDTH_OUT, "bits": bits})
    layer.register_buffer("qweight", _columns(codes.t(), bits))
    layer.register_buffer("qzeros", _columns(zeros - int(old), bits).t().contiguous())
    layer.register_buffer("scales", scales.t().contiguous())
    layer.register_buffer("g_idx", group.int())
    layer.register_buffer("bias", torch.randn(WIDTH_OUT, generator=g).half())
    return layer, scales[:, group].float() * (codes - zeros[:, group])


def awq(library: str):
    g = torch.Generator().manual_seed(0)
    codes, scales, zeros = _groups(4, g)
    names, bits = {
        "awq": (("WQLinear_GEMM", "awq.modules.linear.gemm"), "w_bit"),
        "gptqmodel": (("AwqTorchLinear", "gptqmodel.nn_modules.qlinear.torch_awq"), "bits"),
    }[library]
    layer = named(*names)()
    vars(layer).update({"in_features": WIDTH_IN, "out_features": WIDTH_OUT, bits: 4, "bias": None})
    order = torch.tensor([8 * block + k for block in range(WIDTH_OUT // 8) for k in (0, 2, 4, 6, 1, 3, 5, 7)])
    layer.register_buffer("qweight", _columns(codes[order], 4).t().contiguous())
    layer.register_buffer("qzeros", _columns(zeros[order], 4).t().contiguous())
    layer.register_buffer("scales", scales.t().contiguous())
    group = torch.arange(WIDTH_IN) // GROUP
    return layer, scales[:, group].float() * (codes - zeros[:, group])


def hqq(bits: int, axis: int, **changed):
    g = torch.Generator().manual_seed(bits)
    rows, columns = (GROUP, WIDTH_OUT * WIDTH_IN // GROUP) if axis == 0 else (WIDTH_OUT * WIDTH_IN // GROUP, GROUP)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=g)
    one = (1, columns) if axis == 0 else (rows, 1)
    scale, zero = torch.rand(one, generator=g) * 0.1, torch.rand(one, generator=g) * (1 << bits)
    lanes = 10 if bits == 3 else 8 // bits
    step = -(-rows // lanes)
    padded = torch.zeros(step * lanes, columns, dtype=torch.long)
    padded[:rows] = codes
    packed = torch.zeros(step, columns, dtype=torch.long)
    for lane in range(lanes):
        packed |= padded[lane * step : (lane + 1) * step] << bits * (lanes - 1 - lane)
    layer = named("HQQLinear", "hqq.core.quantize")()
    kept = torch.int32 if bits == 3 else torch.uint8
    layer.W_q = nn.Parameter(packed.to(kept), requires_grad=False)
    meta = {
        "nbits": bits,
        "shape": torch.Size((WIDTH_OUT, WIDTH_IN)),
        "scale": scale,
        "zero": zero,
        "axis": axis,
        "quant_scale": False,
        "quant_zero": False,
    }
    meta["packing"] = "3bit_32" if bits == 3 else f"{bits}bit_u8"
    meta |= {"view_as_float": changed.get("view_as_float", False), "unpack_view_dtype": kept, "group_size": GROUP}
    if changed.get("view_as_float"):
        layer.W_q = nn.Parameter(packed.to(kept).view(torch.float32), requires_grad=False)
    if changed.get("zero_scale"):
        meta |= {"zero_scale": torch.stack((meta.pop("zero"), meta.pop("scale")))}
    vars(layer).update(meta=meta | {k: v for k, v in changed.items() if k.startswith("quant")}, compute_dtype=torch.float32)
    layer.bias = torch.randn(WIDTH_OUT, generator=g)
    return layer, ((codes - zero) * scale).reshape(WIDTH_OUT, WIDTH_IN)


def fp8(block: tuple[int, int] | None, scales: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(WIDTH_OUT, WIDTH_IN, generator=g).to(torch.float8_e4m3fn)
    if block is None:
        scale = torch.tensor(0.1)
        dense = weight.float() * scale
    else:
        scale = torch.exp2(torch.randint(-4, 0, (-(-WIDTH_OUT // block[0]), -(-WIDTH_IN // block[1])), generator=g).float())
        dense = torch.stack(
            [torch.stack([weight[o, i].float() * scale[o // block[0], i // block[1]] for i in range(WIDTH_IN)]) for o in range(WIDTH_OUT)]
        )
    layer = named("FP8Linear", "transformers.integrations.finegrained_fp8", nn.Linear)(WIDTH_IN, WIDTH_OUT)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight_scale_inv = nn.Parameter(scale.to(scales), requires_grad=False)
    layer.block_size = block
    return layer, dense


def fbgemm():
    g = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(WIDTH_OUT, WIDTH_IN, generator=g).to(torch.float8_e4m3fn), torch.rand(WIDTH_OUT, 1, generator=g)
    layer = named("FbgemmFp8Linear", "transformers.integrations.fbgemm_fp8", nn.Linear)(WIDTH_IN, WIDTH_OUT)
    layer.weight, layer.weight_scale = (nn.Parameter(t, requires_grad=False) for t in (weight, scale))
    return layer, weight.float() * scale


def compressed():
    layer, dense = fbgemm()
    own = named("CompressedTensorsFP8Linear", "transformers.integrations.compressed_tensors", nn.Linear)(WIDTH_IN, WIDTH_OUT)
    own.weight, own.weight_scale = layer.weight, nn.Parameter(layer.weight_scale.t().contiguous(), requires_grad=False)
    return own, dense


def bitnet():
    g = torch.Generator().manual_seed(0)
    entries = torch.randint(-1, 2, (WIDTH_OUT, WIDTH_IN), generator=g)
    layer, quarter = named("BitLinear", "transformers.integrations.bitnet")(), WIDTH_OUT // 4
    vars(layer).update(in_features=WIDTH_IN, out_features=WIDTH_OUT, bias=None, rms_norm=None)
    packed = [[sum(int(entries[k * quarter + o, i] + 1) << 2 * k for k in range(4)) for i in range(WIDTH_IN)] for o in range(quarter)]
    layer.register_buffer("weight", torch.tensor(packed, dtype=torch.uint8))
    layer.register_buffer("weight_scale", torch.tensor([3.0]))
    return layer, entries / 3.0


def gemma(bits: int):
    g = torch.Generator().manual_seed(bits)
    low, each = -(1 << bits - 1), 8 // bits
    codes, scale = torch.randint(low, -low, (WIDTH_OUT, WIDTH_IN), generator=g), torch.rand(WIDTH_OUT, 1, generator=g) / -low
    layer = named("QuantizedLinear", "transformers.integrations.gemma_quant", nn.Linear)(WIDTH_IN, WIDTH_OUT)
    packed = [[sum((int(c) - low) << bits * k for k, c in enumerate(row[n : n + each])) for n in range(0, WIDTH_IN, each)] for row in codes]
    stored = codes.to(torch.int8) if bits == 8 else torch.tensor(packed, dtype=torch.uint8)
    layer.weight, layer.weight_scale = (nn.Parameter(t, requires_grad=False) for t in (stored, scale))
    layer.num_bits = bits
    return layer, codes * scale


def gguf():
    """Build a layer in blocks of 32 entries: a scale of 16 bits, then codes of 8, GGUF's type 8."""
    pytest.importorskip("transformers.integrations.gguf.dequant", reason="this transformers unpacks GGUF as it loads", exc_type=ImportError)
    g = torch.Generator().manual_seed(0)
    codes, scale = torch.randint(-128, 128, (WIDTH_OUT, WIDTH_IN), generator=g).to(torch.int8), torch.rand(WIDTH_OUT, 1, generator=g).half()
    layer, order = named("GgufLinear", "transformers.integrations.gguf.utils")(), torch.randperm(WIDTH_IN, generator=g)
    vars(layer).update(in_features=WIDTH_IN, out_features=WIDTH_OUT, bias=None, ggml_type=8)
    layer.weight = nn.Parameter(torch.cat([(scale / 128).view(torch.uint8), codes.view(torch.uint8)], 1), requires_grad=False)
    layer.register_buffer("input_permutation", order)
    return layer, ((scale / 128).float() * codes)[:, order.argsort()]


def gguf_of_diffusers():
    """Build a layer of diffusers' class, with a function of this file in the place of the library's."""
    dense = torch.randn(WIDTH_OUT, WIDTH_IN, generator=torch.Generator().manual_seed(0)).half()
    layer = named("GGUFLinear", "diffusers.quantizers.gguf.utils", nn.Linear)(WIDTH_IN, WIDTH_OUT)
    layer.weight, layer.compute_dtype = nn.Parameter(dense.view(torch.uint8), requires_grad=False), torch.float32
    return layer, dense.float()


def dequantize_gguf_tensor(blocks):
    return blocks.view(torch.float16)


class Codes(torch.Tensor):
    """A tensor class as torchao's: float outside, codes and scales inside."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def dequantize(self):
        return self.codes.to(self.scale.dtype) * self.scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].codes), func(args[0].scale))
        if func is torch.ops.aten._to_copy.default:
            return cls(args[0].codes.clone(), args[0].scale.to(kwargs.get("dtype") or args[0].scale.dtype))
        dense = [a.dequantize() if isinstance(a, cls) else a for a in args]
        return func(*dense, **(kwargs or {}))


class Looked(Codes):
    """A tensor class as torchao's NF4: its `dequantize` looks codes up in a table, and the weight comes by another method."""

    get_original_weight = Codes.dequantize

    @staticmethod
    def dequantize(value, table):
        raise AssertionError("not of a weight")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*(a.get_original_weight() if isinstance(a, cls) else a for a in args), **(kwargs or {}))


def tensor_class(of=Codes):
    g = torch.Generator().manual_seed(0)
    codes, scale = (
        torch.randint(-127, 128, (WIDTH_OUT, WIDTH_IN), generator=g, dtype=torch.int8),
        torch.rand(WIDTH_OUT, 1, generator=g) / 100,
    )
    layer = nn.Linear(WIDTH_IN, WIDTH_OUT)
    layer.weight = nn.Parameter(of(codes, scale), requires_grad=False)
    return layer, codes * scale


def quanto():
    layer, dense = tensor_class()
    own = named("QLinear", "optimum.quanto.nn.qlinear", nn.Linear)(WIDTH_IN, WIDTH_OUT)
    own.weight, own.bias = layer.weight, layer.bias
    own.activation_qtype, own.weight_qtype = None, "qint8"
    return own, dense


LAYERS = {
    **{f"gptq-{bits}": lambda bits=bits: gptq(bits, "gptqmodel") for bits in (2, 3, 4, 8)},
    **{f"auto-gptq-{bits}": lambda bits=bits: gptq(bits, "auto_gptq") for bits in (2, 3, 4, 8)},
    "gptq-act-order": lambda: gptq(4, "gptqmodel", act_order=True),
    "awq": lambda: awq("awq"),
    "gptqmodel-awq": lambda: awq("gptqmodel"),
    **{f"hqq-{bits}-{axis}": lambda bits=bits, axis=axis: hqq(bits, axis) for bits in (1, 2, 3, 4, 8) for axis in (0, 1)},
    "hqq-float-view": lambda: hqq(4, 1, view_as_float=True),
    "hqq-zero-scale": lambda: hqq(4, 1, zero_scale=True),
    "fp8-block": lambda: fp8((16, 16)),
    "fp8-uneven": lambda: fp8((24, 12)),
    "fp8-whole": lambda: fp8(None),
    "fp8-ue8m0": lambda: fp8((16, 16), torch.float8_e8m0fnu),
    "fbgemm": fbgemm,
    "ct-fp8": compressed,
    "bitnet": bitnet,
    **{f"gemma-{bits}": lambda bits=bits: gemma(bits) for bits in (2, 4, 8)},
    "gguf": gguf,
    "diffusers-gguf": gguf_of_diffusers,
    "tensor-class": tensor_class,
    "tensor-class-nf4": lambda: tensor_class(Looked),
    "quanto": quanto,
}
"""Functions of no argument that return a layer and its dense weight, by name."""
