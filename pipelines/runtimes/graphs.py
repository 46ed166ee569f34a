"""A pipeline whose UNet and text encoder are ONNX graphs."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import BaseModelOutput

from ..fitting.identity import network_hash

GRAPHS = ("text_encoder", "unet")
# In a graph's metadata: hash of the network that it was exported from, and "int8" if it is.
WEIGHTS, PRECISION = "pilotage.weights", "pilotage.precision"

Run = Callable[[dict[str, np.ndarray]], np.ndarray]


@dataclass
class Opened:
    """A graph as a runtime has opened it.

    Args:
        inputs: Name -> shape, as far as it is fixed (None elsewhere).
        half: Whether it takes float16 where others take float32.
        notes: What its metadata says of `WEIGHTS` and `PRECISION`; empty where it does not tell.
        run: Inputs by name -> its first output.
    """

    inputs: dict[str, list[int | None]]
    half: bool
    notes: dict[str, str]
    run: Run


def graph_path(folder: str | Path, name: str) -> Path:
    """Where the graph of a network lies, as in the folders of optimum."""
    return Path(folder) / name / "model.onnx"


def on_runtime(pipe: Any, folder: str | Path, runtime: str = "onnxruntime") -> Any:
    """Put ONNX graphs in the place of a pipeline's UNet and text encoder.

    The token embeddings, VAE and scheduler stay as they are. Where the folder has no text encoder
    that takes embeddings (those that optimum exports take token ids), the pipeline keeps its own.

    Args:
        pipe: A pipeline of the Stable Diffusion 1 or 2 family, on the CPU.
        folder: With ``unet/model.onnx`` and ``text_encoder/model.onnx``.
        runtime: "onnxruntime" or "openvino"; behind a colon an execution provider or device of it
            ("onnxruntime:CUDAExecutionProvider", "openvino:NPU"), else the CPU.

    Returns:
        The same object. Its former networks are freed if nothing else holds them.

    Raises:
        ValueError: another family, an unknown runtime or device, or graphs of another model.
        FileNotFoundError: the graphs are not there.
        ImportError: the runtime is missing.
    """
    check_family(pipe)
    check_runtime(folder, runtime)
    found: dict[str, GraphNetwork] = {}
    for name, kind in (("unet", GraphUNet), ("text_encoder", GraphTextEncoder)):
        graph = Graph(graph_path(folder, name), runtime)
        if name == "text_encoder" and "inputs_embeds" not in graph.opened.inputs:
            continue
        _check_graph(graph, name, getattr(pipe, name))
        found[name] = kind(graph, getattr(pipe, name))
    pipe.register_modules(**found)
    return pipe


def check_runtime(folder: str | Path, runtime: str) -> None:
    """What can be wrong with `on_runtime` without a pipeline; raises as it does."""
    name = runtime.partition(":")[0]
    if name not in RUNTIMES:
        raise ValueError(f"unknown runtime {name!r}: expected {' or '.join(RUNTIMES)}")
    for network in GRAPHS:
        path = graph_path(folder, network)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: 'pilotage export' writes it")


def check_family(pipe: Any) -> None:
    """ValueError for anything but a Stable Diffusion 1 or 2 pipeline whose text has no mask."""
    if getattr(pipe, "text_encoder_2", None) is not None or not all(
        hasattr(pipe, name) for name in GRAPHS
    ):
        raise ValueError(
            f"{type(pipe).__name__}: expected a pipeline of the Stable Diffusion 1 or 2 family "
            "(one text encoder and a UNet)"
        )
    if getattr(pipe.text_encoder.config, "use_attention_mask", False):
        raise ValueError("text encoders with an attention mask cannot be graphs")


@contextlib.contextmanager
def recorded(pipe: Any) -> Iterator[dict[str, list[dict[str, np.ndarray]]]]:
    """Within this context, what the graphs of a pipeline are given is kept, by network.

    Raises:
        ValueError: a network of the pipeline is no graph.
    """
    networks = {name: getattr(pipe, name) for name in GRAPHS}
    for name, network in networks.items():
        if not isinstance(network, GraphNetwork):
            raise ValueError(f"{name} is no graph: on_runtime puts graphs into a pipeline")
    kept: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in networks}
    runs = {name: network.graph.opened.run for name, network in networks.items()}

    def keeping(name: str) -> Run:
        def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
            kept[name].append(inputs)
            return runs[name](inputs)

        return run

    try:
        for name, network in networks.items():
            network.graph.opened.run = keeping(name)
        yield kept
    finally:
        for name, network in networks.items():
            network.graph.opened.run = runs[name]


class Graph:
    """A graph on a runtime.

    Args:
        path: The ONNX file; big weights are files beside it.
        runtime: See `on_runtime`.
    """

    def __init__(self, path: Path, runtime: str) -> None:
        self.path, self.runtime = path, runtime
        name, _, device = runtime.partition(":")
        self.opened = RUNTIMES[name](path, device)

    def __call__(self, **inputs: Tensor) -> Tensor:
        """The graph's first output."""
        float_type = torch.float16 if self.opened.half else torch.float32
        arrays = {}
        for name, tensor in inputs.items():
            value = tensor.detach().to(float_type) if tensor.is_floating_point() else tensor
            arrays[name] = value.contiguous().numpy()
        return torch.from_numpy(self.opened.run(arrays))

    @property
    def digest(self) -> str:
        """SHA-256 of its files."""
        digest = hashlib.sha256()
        for file in sorted(self.path.parent.iterdir()):
            if file.is_file():
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
        return digest.hexdigest()


