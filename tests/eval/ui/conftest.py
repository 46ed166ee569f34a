"""One studio on the embedded model for all tests of the page."""

import pytest
from PIL import Image

from pilotage.eval.embedded import load_embedded
from pilotage.eval.ui.address import free_port
from pilotage.eval.ui.serve import keep_private
from pilotage.eval.ui.studio import Studio


@pytest.fixture(scope="session")
def studio(tmp_path_factory):
    return Studio(load_embedded(), tmp_path_factory.mktemp("studio"))


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    """Files of three pictures of one thing."""
    folder = tmp_path_factory.mktemp("squares")
    for i, colour in enumerate(("red", "orange", "crimson")):
        image = Image.new("RGB", (24, 24), "white")
        image.paste(colour, (6 + i, 4, 18, 20))
        image.save(folder / f"{i} square.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def address(studio):
    """Of the page, served."""
    keep_private(studio.folder)
    from pilotage.eval.ui.server import launch  # imports gradio

    page, address = launch(studio, "127.0.0.1", free_port("127.0.0.1", 0))
    yield address
    page.close(verbose=False)
