"""int8 layers against their closed-form error bound; pipelines, other backends."""

import copy

import diffusers as df
import gguf
import pytest
import safetensors.torch
import torch
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
from diffusers.utils import convert_state_dict_to_diffusers
from optimum.quanto import freeze, qint8
from optimum.quanto import quantize as quanto_quantize
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig

from pilotage.pipelines import FusedEulerScheduler, guided
from pilotage.pipelines.fitting.identity import _plain_tensors
from pilotage.pipelines.quantization import quantize
from pilotage.pipelines.quantization.int8 import Int8Conv2d, Int8Layer, Int8Linear, quantize_weight

from ... import components as c
from ...families import FAMILIES

CONVOLUTIONS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "odd": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (0, 1)},
    "groups": {"kernel_size": 3, "groups": 3, "bias": False},
    "dilated": {"kernel_size": 3, "dilation": (2, 1), "padding": 2},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid", "padding_mode": "replicate"},
}


def layers():
    torch.manual_seed(0)
    yield nn.Linear(7, 5), torch.randn(3, 2, 7)
    yield nn.Linear(13, 1, bias=False), torch.randn(1, 13)
    for settings in CONVOLUTIONS.values():
        yield nn.Conv2d(9, 6, **settings), torch.randn(2, 9, 8, 7)


LAYERS = list(layers())


def int8(layer):
    return (Int8Linear if isinstance(layer, nn.Linear) else Int8Conv2d)(layer)


def rounding_bound(layer, x):
    """s / 2 * sum |x|: the layer itself on |x|, with weights that are half a step each."""
    bound = copy.deepcopy(layer)
    _, scale = quantize_weight(layer.weight)
    half = (scale.double() / 2).reshape(-1, *[1] * (layer.weight.ndim - 1))
    with torch.no_grad():
        bound.weight.copy_(half.expand_as(layer.weight))
        if bound.bias is not None:
            bound.bias.zero_()
    return bound.double()(x.double().abs())


@pytest.mark.parametrize(("layer", "x"), LAYERS)
@torch.no_grad()
def test_error_stays_within_half_a_step(layer, x):
    exact = copy.deepcopy(layer).double()(x.double())
    bound = rounding_bound(layer, x)
    double = int8(layer)(x.double())
    # 2^-20: quotient and scale are float32.
    assert ((double - exact).abs() <= bound * (1 + 2**-20) + 1e-12).all()
    for dtype in (torch.float32, torch.bfloat16):
        out = int8(copy.deepcopy(layer).to(dtype)).to(dtype)(x.to(dtype))
        assert (out.dtype, out.shape) == (dtype, exact.shape)
        # Input, scale, output and bias are rounded to the dtype; the int8 weight is exact in it.
        size = copy.deepcopy(layer).double()
        size.weight.abs_()
        if size.bias is not None:
            size.bias.abs_()
        eps = torch.finfo(dtype).eps
        slack = (6 + x[0].numel() * (dtype == torch.float32)) * eps * size(x.double().abs())
        assert ((out.double() - exact).abs() <= 1.01 * bound + slack).all()


def test_zero_channels_stay_zero_and_extremes_are_exact():
    layer = nn.Linear(4, 3, bias=False)
    rows = torch.tensor([[0.0, 0, 0, 0], [127, -64, 1, 0], [-0.5, 0.25, 0, 0.5]])
    layer.weight = nn.Parameter(rows)
    quantized = Int8Linear(layer)
    assert quantized.integers.tolist()[:2] == [[0, 0, 0, 0], [127, -64, 1, 0]]
    out = quantized(torch.eye(4)).T
    assert torch.equal(out[0], torch.zeros(4))
    torch.testing.assert_close(out[1], rows[1])
    half = Int8Linear(layer).half()(torch.full((1, 4), 300.0, dtype=torch.float16))
    assert half.isfinite().all()  # 300 * 127 + 300 * 64 is inside float16, plain int8 sums are not


