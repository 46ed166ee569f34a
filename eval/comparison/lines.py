"""What to copy from a report: a command and a line of Python that use a setting."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from ...pipelines.guided import scale_option
from .plan import Plan, Setting


def lines_to_copy(
    pipe: Any, setting: Setting | None, plan: Plan, loading: Sequence[str] | None
) -> dict[str, str | None]:
    """A command and a line of Python with which to use a setting.

    Args:
        pipe: The pipeline.
        setting: How to guide; None gives no lines.
        plan: What was compared.
        loading: Options with which ``pilotage generate`` loads the pipeline; None gives no command.

    Returns:
        ``command``, also None for guidance that is no name, and ``python``, for a variable
        ``prompt``.
    """
    if setting is None:
        return {"command": None, "python": None}
    named = isinstance(setting.guidance, str) and loading is not None
    return {
        "command": _command(setting, plan, loading or ()) if named else None,
        "python": _python(pipe, setting, plan),
    }


def _command(setting: Setting, plan: Plan, loading: Sequence[str]) -> str:
    words = ["pilotage", "generate", "-g", str(setting.guidance), "-w", f"{setting.scale:g}"]
    words += ["--steps", str(setting.steps)]
    if negative := plan.options.get("negative_prompt"):
        words += ["--negative", negative]
    prompt = plan.prompts[0]
    return shlex.join([*words, *loading, *(["--"] if prompt.startswith("-") else []), prompt])


def _python(pipe: Any, setting: Setting, plan: Plan) -> str:
    guidance = setting.guidance
    # Objects write themselves as one would make them.
    named = isinstance(guidance, str)
    given = {"guidance": json.dumps(guidance, ensure_ascii=False) if named else str(guidance)}
    given |= {name: f"{value:g}" for name, value in scale_option(pipe, setting.scale).items()}
    given["num_inference_steps"] = str(setting.steps)
    given |= {name: repr(value) for name, value in plan.options.items() if value is not None}
    return f"pipe(prompt, {', '.join(f'{name}={value}' for name, value in given.items())})"
