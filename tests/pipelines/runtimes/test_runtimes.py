"""Pipelines on ONNX Runtime and OpenVINO against the same pipelines on PyTorch."""

import onnx
import pytest
import torch
from PIL import Image

from pilotage.guidance.zeroth_order import Descent, GradientSearch
from pilotage.pipelines import guided
from pilotage.pipelines.personalization.files import save_token
from pilotage.pipelines.personalization.inputs import extended, prompt_ids
from pilotage.pipelines.personalization.loss import DiffusionTokenLoss
from pilotage.pipelines.personalization.personalizer import Personalizer
from pilotage.pipelines.quantization.quantize import quantize
from pilotage.pipelines.runtimes import RUNTIMES, export_onnx, on_runtime, quantize_onnx, recorded
from pilotage.pipelines.runtimes.graphs import graph_path

from ...families import FAMILIES
from ..checks import latents

WIDTH = 16
TIMES = (50, 300, 550, 800, 990)

every_runtime = pytest.mark.parametrize("runtime", list(RUNTIMES))


def batch(pipe, reference, rows, key):
    generator = torch.Generator().manual_seed(key)
    prompts = [("a red {}", "two {} at dawn")[i % 2] for i in range(rows)]
    ids = prompt_ids(extended(pipe.tokenizer, "<x>", 2), prompts, "<x>", 2)
    timesteps = torch.tensor([TIMES[(key + i) % len(TIMES)] for i in range(rows)])
    latents = torch.randn(rows, 4, 8, 8, generator=generator)
    return reference.batch(latents, timesteps, (ids,), key)


def tokens(count, key):
    return torch.randn(count, 2, WIDTH, generator=torch.Generator().manual_seed(100 + key))


@pytest.fixture(scope="module")
def pipe():
    return FAMILIES["sd"].build()


@pytest.fixture(scope="module")
def reference(pipe):
    return DiffusionTokenLoss(pipe)


@pytest.fixture(scope="module")
def graphs(pipe, reference, tmp_path_factory):
    """Folders of the graphs in float32, half precision and int8."""
    folder = tmp_path_factory.mktemp("graphs")
    export_onnx(pipe, folder / "fp32")
    export_onnx(FAMILIES["sd"].build().to(torch.float16), folder / "fp16")
    ours = on_runtime(FAMILIES["sd"].build(), folder / "fp32")
    loss = DiffusionTokenLoss(ours)
    with recorded(ours) as inputs:
        for key in range(50, 58):  # other seeds than any test's
            loss(tokens(4, key), batch(pipe, reference, 2, key))
    quantize_onnx(folder / "fp32", folder / "int8", inputs)
    return folder


@every_runtime
@pytest.mark.parametrize(("count", "rows"), [(1, 1), (5, 2)])
@torch.no_grad()
def test_float32_losses_are_pytorchs(pipe, reference, graphs, runtime, count, rows):
    loss = DiffusionTokenLoss(on_runtime(FAMILIES["sd"].build(), graphs / "fp32", runtime))
    for key in range(3):
        data, vectors = batch(pipe, reference, rows, key), tokens(count, key)
        torch.testing.assert_close(loss(vectors, data), reference(vectors, data), rtol=1e-4, atol=0)


@every_runtime
@pytest.mark.parametrize("guidance", [None, "apg+ag"])
def test_pictures_are_pytorchs(pipe, graphs, runtime, guidance):
    """With guidance, which leaves rows out, and without."""
    ours = guided(on_runtime(FAMILIES["sd"].build(), graphs / "fp32", runtime))
    expected = latents(guided(FAMILIES["sd"].build()), "sd", guidance=guidance)
    found = latents(ours, "sd", guidance=guidance)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not ours.components["unet"].state_dict()  # the weights are the graph's


