"""The token loss on ONNX Runtime against the one on PyTorch."""

import pytest
import torch

from pilotage.guidance.zeroth_order import Descent, GradientSearch
from pilotage.pipelines.personalization.inputs import extended, prompt_ids
from pilotage.pipelines.personalization.loss import DiffusionTokenLoss
from pilotage.pipelines.personalization.onnx import OnnxTokenLoss, export_onnx, quantize_onnx
from pilotage.pipelines.personalization.personalizer import Personalizer
from pilotage.pipelines.quantization.quantize import quantize

from ...families import FAMILIES

WIDTH = 16
TIMES = (50, 300, 550, 800, 990)


@pytest.fixture(scope="module")
def pipe():
    return FAMILIES["sd"].build()


@pytest.fixture(scope="module")
def reference(pipe):
    return DiffusionTokenLoss(pipe)


def batch(pipe, reference, rows, key):
    generator = torch.Generator().manual_seed(key)
    prompts = [("a red {}", "two {} at dawn")[i % 2] for i in range(rows)]
    ids = prompt_ids(extended(pipe.tokenizer, "<x>", 2), prompts, "<x>", 2)
    timesteps = torch.tensor([TIMES[(key + i) % len(TIMES)] for i in range(rows)])
    latents = torch.randn(rows, 4, 8, 8, generator=generator)
    return reference.batch(latents, timesteps, (ids,), key)


def tokens(count, key, size=1.0):
    generator = torch.Generator().manual_seed(100 + key)
    return size * torch.randn(count, 2, WIDTH, generator=generator)


@pytest.fixture(scope="module")
def folder(pipe, reference, tmp_path_factory):
    folder = export_onnx(pipe, tmp_path_factory.mktemp("onnx"))
    fp32 = OnnxTokenLoss(pipe, folder, "fp32")
    # Other seeds than any test's.
    quantize_onnx(fp32, [(tokens(4, k), batch(pipe, reference, 2, k)) for k in range(50, 58)])
    return folder


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (5, 2)])
@torch.no_grad()
def test_float32_losses_are_pytorchs(pipe, reference, folder, count, rows):
    loss = OnnxTokenLoss(pipe, folder, "fp32")
    for key in range(3):
        data, vectors = batch(pipe, reference, rows, key), tokens(count, key)
        torch.testing.assert_close(loss(vectors, data), reference(vectors, data), rtol=1e-4, atol=0)
    assert sorted(p.name for p in folder.iterdir()) == [
        f"{graph}-{precision}"
        for graph in ("text_encoder", "unet")
        for precision in ("fp32", "int8")
    ]


@torch.no_grad()
def test_int8_losses_rank_tokens_alike_and_do_not_depend_on_each_other(pipe, reference, folder):
    loss = OnnxTokenLoss(pipe, folder)
    data, vectors = batch(pipe, reference, 2, 7), tokens(32, 7)
    exact, rough = reference(vectors, data), loss(vectors, data)
    assert not torch.equal(exact, rough)
    assert torch.corrcoef(torch.stack([exact, rough]))[0, 1] > 0.9  # Pearson, over 32 tokens
    alone = torch.cat([loss(vector[None], data) for vector in vectors[:4]])
    torch.testing.assert_close(alone, rough[:4], rtol=1e-6, atol=0)
    capped = OnnxTokenLoss(pipe, folder, max_rows=6)(vectors[:8], data)
    torch.testing.assert_close(capped, rough[:8], rtol=1e-6, atol=0)


def test_zeroth_order_steps_on_int8_lower_the_true_loss(pipe, reference, folder):
    loss, data = OnnxTokenLoss(pipe, folder), batch(pipe, reference, 2, 3)
    initial = tokens(1, 3)[0]
    search = GradientSearch(initial.flatten(), Descent(8, 0.3, 0.1, subspace_tau=0))
    for _ in range(15):
        search.tell(loss(search.ask().view(-1, 2, WIDTH), data))
    with torch.no_grad():
        both = reference(torch.stack([initial, search.value.view(2, WIDTH)]), data)
        spread = reference(tokens(32, 9), data).std()
    assert both[1] < both[0] - spread  # further down than tokens differ by chance


def test_bad_input(pipe, reference, folder, tmp_path):
    for call, error, message in [
        (lambda: OnnxTokenLoss(pipe, tmp_path), FileNotFoundError, "quantize_onnx writes it"),
        (lambda: OnnxTokenLoss(pipe, folder, "int4"), ValueError, "'fp32' or 'int8', got 'int4'"),
        (
            lambda: OnnxTokenLoss(pipe, folder, providers=["NoneProvider"]),
            ValueError,
            "no provider NoneProvider; there are",
        ),
        (lambda: export_onnx(FAMILIES["sdxl"].build(), tmp_path), ValueError, "1 or 2 family"),
        (lambda: quantize_onnx(OnnxTokenLoss(pipe, folder, "fp32"), []), ValueError, "no calib"),
        (lambda: quantize_onnx(OnnxTokenLoss(pipe, folder), [1]), ValueError, "the fp32 closure"),
    ]:
        with pytest.raises(error, match=message):
            call()
    quantized = FAMILIES["sd"].build()
    quantize(quantized.unet, backend="pilotage")
    with pytest.raises(ValueError, match="unet is quantized"):
        export_onnx(quantized, tmp_path)
    with pytest.raises(ValueError, match="must be float32 on the CPU, got torch.bfloat16"):
        export_onnx(FAMILIES["sd"].build().to(torch.bfloat16), tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_unet_may_be_dropped(reference, folder):
    pipe = FAMILIES["sd"].build()
    pipe.unet.to("meta")
    personalizer = Personalizer(pipe, loss=OnnxTokenLoss(pipe, folder, "fp32"))
    data, vectors = batch(pipe, reference, 2, 0), tokens(3, 0)
    torch.testing.assert_close(
        personalizer.loss(vectors, data), reference(vectors, data), rtol=1e-4, atol=0
    )
    assert personalizer.networks.encode(torch.rand(1, 3, 16, 16)).isfinite().all()
    assert set(personalizer.loss.identity) >= {"unet", "text_encoder", "vae", "precision"}
    with pytest.raises(ValueError, match="attention mask"):
        pipe.text_encoder.config.use_attention_mask = True
        export_onnx(pipe, folder)
