"""Calls that several processes make together: ``python -m tests.pipelines.seam.together TASK``.

Each of them is started with the rank of a group of gloo (`environment`).
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import diffusers
import torch
from accelerate import PartialState
from safetensors.torch import save_file

from pilotage.guidance import APG, CFG, AdaptiveGuidance, Interval, forecast, hold
from pilotage.pipelines import guided

from ...families import FAMILIES
from ..checks import run

ROOT = Path(__file__).parents[3]
STEPS = 5
STOP = CFG() | AdaptiveGuidance(-1.0)  # every sample after the first step
# Some samples earlier than others, and never all.
MIXED = APG() | AdaptiveGuidance(0.9984)
# Name -> family, guidance, samples, more arguments of the call.
CALLS = {
    "sd cfg": ("sd", "cfg", 1, {}),
    "sd apg": ("sd", APG(), 2, {}),
    "sd ag": ("sd", STOP, 3, {}),
    "sd mixed ag": ("sd", MIXED, 3, {}),
    "sd forecast": ("sd", CFG() | forecast(), 2, {}),
    "sd hold": ("sd", APG() | hold(), 2, {}),
    "sd interval": ("sd", CFG() | Interval(1, 3), 2, {}),
    "sd noise": ("sd", APG(), 1, {"scheduler": "EulerAncestralDiscreteScheduler"}),
    "sdxl apg": ("sdxl", APG(), 1, {}),
    "sd3 apg": ("sd3", APG(), 1, {}),
    "sd3 ag": ("sd3", STOP, 2, {}),
    "pix2pix apg": ("pix2pix", APG(), 1, {}),
    "pix2pix ag": ("pix2pix", STOP, 2, {}),
    "animatediff apg": ("animatediff", APG(), 1, {}),
    "flux apg": ("flux", APG(), 1, {}),
    "wan cfg": ("wan", "cfg", 1, {}),
    "wan apg": ("wan", APG(), 1, {}),
    "wan ag": ("wan", STOP, 1, {}),
    "wan forecast": ("wan", CFG() | forecast(), 1, {}),
    "wan hold": ("wan", CFG() | hold(), 1, {}),
    "wan interval": ("wan", APG() | Interval(1, 3), 1, {}),
    "cosmos2 apg": ("cosmos2", APG(), 1, {}),  # copies the first prediction before the second
    "qwen_image_21 apg": ("qwen_image_21", APG(), 1, {}),  # fills a cache at the first step
    "ltx2 apg": ("ltx2", APG(), 1, {}),  # predicts sound as well
}
# To rounding only: what a first step, of which nothing is known, groups otherwise.
NEARLY = {
    "wan many": ("wan", APG(), 3, {}),
    "wan many ag": ("wan", STOP, 3, {}),
    "sd_pag": ("sd_pag", APG(), 2, {}),
    "ltx2_all_guidances": ("ltx2_all_guidances", "cfg", 1, {}),
}


def pipeline(name, scheduler=None, **attributes):
    pipe = guided(FAMILIES[name].build())
    if scheduler:
        pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    return pipe


def call(pipe, name, guidance, batch, **extra):
    """Latents of a call, and how many evaluations every sample had."""
    family, extra = FAMILIES[name], {k: v for k, v in extra.items() if k != "scheduler"}
    arguments = family.call(batch, family.scale_name == "true_cfg_scale")
    arguments |= {"num_inference_steps": STEPS, "guidance": guidance}
    result = run(pipe, arguments | extra)[0]
    return torch.as_tensor(result), pipe.guidance_trace.nfe


def made(name, given, again=False, **extra):
    """`call` on a pipeline of its own, or the second on it: its first step is known by then."""
    family, guidance, batch, more = given
    pipe = pipeline(family, **more)
    for _ in range(1 + again):
        result = call(pipe, family, guidance, batch, **more, **extra)
    return result


def rank():
    return int(os.environ["RANK"])


def other_weights():
    pipe = pipeline("sd")
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(rank())
    return pipe


def cached():
    pipe = pipeline("wan")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(0.1))
    return pipe


def failing(pipe, step, t, kwargs):
    kwargs["latents"] = kwargs["latents"] + (rank() if step == 1 else 0)
    return kwargs


def mistakes():
    """What cannot work: name -> a pipeline, what is special in its call, and its family."""
    torch.manual_seed(rank())
    stock = FAMILIES["sd"].call(1, False)
    seed = torch.Generator().manual_seed(rank())
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    free = {"latents": noise, "generator": None}
    return {
        "prompt": (pipeline("sd"), {"prompt": [f"{stock['prompt'][0]} {rank()}"]}),
        "seed": (pipeline("sd"), {"generator": [seed]}),
        "no seed": (pipeline("sd"), {"generator": None}),
        "steps": (pipeline("sd"), {"num_inference_steps": STEPS + rank()}),
        "guidance": (pipeline("sd"), {"guidance": APG(eta=0.1 * rank())}),
        "weights": (other_weights(), {}),
        "noise": (pipeline("sd", "EulerAncestralDiscreteScheduler"), free),
        "callback": (pipeline("sd"), {"callback_on_step_end": failing}),
        "cache": (cached(), {}, "wan"),
        "one branch": (pipeline("sd"), {"guidance": CFG() | forecast(), "guidance_scale": 1.0}),
        "perturbed": (pipeline("sd_pag"), {}, "sd_pag"),
    }


def everything(folder):
    """All calls, then all mistakes, then a call again: written to files of this rank."""
    latents, told = {}, {}
    for name, given in (CALLS | NEARLY).items():
        latents[name], told[name] = made(name, given, parallel="branches")
    for name in ("sd apg", "wan apg"):
        latents[f"{name} again"], _ = made(name, CALLS[name], again=True, parallel="branches")
    errors = {}
    for name, (pipe, extra, *family) in mistakes().items():
        arguments = {"guidance": APG(), "parallel": "branches"} | extra
        try:
            call(pipe, (family or ["sd"])[0], arguments.pop("guidance"), 1, **arguments)
        except (OSError, ValueError, RuntimeError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    latents["at last"], _ = made("sd apg", CALLS["sd apg"], parallel="branches")
    save_file({k: v.contiguous() for k, v in latents.items()}, folder / f"{rank()}.safetensors")
    (folder / f"{rank()}.json").write_text(json.dumps({"nfe": told, "errors": errors}))


def three(folder):
    """Three processes: one branch each, and more than there are."""
    latents, _ = made("pix2pix apg", CALLS["pix2pix apg"], parallel="branches")
    with contextlib.suppress(ValueError):
        made("sd apg", CALLS["sd apg"], parallel="branches")
        latents.zero_()
    save_file({"pix2pix": latents.contiguous()}, folder / f"{rank()}.safetensors")


def lost(folder, how):
    """The last process ends, or does not go on, in the middle of a call."""
    if how == "hangs":
        PartialState(cpu=True, timeout=timedelta(seconds=3))

    def stop(pipe, step, t, kwargs):
        if step == 1 and rank() == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            while not (folder / "over").exists():
                time.sleep(0.1)
            sys.exit(3)
        return kwargs

    made("sd apg", CALLS["sd apg"], parallel="branches", callback_on_step_end=stop)


def start(count, *task):
    """Start `count` processes of a task."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-W", "ignore", "-m", __name__, *map(str, task)]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(i), "LOCAL_RANK": str(i)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    task = {"everything": everything, "three": three, "lost": lost}[sys.argv[1]]
    task(Path(sys.argv[2]), *sys.argv[3:])