def test_scale_survives_a_cast_and_weights_with_nan_are_refused():
    layer = Int8Linear(nn.Linear(5, 3))
    before = layer.scale.clone()
    layer.to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32 and torch.equal(layer.scale, before)
    assert layer.bias.dtype == torch.bfloat16 and layer.weight.dtype == torch.bfloat16
    broken = nn.Linear(5, 3)
    with torch.no_grad():
        broken.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        Int8Linear(broken)


@pytest.mark.parametrize(("layer", "x"), LAYERS)
def test_gradient_reaches_the_input_and_only_int8_is_kept(layer, x):
    quantized = int8(layer)
    x = x.double().requires_grad_()
    kept = []

    def keep(tensor):
        if tensor.dtype != x.dtype:  # padding keeps its input, which is there anyway
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = quantized(x)
    direction = torch.randn(out.shape, dtype=x.dtype)
    (grad,) = torch.autograd.grad(out, x, direction)
    restored = copy.deepcopy(layer).double()
    with torch.no_grad():
        shape = (-1, *[1] * (layer.weight.ndim - 1))
        restored.weight.copy_(quantized.integers.double() * quantized.scale.double().reshape(shape))
    (expected,) = torch.autograd.grad(restored(x), x, direction)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)
    assert {t.dtype for t in kept} == {torch.int8, torch.float32}
    assert sum(t.nbytes for t in kept if t.dtype != torch.int8) == 4 * len(quantized.scale)


def held_by(network):
    """Tensors in memory: state dicts have floating-point weights."""
    return dict(network.named_parameters()) | dict(network.named_buffers())


def is_torchao(layer):
    return type(getattr(layer, "weight", None)).__module__.startswith("torchao.")


@pytest.mark.parametrize(("name", "backend"), [("sd", "pilotage"), ("sdxl", "auto")])
def test_whole_pipelines(name, backend):
    family = FAMILIES[name]
    stock = family.build()
    expected = stock(**family.call(1, False) | {"num_inference_steps": 2})[0]
    pipe = family.build()
    assert quantize(pipe, backend=backend) == []
    parts = [pipe.unet, pipe.vae, pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    tensors = [t for part in parts if part for _, t in _plain_tensors(held_by(part))]
    assert any(is_torchao(m) for m in pipe.unet.modules()) == (backend == "auto")
    # Every weight of a Linear or Conv2d is one byte; torchao has a zero point for each output.
    networks = (stock.unet, stock.vae, stock.text_encoder, getattr(stock, "text_encoder_2", None))
    weights = [
        layer.weight
        for network in networks
        if network is not None
        for layer in network.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    ]
    zero_points = sum(len(w) for w in weights if w.ndim == 2 and backend == "auto")
    int8_bytes = sum(t.nbytes for t in tensors if t.dtype == torch.int8)
    assert int8_bytes == sum(w.numel() for w in weights) + zero_points
    got = pipe(**family.call(1, False) | {"num_inference_steps": 2})[0]
    assert got.shape == expected.shape
    error = (got - expected).norm() / expected.norm()
    assert 0 < error < 0.05


def test_gradients_never_go_through_torchao():
    pipe = FAMILIES["sd"].build()
    quantize(pipe.unet, gradients=True)
    assert not any(is_torchao(m) or type(m) is nn.Linear for m in pipe.unet.modules())
    with pytest.raises(ValueError, match="torchao keeps dequantized"):
        quantize(FAMILIES["sd"].build().unet, backend="torchao", gradients=True)


def test_checkpointed_backward_equals_the_plain_one():
    unet = FAMILIES["sd"].build().unet
    quantize(unet, backend="pilotage")
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16, requires_grad=True)
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            unet.enable_gradient_checkpointing()
            unet.train()
        loss = unet(x, 10, text).sample.square().sum()
        grads.append(torch.autograd.grad(loss, text)[0])
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.entry = nn.Linear(4, 4)
        self.up = nn.ConvTranspose2d(2, 2, 3)
        self.line = nn.Conv1d(2, 2, 3)
        self.attention = nn.MultiheadAttention(4, 2)
        self.again = self.entry


