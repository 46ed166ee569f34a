"""The stand-in and the real ComfyUI behind one interface, so that one set of tests runs on both."""

import importlib
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch

from . import standin
from .samplers import KSAMPLER, SAMPLERS

CHECKOUT = "PILOTAGE_COMFYUI"
SD15 = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 16,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_spatial_transformer": True,
    "num_heads": 2,
    "num_head_channels": -1,
    "legacy": False,
    "use_checkpoint": False,
    "dtype": torch.float32,
}
SD3 = {
    "input_size": None,
    "in_channels": 16,
    "depth": 2,
    "adm_in_channels": 8,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 16, "out_features": 128},
    },
    "pos_embed_scaling_factor": None,
    "pos_embed_max_size": 8,
    "num_patches": 64,
    "dtype": torch.float32,
}


class Backend:
    """What the tests need of either."""

    def prompts(self, width, batch=1, seed=5):
        """Positive and negative prompts, ever louder, each with shape (batch, tokens, width)."""
        generator = torch.Generator().manual_seed(seed)
        loud = torch.arange(1, batch + 1).view(-1, 1, 1)
        return [loud * torch.randn(batch, 3, width, generator=generator) for _ in range(2)]

    def noise(self, batch, channels=4, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, channels, 8, 8, generator=generator)

    @contextmanager
    def counting(self, model):
        """The number of rows that every pass of the network has."""
        rows, network = [], model.model.diffusion_model
        hook = network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
        try:
            yield rows
        finally:
            hook.remove()


class StandIn(Backend):
    """The stand-in."""

    width, samplers = standin.WIDTH, tuple(SAMPLERS)

    def __init__(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "comfy", standin)
        monkeypatch.setitem(sys.modules, "comfy.samplers", standin)

    def model(self, seed=0, kind="epsilon"):
        return standin.ModelPatcher(standin.Model(seed, kind))

    @torch.inference_mode()  # as ComfyUI runs its nodes
    def sample(
        self,
        model,
        sampler="euler",
        steps=8,
        cfg=5.0,
        batch=1,
        seed=0,
        callback=None,
        prompts=None,
        guider=standin.CFGGuider,
    ):
        positive, negative = prompts or self.prompts(self.width)
        conds = standin.condition(positive), standin.condition(negative)
        noise = self.noise(batch, seed=seed)
        sigmas = standin.schedule(model.model.model_sampling, steps)
        run = guider(model, *conds, cfg)
        function = KSAMPLER(SAMPLERS[sampler])
        return run.sample(noise, torch.zeros_like(noise), function, sigmas, callback, seed)


class ComfyUI(Backend):
    """The real one, from the checkout that the environment variable names."""

    width = 16

    def __init__(self):
        place = os.environ.get(CHECKOUT)
        if not place or not Path(place, "comfy", "samplers.py").is_file():
            raise FileNotFoundError(
                f"{CHECKOUT} has to name a checkout of ComfyUI, it is {place!r}"
            )
        if place not in sys.path:
            sys.path.append(place)
        self.module("comfy.cli_args").args.cpu = True
        self.samplers = tuple(self.module("comfy.samplers").SAMPLER_NAMES)
        self.version = self.module("comfyui_version").__version__
        self.place = Path(place)

    def module(self, name):
        return importlib.import_module(name)

    def node(self, module, name):
        """A node's function of ComfyUI's own, whichever form its definition has."""
        cls = getattr(self.module(module), name)
        if hasattr(cls, "execute"):
            return lambda *args, **kwargs: cls.execute(*args, **kwargs).result[0]
        return lambda *args, **kwargs: getattr(cls(), cls.FUNCTION)(*args, **kwargs)[0]

    def model(self, seed=0, kind="epsilon"):
        """A tiny model of Stable Diffusion 1.5's form, or 3's, with random weights.

        What it is given is mostly noise, and part of its answer, as if it had been trained.
        """
        base, known = self.module("comfy.model_base"), self.module("comfy.supported_models")
        kinds = base.ModelType
        which = {"epsilon": kinds.EPS, "v": kinds.V_PREDICTION, "flow": kinds.FLOW}
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            if kind == "sd3":
                model = base.SD3(known.SD3(dict(SD3)), device="cpu")
            else:
                model = base.BaseModel(known.SD15(dict(SD15)), which[kind], device="cpu")
            network = model.diffusion_model
            for parameter in network.parameters():
                parameter.data = torch.randn(parameter.shape) / parameter[0].numel() ** 0.5
            for buffer in network.buffers():  # a checkpoint would fill them
                buffer.copy_(torch.randn(buffer.shape))
        for module in network.modules():
            if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
                module.weight.data.fill_(1)
                module.bias.data.zero_()
        network.register_forward_hook(lambda _, args, out: args[0] + 0.3 * out)
        patcher = self.module("comfy.model_patcher").ModelPatcher
        return patcher(model.eval(), torch.device("cpu"), torch.device("cpu"))

    def inputs(self, model, batch=1, seed=0, prompts=None):
        """Noise, positive and negative condition, as ComfyUI's nodes hand them on."""
        noise = self.noise(batch, model.model.latent_format.latent_channels, seed=seed)
        pooled = {"pooled_output": torch.ones(1, 8)}
        return noise, *([[text, pooled]] for text in prompts or self.prompts(self.width))

    @torch.inference_mode()  # as ComfyUI runs its nodes
    def sample(
        self,
        model,
        sampler="euler",
        steps=8,
        cfg=5.0,
        batch=1,
        seed=0,
        callback=None,
        prompts=None,
        **options,
    ):
        noise, positive, negative = self.inputs(model, batch, seed, prompts)
        given = (model, noise, steps, cfg, sampler, "normal", positive, negative)
        options = {"callback": callback, "disable_pbar": True, "seed": seed, **options}
        latent = options.pop("latent", torch.zeros_like(noise))
        return self.module("comfy.sample").sample(*given, latent, **options)
