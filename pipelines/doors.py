"""Who reads a guided pipeline: diffusers' own ``from_pipe`` would make a deaf pipeline of it."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

import diffusers
from diffusers.pipelines.pipeline_loading_utils import _get_custom_pipeline_class


def check_reader(pipe: Any) -> None:
    """Raise ValueError if the components of a guided pipeline are read to make a stock one.

    ``from_pipe`` of a stock class, and of ``AutoPipeline``, gives a stock pipeline whose call may
    take any keyword, and so would ignore ``guidance=``. Neither asks the pipeline it is given, and
    both read its components: called by the property of that name, this looks who does.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name == "components":  # also of a subclass
        frame = frame.f_back
    if frame is None or frame.f_code.co_name != "from_pipe":
        return
    reader, given = frame.f_locals.get("cls"), frame.f_locals.get("pipeline")
    if given is not pipe or not isinstance(reader, type) or hasattr(reader, "stock_class"):
        return
    name = reader.__name__
    ours = f"pilotage.pipelines.{name}" if hasattr(diffusers, name) else f"guided_class({name})"
    raise ValueError(
        f"{name}.from_pipe makes a stock pipeline, which would ignore guidance=, of one that is "
        f"guided:\nuse {ours}.from_pipe(pipe), or its components for a stock one: "
        f"{name if issubclass(reader, diffusers.DiffusionPipeline) else 'Class'}(**pipe.components)"
    )


def custom_class(options: dict[str, Any]) -> Any:
    """The class that ``custom_pipeline`` of ``from_pipe`` names; its options are taken out."""
    name = options.pop("custom_pipeline")
    given = {
        "revision": options.pop("custom_revision", None),
        "trust_remote_code": options.pop("trust_remote_code", False),
    }
    known = inspect.signature(_get_custom_pipeline_class).parameters
    return _get_custom_pipeline_class(name, **{k: v for k, v in given.items() if k in known})