def test_what_is_not_covered_is_named_and_nothing_changes():
    module = Mixed()
    with pytest.raises(ValueError) as error:
        quantize(module)
    for name in ("up (ConvTranspose2d)", "line (Conv1d)", "attention (MultiheadAttention)"):
        assert name in str(error.value)
    assert type(module.entry) is nn.Linear
    kept = quantize(module, backend="pilotage", skip=("up", "line", "attention*"))
    assert kept == ["up", "line", "attention", "attention.out_proj"]
    assert module.again is module.entry
    assert type(module.entry) is Int8Linear and type(module.attention.out_proj) is not Int8Linear


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        (Mixed(), {"dtype": "int4"}, "'int8', got 'int4'"),
        (Mixed(), {"backend": "quanto"}, "auto, torchao, pilotage"),
        (nn.Linear(2, 2), {}, "single layer"),
        (object(), {}, "a pipeline with one of unet"),
    ],
)
def test_bad_input(target, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(target, **arguments)


def test_layers_with_hooks_are_refused():
    module = nn.Sequential(nn.Linear(2, 2))
    module[0].register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="before hooks"):
        quantize(module)


def test_int8_weights_in_a_file(tmp_path):
    """safetensors' own calls, on a network that is quantized with other weights."""
    pipe, fresh = FAMILIES["sd"].build(), FAMILIES["sd"].build()
    with torch.no_grad():
        for parameter in fresh.unet.parameters():
            parameter.add_(1.0)
    for unet in (pipe.unet, fresh.unet):
        quantize(unet, backend="pilotage")
    safetensors.torch.save_model(pipe.unet, tmp_path / "unet.safetensors")
    safetensors.torch.load_model(fresh.unet, tmp_path / "unet.safetensors")
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        assert torch.equal(pipe.unet(x, 10, text).sample, fresh.unet(x, 10, text).sample)


def sizes(folder):
    """(dtype, shape) of every tensor in a saved network, by name."""
    (path,) = folder.glob("*.safetensors")
    tensors = safetensors.torch.load_file(path)
    return {name: (t.dtype, t.shape) for name, t in tensors.items()}


def picture(pipe, family):
    return pipe(**family.call(1, False) | {"num_inference_steps": 2})[0].float()


NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.mark.parametrize("backend", ["pilotage", "torchao"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_a_saved_pipeline_is_a_stock_one(name, dtype, backend, tmp_path):
    """The same names, shapes and dtypes; what stock diffusers loads draws the same picture."""
    family = FAMILIES[name]
    pipe = family.build().to(dtype)
    pipe.save_pretrained(tmp_path / "stock")
    quantize(pipe, backend=backend)
    expected = picture(pipe, family)
    pipe.save_pretrained(tmp_path / "int8")
    for part in NETWORKS:
        if getattr(pipe, part, None) is not None:
            found = sizes(tmp_path / "int8" / part)
            assert found == sizes(tmp_path / "stock" / part)
    loaded = df.DiffusionPipeline.from_pretrained(tmp_path / "int8", torch_dtype=dtype)
    assert not any(isinstance(m, Int8Layer) or is_torchao(m) for m in loaded.unet.modules())
    assert loaded.unet.dtype == loaded.text_encoder.dtype == dtype
    error = (picture(loaded, family) - expected).norm() / expected.norm()
    # In bfloat16 products of int8 weights and scales are rounded once more, to 2^-9.
    assert error < (1e-5 if dtype == torch.float32 else 0.05)
    assert torch.equal(picture(pipe, family), expected)  # saving changes nothing


@pytest.mark.parametrize("backend", ["pilotage", "torchao"])
@pytest.mark.parametrize("safe", [True, False])
def test_a_network_saved_by_itself(backend, safe, tmp_path):
    pipe = FAMILIES["sd"].build()
    quantize(pipe, backend=backend)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    pipe.unet.save_pretrained(tmp_path, safe_serialization=safe)
    loaded = df.UNet2DConditionModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, got = pipe.unet(x, 10, text).sample, loaded(x, 10, text).sample
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["pilotage", "torchao"])
def test_state_dicts_are_those_of_the_stock_network(backend):
    """What is taken out is the rounded weight; what is put in is rounded again."""
    stock, unet = FAMILIES["sd"].build().unet, FAMILIES["sd"].build().unet
    quantize(unet, backend=backend)
    rounded = unet.state_dict()
    for name, tensor in stock.state_dict().items():
        assert type(rounded[name]) is torch.Tensor and rounded[name].dtype == tensor.dtype
        rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[None]
        step = rows.abs().amax(1, keepdim=True) / 127
        error = (rounded[name] - tensor).reshape(rows.shape).abs()
        assert (error <= step * (0.5 + 1e-4)).all()
    assert rounded.keys() == stock.state_dict().keys()
    other = FAMILIES["sd"].build().unet
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.5)
    quantize(other, backend=backend)
    other.load_state_dict(rounded)
    stock.load_state_dict(rounded)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        expected, got, plain = (net(x, 10, text).sample for net in (unet, other, stock))
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)
    # Ours to the same integers, torchao's to near ones.
    assert (got - expected).norm() <= (0 if backend == "pilotage" else 0.02) * expected.norm()


@pytest.mark.parametrize("backend", ["pilotage", "torchao"])
def test_a_copy_is_int8_and_saved_as_stock(backend):
    unet = FAMILIES["sd"].build().unet
    quantize(unet, backend=backend)
    twin = copy.deepcopy(unet)
    assert any(isinstance(m, Int8Layer) for m in twin.modules())
    assert any(is_torchao(m) for m in twin.modules()) == (backend == "torchao")
    rounded, again = unet.state_dict(), twin.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in rounded.items())
    assert all(t.is_floating_point() for t in again.values())


def test_projections_fused_after_quantizing():
    """diffusers makes one layer of three weights that it reads."""
    unet = FAMILIES["sd"].build().unet
    quantize(unet, backend="pilotage")
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    with torch.no_grad():
        expected = unet(x, 10, text).sample
        unet.fuse_qkv_projections()
        torch.testing.assert_close(unet(x, 10, text).sample, expected, rtol=1e-4, atol=1e-5)


def test_a_guided_int8_pipeline_saved_within_a_call(tmp_path):
    """A callback sees what stands for denoiser and scheduler; what it saves is stock."""
    family = FAMILIES["sd"]
    pipe = guided(family.build())
    quantize(pipe, backend="pilotage")
    pipe.scheduler = FusedEulerScheduler.from_config(pipe.scheduler.config)

    def save(pipe, index, timestep, found):
        if index == 0:
            pipe.save_pretrained(tmp_path)
        return {}

    call = family.call(1, False) | {"num_inference_steps": 2}
    pipe(**call, guidance="apg", callback_on_step_end=save)
    loaded = df.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is df.EulerDiscreteScheduler
    drawn, expected = picture(loaded, family), picture(pipe, family)
    assert (drawn - expected).norm() < 1e-4 * expected.norm()


