"""The loss of a token on ONNX Runtime, where no backward pass exists.

`export_onnx` writes the UNet and the text encoder of a Stable Diffusion 1 or 2 pipeline as ONNX
graphs; the text encoder takes token *embeddings*, so that a learned vector is an input.
`quantize_onnx` makes both int8, weights and activations. `OnnxTokenLoss` evaluates them.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..fitting.identity import network_hash
from ..quantization.int8 import Int8Layer
from .loss import DiffusionTokenLoss, TokenBatch, injected

Precision = Literal["fp32", "int8"]
GRAPHS = ("text_encoder", "unet")


def _runtime() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise ImportError("this needs onnx and onnxruntime: pip install pilotage[onnx]") from error
    return onnxruntime


class _TextEncoder(nn.Module):
    """Hidden states (R, L, D) of token embeddings (R, L, d)."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, embeddings: Tensor) -> Tensor:
        table = self.encoder.get_input_embeddings()
        handle = table.register_forward_hook(lambda *_: embeddings)
        try:
            ids = torch.zeros(embeddings.shape[:2], dtype=torch.int64)
            return self.encoder(ids, return_dict=False)[0]
        finally:
            handle.remove()


class _UNet(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, hidden: Tensor) -> Tensor:
        return self.unet(noisy, timesteps, hidden, return_dict=False)[0]


def graph_path(folder: str | Path, name: str, precision: Precision) -> Path:
    """Where a graph lies: in a folder of its own, with its weights where these are big."""
    return Path(folder) / f"{name}-{precision}" / f"{name}.onnx"


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A file to write instead of `path`; in the end its whole folder takes the place of that one's.

    (Big weights are files of their own.)
    """
    folder = path.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        yield partial / path.name
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


@torch.no_grad()
def export_onnx(pipe: Any, folder: str | Path) -> Path:
    """Writes float32 graphs of a pipeline's text encoder and UNet; any number of rows.

    With PyTorch's TorchScript exporter: on the tests' UNet 3 s, the newer one 96 s (busy machine).

    Raises:
        ValueError: not a Stable Diffusion 1 or 2 pipeline, or one that is quantized already
            (`quantize_onnx` quantizes the graphs), or not in float32 on the CPU.
        ImportError: onnx or onnxruntime is missing.
    """
    _runtime()
    _check(pipe)
    if getattr(pipe.text_encoder.config, "use_attention_mask", False):
        raise ValueError("export_onnx: text encoders with an attention mask are not supported")
    for name in GRAPHS:
        network = getattr(pipe, name)
        if any(isinstance(m, Int8Layer) for m in network.modules()) or (
            getattr(network, "hf_quantizer", None) is not None
        ):
            raise ValueError(f"export_onnx: {name} is quantized; export full precision")
        if (network.dtype, network.device.type) != (torch.float32, "cpu"):
            raise ValueError(
                f"export_onnx: {name} must be float32 on the CPU, got {network.dtype} "
                f"on {network.device}"
            )
    config, side = pipe.unet.config, pipe.unet.config.sample_size
    length, width = pipe.tokenizer.model_max_length, pipe.text_encoder.config.hidden_size
    inputs = {
        "text_encoder": {"embeddings": torch.zeros(2, length, width)},
        "unet": {
            "noisy": torch.zeros(2, config.in_channels, side, side),
            "timesteps": torch.tensor([1, 2]),
            "hidden": torch.zeros(2, length, config.cross_attention_dim),
        },
    }
    wrapped = {"text_encoder": _TextEncoder(pipe.text_encoder), "unet": _UNet(pipe.unet)}
    for name, named in inputs.items():
        with _writing(graph_path(folder, name, "fp32")) as partial, warnings.catch_warnings():
            # It warns that branches on shapes become constants; those on the number of rows only
            # choose a memory layout.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                wrapped[name].eval(),
                tuple(named.values()),
                str(partial),
                input_names=list(named),
                output_names=["output"],
                dynamic_axes={key: {0: "rows"} for key in (*named, "output")},
                opset_version=17,
                dynamo=False,
            )
    return Path(folder)


def quantize_onnx(loss: OnnxTokenLoss, calibration: Sequence[tuple[Tensor, TokenBatch]]) -> Path:
    """Writes int8 graphs beside the float32 ones: weights per output channel, activations static.

    Static ranges make a row's output independent of the other rows of its call, which ranges found
    at run time would not: the losses of K tokens must not depend on each other. Products of two
    activations (attention) stay in float32.

    Args:
        loss: The closure on the float32 graphs.
        calibration: Embeddings (K, m, d) and batches, over all timesteps that will be used; the
            ranges are the extremes found there.

    Raises:
        ValueError: no calibration data, or `loss` is not on the float32 graphs.
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    if not calibration:
        raise ValueError("quantize_onnx: no calibration data")
    if loss.precision != "fp32":
        raise ValueError(f"quantize_onnx: needs the fp32 closure, got {loss.precision!r}")

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.rows = (_arrays(loss.inputs(*pair)[name]) for pair in calibration)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    for name in GRAPHS:
        source = graph_path(loss.folder, name, "fp32")
        with _writing(graph_path(loss.folder, name, "int8")) as partial:
            quantize_static(
                str(source),
                str(partial),
                Reader(name),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv", "Gemm", "MatMul"],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=True,  # one ONNX file holds 2 GB at most
                extra_options={"MatMulConstBOnly": True},
            )
    return loss.folder


