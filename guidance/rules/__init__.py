"""Rules, one a file: how the predictions of a step combine. What is imported here is registered."""

from . import (  # noqa: F401
    apg,
    cfg,
    cfg_plus_plus,
    cfg_zero_star,
    frequency_decoupled,
    history_guided,
    magnitude_aware,
    momentum,
    rescale,
    sliding_mode,
    tangential_amplifying,
    tcfg,
)