def test_state_dicts_that_do_not_fit_are_refused():
    module = nn.Sequential(nn.Linear(4, 3))
    quantize(module, backend="pilotage")
    good = {"0.weight": torch.ones(3, 4), "0.bias": torch.zeros(3)}
    for weight, message in [
        (torch.ones(3, 5), r"0.weight: expected .* \(3, 4\), got torch.float32, \(3, 5\)"),
        (torch.ones(3, 4, dtype=torch.int8), r"got torch.int8"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            module.load_state_dict(good | {"0.weight": weight})
    with pytest.raises(RuntimeError, match="Missing key.*0.weight"):
        module.load_state_dict({"0.bias": good["0.bias"]})
    with pytest.raises(RuntimeError, match="Unexpected key.*0.scale"):
        module.load_state_dict(good | {"0.scale": torch.ones(3)})
    module.load_state_dict(good)
    torch.testing.assert_close(module[0].weight + 0, good["0.weight"], rtol=2**-16, atol=0)


def test_scales_of_a_saved_weight_are_found_again():
    """float32: integers times scales are exact, and so is what is made of them again."""
    weight = torch.randn(200, 31) * torch.logspace(-6, 4, 200)[:, None]
    integers, scale = quantize_weight(weight)
    exact = integers.double() * scale.double()[:, None]
    saved = exact.float()
    assert torch.equal(saved.double(), exact)
    again, scale_again = quantize_weight(saved)
    assert torch.equal(again, integers) and torch.equal(scale_again, scale)
    assert (scale.double() >= weight.double().abs().amax(1) / 127).all()


@pytest.mark.parametrize(("layer", "x"), LAYERS)
def test_to_a_reader_a_weight_is_the_rounded_one_and_writing_is_refused(layer, x):
    quantized = int8(layer)
    weight = quantized.weight
    assert isinstance(quantized, type(layer)) and weight.dtype == torch.float32
    step = quantized.scale.reshape(-1, *[1] * (weight.ndim - 1))
    assert ((weight - layer.weight).abs() <= step * 0.5001).all()
    assert type(weight + 0) is type(weight.data) is torch.Tensor
    before = quantized(x)
    with torch.no_grad():
        for write in (
            lambda: weight.mul_(2),
            lambda: weight.copy_(layer.weight),
            lambda: setattr(weight, "data", layer.weight.data),
            lambda: weight.__setitem__(0, 0.0),
            lambda: weight.__iadd__(1.0),
            lambda: torch.add(layer.weight, 1, out=weight),
        ):
            with pytest.raises(ValueError, match="in place.*before quantize"):
                write()
    with pytest.raises((AttributeError, KeyError)):
        quantized.weight = layer.weight
    assert torch.equal(quantized(x), before)


LORA = {"attention": ["to_q", "to_v", "to_out.0"], "convolutions": ["to_k", "conv1", "proj_in"]}


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Files of LoRA weights, and the pictures that a stock pipeline draws with them."""
    family, found = FAMILIES["sd"], {}
    for name, targets in LORA.items():
        pipe = family.build()
        torch.manual_seed(1)
        pipe.unet.add_adapter(
            LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
        )
        weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
        folder = tmp_path_factory.mktemp(name)
        pipe.save_lora_weights(folder, unet_lora_layers=weights)
        pipe = family.build()
        plain = picture(pipe, family)
        pipe.load_lora_weights(folder)
        drawn = picture(pipe, family)
        assert (drawn - plain).norm() > 0.1 * plain.norm()
        found[name] = folder, plain, drawn
    return found


@pytest.mark.parametrize("targets", LORA)
@pytest.mark.parametrize("backend", ["pilotage", "torchao"])
@pytest.mark.parametrize("first", ["lora", "int8"])
def test_lora_before_and_after(first, backend, targets, loras):
    family, (folder, plain, expected) = FAMILIES["sd"], loras[targets]
    pipe = family.build()
    if first == "lora":
        pipe.load_lora_weights(folder)
        kept = quantize(pipe, backend=backend)
    else:
        quantize(pipe, backend=backend)
        pipe.load_lora_weights(folder)
    adapters = {
        name: layer
        for name, layer in pipe.unet.named_modules()
        if "lora_" in name and isinstance(layer, nn.Linear | nn.Conv2d)
    }
    assert adapters and all(type(m) in (nn.Linear, nn.Conv2d) for m in adapters.values())
    if first == "lora":
        assert set(kept) == {f"unet.{name}" for name in adapters}
    wrapped = [m for name, m in pipe.unet.named_modules() if name.endswith("base_layer")]
    assert wrapped and all(isinstance(m, Int8Layer) or is_torchao(m) for m in wrapped)
    assert (picture(pipe, family) - expected).norm() < 0.02 * expected.norm()
    with pytest.raises((ValueError, NotImplementedError)):  # torchao's own for its layers
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert (picture(pipe, family) - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize("safe", [True, False])
def test_fusing_lora_into_int8_names_the_order_that_works(safe, loras):
    family, (folder, _, expected) = FAMILIES["sd"], loras["attention"]
    pipe = family.build()
    quantize(pipe, backend="pilotage")
    pipe.load_lora_weights(folder)
    before = picture(pipe, family)
    with pytest.raises(ValueError, match="load_lora_weights, fuse_lora, then quantize"):
        pipe.fuse_lora(safe_fusing=safe)
    assert torch.equal(picture(pipe, family), before)
    pipe = family.build()
    pipe.load_lora_weights(folder)
    pipe.fuse_lora(safe_fusing=safe)
    quantize(pipe, backend="pilotage")
    assert (picture(pipe, family) - expected).norm() < 0.02 * expected.norm()


def torchao_unet(unet, folder):
    unet.save_pretrained(folder)
    config = df.TorchAoConfig(Int8WeightOnlyConfig())
    return df.UNet2DConditionModel.from_pretrained(
        folder, quantization_config=config, torch_dtype=torch.float32
    )


def quanto_unet(unet, folder):
    unet = copy.deepcopy(unet)
    linear = [name for name, m in unet.named_modules() if isinstance(m, nn.Linear)]
    quanto_quantize(unet, weights=qint8, include=linear)
    freeze(unet)
    return unet


def gguf_unet(unet, folder):
    """diffusers' GGUF layers; its loader reads whole published checkpoints only."""
    unet = copy.deepcopy(unet)
    kind = gguf.GGMLQuantizationType.Q8_0
    for parent in list(unet.modules()):
        for name, child in list(parent.named_children()):
            # Q8_0 packs 32 weights of a row into one block.
            if type(child) is nn.Linear and child.in_features % 32 == 0:
                layer = GGUFLinear(
                    child.in_features,
                    child.out_features,
                    child.bias is not None,
                    compute_dtype=torch.float32,
                )
                packed = torch.from_numpy(gguf.quantize(child.weight.detach().numpy(), kind))
                layer.weight, layer.bias = GGUFParameter(packed, quant_type=kind), child.bias
                setattr(parent, name, layer)
    return unet


@pytest.mark.parametrize("other", [torchao_unet, quanto_unet, gguf_unet])
def test_networks_quantized_by_another_backend_keep_it(other, tmp_path):
    torch.manual_seed(0)
    stock = c.unet(block_out_channels=(32, 64), norm_num_groups=8)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    unet = other(stock, tmp_path)
    kept = quantize(unet, backend="pilotage")
    assert kept and any(isinstance(m, Int8Layer) for m in unet.modules())
    assert not any(type(m) is nn.Conv2d for m in unet.modules())
    for name in kept:
        assert not isinstance(unet.get_submodule(name), Int8Layer)
    with torch.no_grad():
        expected, got = stock(x, 10, text).sample, unet(x, 10, text).sample
    assert 0 < (got - expected).norm() / expected.norm() < 0.05
    if other is torchao_unet:  # which diffusers saves, our convolutions in floating point
        unet.save_pretrained(tmp_path / "again")
        loaded = df.UNet2DConditionModel.from_pretrained(
            tmp_path / "again", torch_dtype=torch.float32
        )
        with torch.no_grad():
            torch.testing.assert_close(loaded(x, 10, text).sample, got, rtol=1e-4, atol=1e-5)


def test_without_torchao(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    module = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ImportError, match="pip install torchao"):
        quantize(module, backend="torchao")
    assert quantize(module) == [] and type(module[0]) is Int8Linear
