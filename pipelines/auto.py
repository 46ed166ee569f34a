"""``AutoPipelineFor...`` of diffusers, giving pipelines that take ``guidance=``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .guided import guided_class

if TYPE_CHECKING:  # what the mixin is mixed into: one of diffusers' classes of such a name
    # Which is imported by who asks for it: it imports every pipeline there is.
    from diffusers.pipelines.auto_pipeline import AutoPipelineForText2Image

    _Stock = AutoPipelineForText2Image
else:
    _Stock = object


class GuidedAuto(_Stock):
    """Chooses a pipeline class as diffusers does, and gives the guided one.

    As with every class of ``pilotage.pipelines``, a pipeline that cannot be guided is one that
    refuses ``guidance=``.

    Attributes:
        stock_class: The class of diffusers that it is mixed into.
    """

    stock_class: ClassVar[Any]

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: Any, **kwargs: Any) -> Any:
        """See the stock class."""
        return _guided(super().from_pretrained(pretrained_model_or_path, **kwargs))

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """See the stock class; from a stock pipeline or a guided one, which stays as it is."""
        return _guided(super().from_pipe(pipeline, **kwargs))


def _guided(pipe: Any) -> Any:
    stock: Any = type(pipe)
    pipe.__class__ = guided_class(stock)
    return pipe


@functools.cache
def guided_auto(stock: Any) -> Any:
    """The guided counterpart of an ``AutoPipelineFor...`` class, of the same name."""
    members = {
        "__doc__": stock.__doc__,
        "__module__": "pilotage.pipelines",
        "__qualname__": stock.__name__,
        "stock_class": stock,
    }
    return type(stock.__name__, (GuidedAuto, stock), members)