def _arrays(inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: value.contiguous().numpy() for key, value in inputs.items()}


def _check(pipe: Any) -> None:
    if getattr(pipe, "text_encoder_2", None) is not None or not all(
        hasattr(pipe, name) for name in GRAPHS
    ):
        raise ValueError(
            f"{type(pipe).__name__}: expected a pipeline of the Stable Diffusion 1 or 2 family "
            "(one text encoder and a UNet)"
        )


class OnnxTokenLoss(DiffusionTokenLoss):
    """`DiffusionTokenLoss` with text encoder and UNet on ONNX Runtime, tensors on the CPU.

    Args:
        pipe: The pipeline that was exported: its VAE encodes pictures, its embedding table looks
            words up; its UNet is not run, so `pipe.unet.to("meta")` may free its memory.
        folder: Where `export_onnx` and `quantize_onnx` wrote.
        precision: "fp32" or "int8".
        max_rows: As in `DiffusionTokenLoss`.
        providers: ONNX Runtime's execution providers.

    Raises:
        ValueError: not a Stable Diffusion 1 or 2 pipeline, an unknown precision or provider.
        FileNotFoundError: the graphs are not there.
        ImportError: onnx or onnxruntime is missing.
    """

    def __init__(
        self,
        pipe: Any,
        folder: str | Path,
        precision: Precision = "int8",
        max_rows: int = 0,
        providers: Iterable[str] = ("CPUExecutionProvider",),
    ) -> None:
        runtime, providers = _runtime(), list(providers)
        _check(pipe)
        if precision not in ("fp32", "int8"):
            raise ValueError(f"OnnxTokenLoss: precision is 'fp32' or 'int8', got {precision!r}")
        there = runtime.get_available_providers()
        if missing := [p for p in providers if p not in there]:
            raise ValueError(f"no provider {', '.join(missing)}; there are {', '.join(there)}")
        super().__init__(pipe, max_rows)
        self.folder, self.precision = Path(folder), precision
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.sessions = {}
        for name in GRAPHS:
            path = graph_path(folder, name, precision)
            if not path.is_file():
                maker = "export_onnx" if precision == "fp32" else "quantize_onnx"
                raise FileNotFoundError(f"{path} is not there: {maker} writes it")
            self.sessions[name] = runtime.InferenceSession(str(path), options, providers=providers)

    @property
    def identity(self) -> dict[str, Any]:
        """As of `DiffusionTokenLoss`; the graphs' files stand for the networks."""
        found = {"vae": network_hash(self.pipe.vae, "vae"), "precision": self.precision}
        found.update(self.noise_identity)
        for name in GRAPHS:
            digest = hashlib.sha256()
            for file in sorted(graph_path(self.folder, name, self.precision).parent.iterdir()):
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
            found[name] = digest.hexdigest()
        return found

    @property
    def device(self) -> torch.device:
        """Tensors of this closure lie on the CPU; ONNX Runtime moves them."""
        return torch.device("cpu")

    def run(self, name: str, inputs: dict[str, Tensor]) -> Tensor:
        """Output of a graph."""
        return torch.from_numpy(self.sessions[name].run(None, _arrays(inputs))[0])

    def inputs(self, embeddings: Tensor, batch: TokenBatch) -> dict[str, dict[str, Tensor]]:
        """The inputs of both graphs by name, float32 but for the timesteps; the encoder is run."""
        count, table = len(embeddings), self.tables[0]
        rows = batch.ids[0].repeat(count, 1)
        with torch.no_grad(), injected(table, self.vocabularies[0], embeddings):
            text = {"embeddings": table(rows.to(table.weight.device)).float().cpu()}
        unet = {
            "noisy": batch.noisy.repeat(count, 1, 1, 1),
            "timesteps": batch.timesteps.repeat(count),
            "hidden": self.run("text_encoder", text),
        }
        return {"text_encoder": text, "unet": unet}

    def predict(self, embeddings: Tensor, batch: TokenBatch) -> Tensor:
        """As of `DiffusionTokenLoss`."""
        return self.run("unet", self.inputs(embeddings, batch)["unet"])
