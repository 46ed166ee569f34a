"""The patch: a pipeline's denoisers are exchanged for the length of one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# (name, network, args, kwargs), in the place of ``network(*args, **kwargs)``: the denoiser `name`.
Evaluator = Callable[[str, Any, tuple, dict[str, Any]], Any]


class GuidedDenoiser:
    """A denoiser behind the seam: calls go to the driver, everything else to the network.

    It passes for the network it stands for (also to ``isinstance``), so that pipelines can read its
    configuration, dtype and device.
    """

    def __init__(self, name: str, network: Any, evaluate: Evaluator) -> None:
        object.__setattr__(self, "_name", name)
        object.__setattr__(self, "_network", network)
        object.__setattr__(self, "_evaluate", evaluate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate behind the seam; straight through once that is gone."""
        if self._evaluate is None:
            return self._network(*args, **kwargs)
        return self._evaluate(self._name, self._network, args, kwargs)

    @property  # type: ignore[misc]  # object's own may be written to, this one only read
    def __class__(self) -> type:
        return type(self._network)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._network, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._network, name)


@contextlib.contextmanager
def attached(pipe: Any, denoisers: Sequence[str], evaluate: Evaluator) -> Iterator[None]:
    """Put `evaluate` in front of some denoisers of `pipe`; always taken away again.

    Only the pipeline's own reference is exchanged, past ``DiffusionPipeline.__setattr__`` (which
    would record it in the configuration): the network, and every other pipeline that shares it,
    never notices. Those of `denoisers` that the pipeline does not have are passed over.
    """
    names = [name for name in denoisers if pipe.__dict__.get(name) is not None]
    networks = {name: pipe.__dict__[name] for name in names}
    patched = {name: GuidedDenoiser(name, networks[name], evaluate) for name in names}
    pipe.__dict__.update(patched)
    try:
        yield
    finally:
        pipe.__dict__.update(networks)
        for denoiser in patched.values():  # offload hooks may keep a reference to it
            object.__setattr__(denoiser, "_evaluate", None)
