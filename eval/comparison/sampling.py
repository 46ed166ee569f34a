"""Pictures for evaluation: prompts x seeds x settings, resumable, the same on any machine count.

* One generator a sample, seeded from (seed, index of the prompt): the same noise for every
  setting, whatever the batch.
* Samples are grouped into fixed chunks of `batch_size`, which are shared out among the processes
  of ``accelerate launch`` (on CPUs without MPI: ``torchrun``, over gloo): a picture is always
  computed beside the same others, so its bytes do not depend on the number of processes. Another
  batch size means the same samples and noise; convolutions then round differently, which moves a
  few pixels by one level of 255.
* A chunk is finished when its JSON file is there; every file is whole or not there. Killed anywhere
  and run again, the folder ends up with the same pictures.
* Chunks are made in turn for all settings: an interrupted run has as many samples of each.
"""

from __future__ import annotations

import inspect
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from ...guidance import Guidance
from ...guidance.files import fingerprint, write_json
from ...guidance.saved import to_dict
from ...pipelines.fitting.fitted import negative_argument, unconditional_text
from ...pipelines.fitting.identity import pipeline_identity
from ...pipelines.guided import scale_argument, scale_option
from ...pipelines.processes import processes
from ...pipelines.seam.exchange import connected
from ...pipelines.seam.noise_levels import check_scheduler, knows_levels
from ..metadata import save_picture
from .cost import update_norms
from .plan import Plan, Samples, Setting, sample_seed

PLAN = "plan.json"
# Arguments of a pipeline's call that are the comparison's own, besides the scale.
OWN = {"prompt", "guidance", "detailed_trace", "num_inference_steps", "generator"}
OWN |= {"num_images_per_prompt", "output_type", "return_dict", "parallel", "batch_branches"}


def generate(
    pipe: Any,
    plan: Plan,
    folder: Path | str,
    progress: bool = True,
    parallel: str = "samples",
) -> list[Samples]:
    """Make what is missing of a plan in `folder`.

    Under ``accelerate launch`` the processes share the work, and return when all is finished.

    Args:
        pipe: A guided pipeline, on its device.
        plan: What to generate.
        folder: Where the pictures go; may hold an interrupted run of the same plan, or of one with
            other settings.
        progress: Show a bar (main process only).
        parallel: What several processes share out: "samples", each its own chunks; or "branches",
            the evaluations of every step of every chunk, which rounds as branches evaluated in
            turn do.

    Returns:
        The samples of every setting, in the plan's order.

    Raises:
        ValueError: the pipeline takes no prompt, an option is not an argument of its call, a
            setting leaves nothing to guide, or the folder holds another plan (the message names
            what differs). Nothing is written then.
    """
    state = processes()
    together = parallel == "branches"
    if together:
        connected()
    folder = Path(folder)
    plan, guidances, identity = _prepared(pipe, plan, folder, together)
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(folder / PLAN, identity)
    first, stride = (0, 1) if together else (state.process_index, state.num_processes)
    work = [
        (number, setting, guidance)
        for number in range(first, len(plan.chunks), stride)
        for setting, guidance in zip(plan.settings, guidances, strict=True)
    ]
    finished = [_finished(folder, plan, setting, number) for number, setting, _ in work]
    if together:  # by the process that writes
        finished = broadcast_object_list(finished)
    todo = [item for item, is_there in zip(work, finished, strict=True) if not is_there]
    pipe.set_progress_bar_config(disable=True)
    bar = tqdm(
        todo,
        "pictures",
        total=len(work),
        initial=len(work) - len(todo),
        unit="chunk",
        disable=not (progress and state.is_main_process),
    )
    for made, (number, setting, guidance) in enumerate(bar):
        record = _make(pipe, plan, folder, number, setting, guidance, together)
        if state.is_main_process or not together:
            write_json(_record_path(folder, setting, number), record | {"first": made == 0})
    state.wait_for_everyone()
    return [_samples(plan, setting, folder) for setting in plan.settings]


def missing(
    pipe: Any, plan: Plan, folder: Path, parallel: str = "samples"
) -> list[tuple[int, Setting]]:
    """The chunks of a plan that are not finished in a folder: number and setting of each.

    Raises:
        ValueError: as `generate`.
    """
    _prepared(pipe, plan, folder, parallel == "branches")
    return [
        (number, setting)
        for number in range(len(plan.chunks))
        for setting in plan.settings
        if not _finished(folder, plan, setting, number)
    ]


