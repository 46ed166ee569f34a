"""Writing a pipeline's networks as ONNX graphs, in single or half precision or int8."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..fitting.identity import network_hash
from ..quantization.int8 import Int8Layer
from .graphs import GRAPHS, PRECISION, WEIGHTS, check_family, graph_path

# What may lie in the folder of a graph that is written anew.
OWN = ("model.onnx", "config.json")


class _TextEncoder(nn.Module):
    """Hidden states (R, L, D) of token embeddings (R, L, d).

    With its attention written out: fused, the exporter mixes float32 into half precision.
    """

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, embeddings: Tensor) -> Tensor:
        table = self.encoder.get_input_embeddings()
        fused = self.encoder.config._attn_implementation
        handle = table.register_forward_hook(lambda *_: embeddings)
        try:
            self.encoder.set_attn_implementation("eager")
            ids = torch.zeros(embeddings.shape[:2], dtype=torch.int64)
            return self.encoder(ids, return_dict=False)[0]
        finally:
            self.encoder.set_attn_implementation(fused)
            handle.remove()


class _UNet(nn.Module):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, timesteps: Tensor, hidden: Tensor) -> Tensor:
        return self.unet(noisy, timesteps, hidden, return_dict=False)[0]


def check_folder(folder: str | Path) -> None:
    """ValueError if something else than graphs would be overwritten, or nothing can be written."""
    folder = Path(folder)
    place = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise ValueError(f"{folder} cannot be written: {place} is not a folder to write to")
    for name in GRAPHS:
        place = graph_path(folder, name).parent
        files = [file.name for file in place.iterdir()] if place.is_dir() else []
        others = [file for file in files if not file.startswith(OWN)]
        if others:
            raise ValueError(
                f"{place} holds {others[0]}, which is no graph: name another folder for graphs"
            )


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
    """Write graphs of a pipeline's text encoder and UNet, for any number of rows.

    ``unet/model.onnx`` takes and gives what optimum's does; ``text_encoder/model.onnx`` takes token
    *embeddings* (``inputs_embeds``), so that a learned vector is an input. With PyTorch's
    TorchScript exporter.

    Args:
        pipe: A pipeline of the Stable Diffusion 1 or 2 family, in float32 or float16 on the CPU.
            The graphs compute as it does.
        folder: What is written: the text encoder and UNet each in a folder of its own.

    Raises:
        ValueError: another pipeline, one that is quantized already (`quantize_onnx` quantizes the
            graphs), or not in float32 or float16 on the CPU; or other files lie in the folder.
        ImportError: onnx or onnxruntime is missing.
    """
    _need_onnx()
    check_family(pipe)
    check_folder(folder)
    for name in GRAPHS:
        network = getattr(pipe, name)
        if any(isinstance(m, Int8Layer) for m in network.modules()) or (
            getattr(network, "hf_quantizer", None) is not None
        ):
            raise ValueError(f"export_onnx: {name} is quantized; export full precision")
        if network.dtype not in (torch.float32, torch.float16) or network.device.type != "cpu":
            raise ValueError(
                f"export_onnx: {name} must be float32 or float16 on the CPU, got {network.dtype} "
                f"on {network.device}"
            )
    config, side = pipe.unet.config, pipe.unet.config.sample_size
    length, width = pipe.tokenizer.model_max_length, pipe.text_encoder.config.hidden_size
    of_text, of_unet = pipe.text_encoder.dtype, pipe.unet.dtype
    hidden = torch.zeros(2, length, config.cross_attention_dim, dtype=of_unet)
    inputs = {
        "text_encoder": {"inputs_embeds": torch.zeros(2, length, width, dtype=of_text)},
        "unet": {
            "sample": torch.zeros(2, config.in_channels, side, side, dtype=of_unet),
            "timestep": torch.tensor([1, 2]),
            "encoder_hidden_states": hidden,
        },
    }
    outputs = {"text_encoder": "last_hidden_state", "unet": "out_sample"}
    wrapped = {"text_encoder": _TextEncoder(pipe.text_encoder), "unet": _UNet(pipe.unet)}
    for name, named in inputs.items():
        with _writing(graph_path(folder, name)) as partial, warnings.catch_warnings():
            # It warns that branches on shapes become constants; those on the number of rows only
            # choose a memory layout.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                wrapped[name].eval(),
                tuple(named.values()),
                str(partial),
                input_names=list(named),
                output_names=[outputs[name]],
                dynamic_axes={key: {0: "rows"} for key in (*named, outputs[name])},
                opset_version=17,
                dynamo=False,
            )
            network = getattr(pipe, name)
            _finish(partial, {WEIGHTS: network_hash(network, name)})
            save = network.save_config if name == "unet" else network.config.save_pretrained
            save(partial.parent)
    return Path(folder)


def _finish(path: Path, notes: dict[str, str]) -> None:
    """Put notes into a graph's metadata, and its weights into one file.

    That file lies beside it where one ONNX file would be too big.
    """
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, notes)
    for file in path.parent.iterdir():
        file.unlink()
    big = model.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF
    onnx.save(
        model, path, save_as_external_data=big, location="model.onnx_data", size_threshold=1024
    )


def quantize_onnx(
    source: str | Path,
    folder: str | Path,
    calibration: Mapping[str, Sequence[Mapping[str, np.ndarray]]],
) -> Path:
    """Write int8 graphs: weights per output channel, activations in ranges fixed beforehand.

    Fixed ranges make a row's output independent of the other rows of its call, which ranges found
    at run time would not: the losses of K tokens must not depend on each other. Products of two
    activations (attention) stay in float32.

    Args:
        source: Folder of the float32 graphs.
        folder: Another one, to write to.
        calibration: What each network was given (see `recorded`), over all timesteps that will be
            used; the ranges are the extremes found there.

    Raises:
        ValueError: no calibration data, the same folder, graphs that are not float32, or other
            files in `folder`.
        FileNotFoundError: the float32 graphs are not there.
        ImportError: onnx or onnxruntime is missing.
    """
    _need_onnx()
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    source, folder = Path(source), Path(folder)
    if source.resolve() == folder.resolve():
        raise ValueError(f"int8 graphs need a folder of their own, not {folder}")
    if not all(calibration.get(name) for name in GRAPHS):
        raise ValueError("quantize_onnx: no calibration data")
    check_folder(folder)
    weights = {}
    for name in GRAPHS:
        path = graph_path(source, name)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: export_onnx writes it")
        model = onnx.load(path, load_external_data=False)
        weights[name] = next((p.value for p in model.metadata_props if p.key == WEIGHTS), "")
        kinds = {tensor.data_type for tensor in model.graph.initializer}
        if kinds & {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8}:
            raise ValueError(f"{path} is not in float32: export it again")

    class Reader(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.rows = iter(calibration[name])

        def get_next(self) -> dict[str, np.ndarray] | None:
            found = next(self.rows, None)
            return None if found is None else dict(found)

    for name in GRAPHS:
        with _writing(graph_path(folder, name)) as partial, _no_advice():
            quantize_static(
                str(graph_path(source, name)),
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
            _finish(partial, {WEIGHTS: weights[name], PRECISION: "int8"})
            shutil.copy2(graph_path(source, name).with_name("config.json"), partial.parent)
    return folder


@contextlib.contextmanager
def _no_advice() -> Iterator[None]:
    """Without ONNX Runtime's warnings that a graph might be simplified first."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ImportError("this needs onnx and onnxruntime: pip install pilotage[onnx]") from error
