"""Models by name: a folder, or the Hugging Face hub, which is asked once and for seconds only.

Without this, libraries ask an unreachable hub again for every file, and a command hangs for
minutes.
"""

from __future__ import annotations

import functools
from pathlib import Path

WAIT = 5.0  # seconds that the hub may take to answer


@functools.cache
def located(model: str) -> str:
    """What to load a model from: a folder, or the name of a model that the hub has.

    Args:
        model: Folder or hub name.

    Returns:
        The name as given; if the hub does not answer, the folder of its copy in the cache.

    Raises:
        FileNotFoundError: no folder, and the hub does not have it, or does not answer and the cache
            has no copy. Says what to do.
    """
    if Path(model).is_dir():
        return model

    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        HfApi().model_info(model, timeout=WAIT)
        return model
    except HFValidationError as error:
        raise FileNotFoundError(f"no folder {model}, nor is that a name on the hub") from error
    except GatedRepoError:  # a kind of the next one; loading says what to do
        return model
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{model!r} is no folder here and no model on the hub; to private ones belongs a login "
            "(hf auth login)"
        ) from error
    except HfHubHTTPError:
        return model  # it answers; what it refuses, loading tells
    except Exception as error:  # of httpx or requests, by the version of huggingface_hub
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        try:
            return snapshot_download(model, local_files_only=True)
        except LocalEntryNotFoundError:
            raise FileNotFoundError(
                f"{model!r} is no folder here, {constants.ENDPOINT} does not answer ({reason}), "
                f"and there is no copy in {constants.HF_HUB_CACHE}: fetch it where there is a "
                f"connection (hf download {model}) and name its folder"
            ) from error