@every_runtime
@torch.no_grad()
def test_half_precision(pipe, reference, graphs, runtime):
    half = FAMILIES["sd"].build().to(torch.float16)
    loss = DiffusionTokenLoss(on_runtime(half, graphs / "fp16", runtime))
    data, vectors = batch(pipe, reference, 2, 7), tokens(5, 7)
    torch.testing.assert_close(loss(vectors, data), reference(vectors, data), rtol=1e-2, atol=0)
    weights = onnx.load(graph_path(graphs / "fp16", "unet")).graph.initializer
    kinds = {tensor.data_type for tensor in weights if len(tensor.dims) > 1}
    assert kinds == {onnx.TensorProto.FLOAT16}


@every_runtime
@torch.no_grad()
def test_int8_losses_rank_tokens_alike_and_do_not_depend_on_each_other(
    pipe, reference, graphs, runtime
):
    ours = on_runtime(FAMILIES["sd"].build(), graphs / "int8", runtime)
    loss, data, vectors = DiffusionTokenLoss(ours), batch(pipe, reference, 2, 7), tokens(32, 7)
    exact, rough = reference(vectors, data), loss(vectors, data)
    assert not torch.equal(exact, rough)
    # Most of the variance over 32 tokens is that of the exact losses. How much more depends on the
    # processor: without VNNI, sums of int8 products saturate.
    correlation = torch.corrcoef(torch.stack([exact, rough]))[0, 1]
    assert correlation > 0 and correlation.square() > 0.5
    alone = torch.cat([loss(vector[None], data) for vector in vectors[:4]])
    torch.testing.assert_close(alone, rough[:4], rtol=1e-5, atol=0)
    capped = DiffusionTokenLoss(ours, max_rows=6)(vectors[:8], data)
    torch.testing.assert_close(capped, rough[:8], rtol=1e-5, atol=0)


def test_zeroth_order_steps_on_int8_lower_the_true_loss(pipe, reference, graphs):
    loss = DiffusionTokenLoss(on_runtime(FAMILIES["sd"].build(), graphs / "int8"))
    data, initial = batch(pipe, reference, 2, 3), tokens(1, 3)[0]
    search = GradientSearch(initial.flatten(), Descent(8, 0.3, 0.1, subspace_tau=0))
    for _ in range(15):
        search.tell(loss(search.ask().view(-1, 2, WIDTH), data))
    with torch.no_grad():
        both = reference(torch.stack([initial, search.value.view(2, WIDTH)]), data)
        spread = reference(tokens(32, 9), data).std()
    assert both[1] < both[0] - spread  # further down than tokens differ by chance


def test_a_text_encoder_that_takes_ids_stays_in_pytorch(pipe, reference, graphs, tmp_path):
    """As in the folders that optimum exports."""
    (tmp_path / "unet").symlink_to(graphs / "fp32" / "unet")
    model = onnx.load(graph_path(graphs / "fp32", "text_encoder"))
    for place in (model.graph.input[0], *model.graph.node):
        if getattr(place, "name", "") == "inputs_embeds":
            place.name = "input_ids"
        inputs = getattr(place, "input", [])
        inputs[:] = ["input_ids" if name == "inputs_embeds" else name for name in inputs]
    graph_path(tmp_path, "text_encoder").parent.mkdir()
    onnx.save(model, graph_path(tmp_path, "text_encoder"))
    ours = FAMILIES["sd"].build()
    text_encoder = ours.text_encoder
    on_runtime(ours, tmp_path)
    assert ours.text_encoder is text_encoder
    data, vectors = batch(pipe, reference, 2, 0), tokens(3, 0)
    with torch.no_grad():
        found = DiffusionTokenLoss(ours)(vectors, data)
        torch.testing.assert_close(found, reference(vectors, data), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="text_encoder is no graph"), recorded(ours):
        pass


