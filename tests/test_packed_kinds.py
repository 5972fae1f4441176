"""Packed layers in other libraries' layouts, built by hand: the libraries themselves are in `test_packed_libraries.py`."""

import types

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.layers.kinds import kind_of
from lora_lite.layers.tensor_class import TensorClassKind
from lora_lite.testing import check_kind
from packed_checks import check
from packed_layers import LAYERS, Codes, fp8, gptq, hqq, named, quanto

KINDS = {
    "gptq": "GPTQModelKind",
    "auto": "AutoGPTQKind",
    "awq": "AWQKind",
    "gptqmodel": "GPTQModelAWQKind",
    "hqq": "HQQKind",
    "fp8": "FP8Kind",
    "fbgemm": "RowFP8Kind",
    "ct": "RowFP8Kind",
    "bitnet": "BitLinearKind",
    "gemma": "GemmaKind",
    "gguf": "GgufKind",
    "diffusers": "DiffusersGgufKind",
    "tensor": "TensorClassKind",
    "quanto": "QuantoKind",
}


@pytest.mark.parametrize("name", LAYERS)
def test_an_adapter_is_that_of_the_dense_weight(name, tmp_path):
    check(*LAYERS[name](), KINDS[name.partition("-")[0]], tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["gptq-3", "auto-gptq-4", "awq", "gptqmodel-awq"])
def test_the_kit_passes(name):
    # "base" runs the layer's own forward, which these have none of.
    # Without those in FP8: the kit casts the model to float64, which takes such a weight apart from its scale.
    check_kind(kind_of(LAYERS[name]()[0]), lambda: LAYERS[name]()[0], skip=("merged", "base"))


def test_the_kit_passes_on_a_weight_of_a_class():
    check_kind(TensorClassKind, lambda: LAYERS["tensor-class"]()[0], skip=("merged",))


@pytest.mark.parametrize("name", ["gptq-4", "gptq-3", "awq", "hqq-4-1", "fp8-uneven"])
def test_compiles(name):
    layer, _ = LAYERS[name]()
    adapt = ll.build(nn.Sequential(layer), ll.LoRAConfig(r=2))
    params, x = ll.tree_map(lambda p: p + 0.1, adapt.init()), torch.randn(5, 32)
    torch.compiler.reset()
    step = torch.compile(torch.func.grad(lambda p: adapt(p, x).square().sum()), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(params), torch.func.grad(lambda p: adapt(p, x).square().sum())(params))


def _unfrozen():
    layer = quanto()[0]
    layer.weight = nn.Parameter(torch.randn(32, 32))
    return layer


def _of(layer, **attributes):
    vars(layer).update(attributes)
    return layer


def _fp4():
    layer = fp8(None)[0]
    layer.weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.int8), requires_grad=False)
    return layer


def _compressed():
    layer = _of(nn.Linear(32, 32), quantization_scheme=object())
    layer.forward = types.MethodType(lambda self, x: x, layer)
    del layer.weight
    return layer


FAULTS = {
    r"unpacked, quantization_config=transformers\.CompressedTensorsConfig\(dequantize=True\)": _compressed,
    "is not quantised yet: freeze": _unfrozen,
    "quantises its activations": lambda: _of(quanto()[0], activation_qtype="qint8"),
    "quantised scales or zeros": lambda: hqq(4, 1, quant_scale=True)[0],
    "call its initialize": lambda: _of(hqq(4, 1)[0], meta=None),
    "keeps 5 bits in planes": lambda: _of(gptq(4, "gptqmodel")[0], bits=5),
    "adapts or rotates its input": lambda: _of(gptq(4, "gptqmodel")[0], adapter=object()),
    "AWQ's layout is read in 4": lambda: _of(LAYERS["awq"]()[0], w_bit=3),
    "without an adapter": lambda: _of(LAYERS["gptqmodel-awq"]()[0], adapter=object()),
    "two FP4 codes in a byte": _fp4,
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_layer_that_cannot_be_read_is_refused_with_the_way_out(message):
    with pytest.raises(ValueError, match=rf'"0" \(\w+\) .*{message}'):
        ll.build(nn.Sequential(FAULTS[message]()), ll.LoRAConfig(r=2))


def test_a_subclass_with_a_forward_of_its_own_is_another_layer():
    layer, _ = fp8((16, 16))
    layer.__class__ = named("FP8GroupedLinear", "transformers.integrations.finegrained_fp8", type(layer))
    assert kind_of(layer).__name__ == "OwnForwardKind"  # whose weight has to be one of numbers
    with pytest.raises(ValueError, match="FP8GroupedLinear"):
        ll.build(nn.Sequential(layer, nn.Linear(32, 6)), ll.LoRAConfig(r=2, target_names=(r"^[01]$",)))


def _codes(name, **tensors):
    layer = named(name, "anywhere")()
    for own, tensor in tensors.items():
        layer.register_parameter(own, nn.Parameter(tensor, requires_grad=False))
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        _codes("HiggsLinear", weight=torch.zeros(8, 32, dtype=torch.int16), scales=torch.ones(32, 4)),
        _codes("SomeLinear", weight=torch.zeros(32, 32, dtype=torch.uint8), codebooks=torch.ones(2, 16, 8)),
        _codes("GroupedLinear", weight=torch.zeros(4, 32, 32, dtype=torch.float8_e4m3fn), weight_scale=torch.ones(4, 32)),
        nn.Linear(32, 32).to(torch.float8_e4m3fn),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layout_that_no_kind_reads_is_named_and_its_scales_are_no_targets(layer):
    model = nn.ModuleDict({"q": layer, "last": nn.Linear(32, 6)})
    for name in ("q", "^q$", "q.*s", r"q\.weight$"):
        with pytest.raises(ValueError, match=r'"q.*packed as codes that no kind reads\. Load them unpacked'):
            ll.find_targets(model, ll.LoRAConfig(r=2, target_names=name))
    targets = ll.find_targets(model, ll.LoRAConfig(r=2))
    assert [t.path for t in targets] == ["last"]
    assert dict(targets.left_out) == {"q": "packed as codes that no kind reads"}
    for alone in (nn.Sequential(layer), nn.ModuleDict({"q": layer, "lm_head": nn.Linear(32, 6)})):
        with pytest.raises(ValueError, match=r"1 are packed as codes that no kind reads, .*\. Load them unpacked"):
            ll.find_targets(alone, ll.LoRAConfig(r=2))


def test_a_class_of_another_library_is_no_packed_layer():
    assert kind_of(named("HQQLinear", "hqqq.core")()) is None
    assert kind_of(_of(named("QuantLinear", "auto_gptq.nn_modules.qlinear.qlinear_marlin")(), bits=4)) is None


def test_fp8_layers_that_are_dense_again_are_linear_layers():
    layer, dense = fp8(None)
    layer.weight = nn.Parameter(dense)
    assert kind_of(layer).__name__ == "OwnForwardKind"
    assert kind_of(layer).faithful(layer)


def test_the_weight_of_a_class_stays_packed_in_the_clone():
    layer, _ = LAYERS["tensor-class"]()
    adapt = ll.build(nn.Sequential(layer), ll.LoRAConfig(r=2))
    weight = adapt.module(adapt.init())[0]._parameters["weight"]
    assert isinstance(weight, Codes)
    assert weight.codes.data_ptr() == layer.weight.codes.data_ptr()