def _onnxruntime(path: Path, device: str) -> Opened:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("this needs ONNX Runtime: pip install pilotage[onnx]") from error
    provider, there = device or "CPUExecutionProvider", onnxruntime.get_available_providers()
    if provider not in there:
        raise ValueError(f"ONNX Runtime has no {provider} here; there are {', '.join(there)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    inputs = {
        node.name: [size if isinstance(size, int) else None for size in node.shape]
        for node in session.get_inputs()
    }
    half = any(node.type == "tensor(float16)" for node in session.get_inputs())
    noted = session.get_modelmeta().custom_metadata_map
    notes = {name: noted.get(name, "") for name in (WEIGHTS, PRECISION)}
    return Opened(inputs, half, notes, lambda values: session.run(None, values)[0])


def _openvino(path: Path, device: str) -> Opened:
    try:
        import openvino
    except ImportError as error:
        raise ImportError("this needs OpenVINO: pip install pilotage[openvino]") from error
    core = openvino.Core()
    device = device or "CPU"
    if device.partition(".")[0] not in {name.partition(".")[0] for name in core.available_devices}:
        there = ", ".join(core.available_devices)
        raise ValueError(f"OpenVINO has no device {device} here; there are {there}")
    model = core.read_model(path)
    # Some processors would round to bfloat16 unasked.
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    if device == "CPU":
        settings["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
    compiled = core.compile_model(model, device, settings)
    inputs = {
        port.any_name: [size.get_length() if size.is_static else None for size in shape]
        for port in compiled.inputs
        for shape in (port.partial_shape,)
    }
    half = any(port.element_type == openvino.Type.f16 for port in compiled.inputs)
    notes = dict.fromkeys((WEIGHTS, PRECISION), "")
    for name in notes:
        if model.has_rt_info(["framework", name]):
            notes[name] = model.get_rt_info(["framework", name]).astype(str)
    return Opened(inputs, half, notes, lambda values: compiled(values)[0].copy())


RUNTIMES: dict[str, Callable[[Path, str], Opened]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


class GraphNetwork(ModelMixin):
    """A network that is a graph; tensors lie on the CPU, the runtime moves them.

    Args:
        graph: The graph.
        network: What it stands for: its configuration is taken over.

    Attributes:
        config: That configuration, and which graph on which runtime.
    """

    def __init__(self, graph: Graph, network: Any) -> None:
        super().__init__()
        self.graph, self._dtype = graph, network.dtype
        own = {"graph": graph.digest, "runtime": graph.runtime}
        own["precision"] = graph.opened.notes[PRECISION]
        config = network.config
        if isinstance(config, PretrainedConfig):
            self.config: Any = type(config).from_dict(config.to_dict() | own)
        else:
            self.config = FrozenDict(dict(config) | own)

    @property
    def dtype(self) -> torch.dtype:
        """Of its outputs: that of the network that it stands for."""
        return self._dtype

    @property
    def device(self) -> torch.device:
        """Where its inputs and outputs lie."""
        return torch.device("cpu")

    def save_pretrained(self, *_args: Any, **_kwargs: Any) -> None:
        """ValueError: nothing but the graph's files holds its weights."""
        raise ValueError(
            f"{type(self).__name__} cannot be saved: it runs {self.graph.path}. Save a pipeline "
            "loaded anew, without on_runtime"
        )


class GraphUNet(GraphNetwork):
    """The graph of a UNet."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """As of ``UNet2DConditionModel``, of these inputs alone.

        Args:
            sample: With shape (R, C, h, w).
            timestep: A number or a tensor with shape (), (1,) or (R,).
            encoder_hidden_states: With shape (R, L, D).
            return_dict: False returns a tuple.
            **others: Have to be None.

        Raises:
            ValueError: an input is given that the graph does not have.
        """
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"the graph {self.graph.path} has no input {', '.join(given)}")
        timesteps = torch.as_tensor(timestep).to(torch.int64).expand(len(sample))
        output = self.graph(
            sample=sample, timestep=timesteps, encoder_hidden_states=encoder_hidden_states
        ).to(self.dtype)
        return UNet2DConditionOutput(sample=output) if return_dict else (output,)


class GraphTextEncoder(GraphNetwork):
    """The graph of a text encoder behind its table of token embeddings, which stays in torch."""

    def __init__(self, graph: Graph, network: Any) -> None:
        super().__init__(graph, network)
        self.embeddings = network.get_input_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        """The table of token embeddings."""
        return self.embeddings

    def resize_token_embeddings(self, count: int) -> nn.Module:
        """Give the table `count` tokens: those it has, as far as they go, and new ones."""
        old = self.embeddings.weight[:count]
        table = nn.Embedding(count, old.shape[1], device=old.device, dtype=old.dtype)
        table.weight.requires_grad_(False)[: len(old)] = old
        self.embeddings = table
        return table

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        """The hidden states (R, L, D) of token ids (R, L), as a transformers encoder gives them.

        Raises:
            ValueError: a mask is given, or other hidden states than the last are asked for.
        """
        if attention_mask is not None or output_hidden_states:
            raise ValueError(f"{self.graph.path} takes no mask and gives the last hidden states")
        output = self.graph(inputs_embeds=self.embeddings(input_ids)).to(self.dtype)
        return BaseModelOutput(last_hidden_state=output) if return_dict else (output,)


def _check_graph(graph: Graph, name: str, network: Any) -> None:
    """ValueError if a graph cannot be that of a pipeline's network."""
    config = network.config
    if name == "unet":
        width = config.cross_attention_dim
        wanted = {
            "sample": {1: config.in_channels},
            "timestep": {},
            "encoder_hidden_states": {2: width},
        }
    else:
        wanted = {"inputs_embeds": {2: network.get_input_embeddings().weight.shape[1]}}
    names = graph.opened.inputs
    if set(names) != set(wanted):
        raise ValueError(
            f"{graph.path} takes {', '.join(names)}, not {', '.join(wanted)}: export it with "
            "'pilotage export'"
        )
    for key, sizes in wanted.items():
        for axis, size in sizes.items():
            if (found := names[key][axis]) not in (None, size):
                raise ValueError(
                    f"{graph.path} is of another model: {key} has {found} channels, the "
                    f"pipeline's {size}"
                )
    on_meta = any(p.is_meta for p in network.parameters())
    weights = graph.opened.notes[WEIGHTS]
    if weights and not on_meta and weights != network_hash(network, name):
        raise ValueError(
            f"{graph.path} was exported from other weights than those of this pipeline's {name}: "
            "export it again, or load the model it was made from (in the same precision)"
        )