def test_bad_input(graphs, tmp_path):
    build = FAMILIES["sd"].build
    quantized = build()
    quantize(quantized.unet, backend="pilotage")
    other = build()
    with torch.no_grad():
        other.unet.conv_in.weight.mul_(2)
    masked = build()
    masked.text_encoder.config.use_attention_mask = True
    int8, own = graphs / "int8", tmp_path / "model"
    build().save_pretrained(own)
    for call, error, message in [
        (lambda: on_runtime(build(), tmp_path), FileNotFoundError, "'pilotage export' writes it"),
        (lambda: on_runtime(build(), int8, "tflite"), ValueError, "unknown runtime 'tflite'"),
        (lambda: on_runtime(build(), int8, "onnxruntime:No"), ValueError, "has no No here; there"),
        (lambda: on_runtime(build(), int8, "openvino:No"), ValueError, "has no device No here"),
        (lambda: on_runtime(other, int8), ValueError, "exported from other weights"),
        (lambda: on_runtime(FAMILIES["sdxl"].build(), int8), ValueError, "1 or 2 family"),
        (lambda: export_onnx(FAMILIES["sdxl"].build(), tmp_path), ValueError, "1 or 2 family"),
        (lambda: export_onnx(quantized, tmp_path), ValueError, "unet is quantized"),
        (lambda: export_onnx(masked, tmp_path), ValueError, "attention mask"),
        (
            lambda: export_onnx(build().to(torch.bfloat16), tmp_path),
            ValueError,
            "must be float32 or float16 on the CPU, got torch.bfloat16",
        ),
        (lambda: export_onnx(build(), own), ValueError, "name another folder for graphs"),
        (lambda: quantize_onnx(graphs / "fp32", int8, {}), ValueError, "no calibration"),
    ]:
        with pytest.raises(error, match=message):
            call()
    inputs = {"unet": [{}], "text_encoder": [{}]}
    for source, target, message in [
        (int8, int8, "a folder of their own"),
        (int8, tmp_path / "new", "is not in float32"),
        (graphs / "fp16", tmp_path / "new", "is not in float32"),
        (graphs / "fp32", own, "name another folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize_onnx(source, target, inputs)
    assert [place.name for place in tmp_path.iterdir()] == ["model"]


def test_what_a_graph_cannot_do_is_refused(graphs, tmp_path):
    pipe = on_runtime(FAMILIES["sd"].build(), graphs / "fp32")
    for component in (pipe.unet, pipe):
        with pytest.raises(ValueError, match="cannot be saved"):
            component.save_pretrained(tmp_path)
    sample, hidden = torch.zeros(1, 4, 8, 8), torch.zeros(1, 77, WIDTH)
    with pytest.raises(ValueError, match="has no input class_labels"):
        pipe.unet(sample, 1, hidden, class_labels=torch.zeros(1))
    with pytest.raises(ValueError, match="takes no mask"):
        pipe.text_encoder(torch.zeros(1, 77, dtype=torch.long), output_hidden_states=True)


def test_a_learned_word_is_drawn_as_on_pytorch(graphs, tmp_path):
    save_token(tmp_path / "x.safetensors", (tokens(1, 0)[0],), "<x>")
    pictures = []
    for ours in (FAMILIES["sd"].build(), on_runtime(FAMILIES["sd"].build(), graphs / "fp32")):
        before = latents(ours, "sd", prompt=["a <x> cat"] * 3)
        ours.load_textual_inversion(str(tmp_path / "x.safetensors"), token="<x>")
        pictures.append(latents(ours, "sd", prompt=["a <x> cat"] * 3))
        assert (pictures[-1] - before).norm() > 1e-2 * before.norm()
    torch.testing.assert_close(*pictures, rtol=1e-3, atol=1e-3)


def test_a_token_is_learned_and_drawn_without_pytorchs_unet(graphs, tmp_path):
    """Its checkpoint belongs to these graphs on this runtime."""
    pipe = on_runtime(FAMILIES["sd"].build(), graphs / "int8")
    images = [Image.new("RGB", (16, 16), color) for color in ("red", "teal")]
    settings = {"steps": 2, "evaluate_every": 1, "preview_every": 1, "progress": False}
    settings |= {"preview_options": {"num_inference_steps": 2}, "output": tmp_path}
    with pytest.warns(UserWarning, match="int8 activations"):
        Personalizer(pipe).fit(images, "<x>", "cat", **settings)
    assert any((tmp_path / "previews").iterdir())
    other = Personalizer(on_runtime(FAMILIES["sd"].build(), graphs / "int8", "openvino"))
    with pytest.raises(ValueError, match="checkpoint"):
        other.fit(images, "<x>", "cat", **settings | {"steps": 3})