def _prepared(
    pipe: Any, plan: Plan, folder: Path, together: bool
) -> tuple[Plan, list[Guidance], dict[str, Any]]:
    """The plan, its options saying what is unconditional; guidances; content of ``plan.json``."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    if "prompt" not in parameters or "guidance" not in parameters:
        raise ValueError(
            f"{type(pipe).__name__} cannot be compared: its call takes no prompt or no guidance "
            "(wrap it with pilotage.pipelines.guided)"
        )
    for name in plan.options:
        if name not in parameters or name in {*OWN, scale_argument(type(pipe))}:
            raise ValueError(f"{name!r} cannot be an option of {type(pipe).__name__}'s call here")
    guidances = [pipe.resolve_guidance(setting.guidance) for setting in plan.settings]
    for setting, guidance in zip(plan.settings, guidances, strict=True):
        if setting.scale <= 1 and not guidance.is_plain:
            raise ValueError(f"{setting.label}: guidance needs a scale > 1")
        if guidance.needs_level:
            check_scheduler(pipe.scheduler)
    negative = unconditional_text(pipe, plan.options.get("negative_prompt"))
    plan = replace(plan, options=plan.options | {"negative_prompt": negative})
    identity = {  # everything the pictures depend on
        **pipeline_identity(pipe),
        "torch": str(torch.__version__),
        "device": pipe.device.type,
        "prompts": list(plan.prompts),
        "seeds": list(plan.seeds),
        "batch_size": plan.batch_size,
        "options": plan.options,
        "settings": [
            {
                "method": s.method,
                "guidance": str(g),
                # What a name or a short text leaves out: coefficients, say.
                "digest": fingerprint(to_dict(g))[:16],
                "scale": s.scale,
                "steps": s.steps,
            }
            for s, g in zip(plan.settings, guidances, strict=True)
        ],
    }
    if together:
        identity["parallel"] = "branches"
    return plan, guidances, _joined(folder / PLAN, identity)


def _samples(plan: Plan, setting: Setting, folder: Path) -> Samples:
    """The samples of one setting, all finished."""
    paths = [_record_path(folder, setting, number) for number in range(len(plan.chunks))]
    records = [json.loads(path.read_text()) for path in paths]
    warm = [r for r in records if not r["first"]] or records
    updates = [r["update"] for r in records]
    return Samples(
        setting,
        [_picture_path(folder, setting, *sample) for sample in plan.samples],
        [plan.prompts[i] for _, i in plan.samples],
        [n for r in records for n in r["nfe"]],
        None if None in updates else [u for update in updates for u in update],
        sum(r["seconds"] for r in warm) / sum(len(r["nfe"]) for r in warm),
    )


def _make(
    pipe: Any,
    plan: Plan,
    folder: Path,
    number: int,
    setting: Setting,
    guidance: Guidance,
    together: bool,
) -> dict[str, Any]:
    """Generate the pictures of one chunk and write them; what its record says.

    `together`: with all processes, of which the main one writes.
    """
    chunk = plan.chunks[number]
    negative = plan.options["negative_prompt"]
    options = plan.options | negative_argument(pipe, negative, len(chunk))
    scale = scale_option(pipe, setting.scale)
    detailed = knows_levels(pipe.scheduler)
    begin = time.perf_counter()
    images = pipe(
        prompt=[plan.prompts[i] for _, i in chunk],
        guidance=guidance,
        detailed_trace=detailed,
        parallel="branches" if together else None,
        num_inference_steps=setting.steps,
        generator=[torch.Generator().manual_seed(sample_seed(*sample)) for sample in chunk],
        **scale,
        **options,
    ).images
    seconds = time.perf_counter() - begin  # the pictures are on the host: nothing is pending
    trace = pipe.guidance_trace
    for (seed, i), image, nfe in zip(chunk, images, trace.nfe, strict=True):
        made = {"prompt": plan.prompts[i], "seed": seed, "guidance": str(guidance)}
        made |= scale | {"steps": setting.steps, "nfe": nfe, "negative_prompt": negative}
        made["scheduler"] = type(pipe.scheduler).__name__
        if processes().is_main_process or not together:
            save_picture(_picture_path(folder, setting, seed, i), image, made)
    return {
        "samples": [list(sample) for sample in chunk],
        "nfe": trace.nfe,
        "update": update_norms(trace, guidance, pipe.scheduler) if detailed else None,
        "seconds": round(seconds, 6),
    }


def _picture_path(folder: Path, setting: Setting, seed: int, prompt_index: int) -> Path:
    return folder / setting.slug / f"{seed:06d}-{prompt_index:05d}.png"


def _record_path(folder: Path, setting: Setting, number: int) -> Path:
    return folder / setting.slug / f"chunk-{number:05d}.json"


def _finished(folder: Path, plan: Plan, setting: Setting, number: int) -> bool:
    pictures = [_picture_path(folder, setting, *sample) for sample in plan.chunks[number]]
    return all(path.is_file() for path in (_record_path(folder, setting, number), *pictures))


def _joined(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The plan of a folder with this one's settings; refuse a folder that holds another plan.

    Settings are apart, each in its own folder: others than these stay as they are.
    """

    def slug(setting: dict[str, Any]) -> str:
        return Setting(setting["method"], setting["scale"], setting["steps"]).slug

    wanted = json.loads(json.dumps(identity))
    if not path.is_file():
        return wanted
    try:
        found = json.loads(path.read_text())
        settings = {slug(setting): setting for setting in found["settings"]}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove the folder or name another"
        ) from error
    for setting in wanted["settings"]:
        settings.setdefault(slug(setting), setting)
    found["settings"] = [settings[slug(setting)] for setting in wanted["settings"]]
    for name in (*wanted, "parallel"):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{path.parent} holds another plan: its {name} is {_short(found.get(name))}, "
                f"here it is {_short(wanted.get(name))}; name another folder, or remove this one"
            )
    return wanted | {"settings": list(settings.values())}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
