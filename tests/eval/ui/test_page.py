"""The page's server, without a browser: what it answers, how it begins and ends."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from pilotage.eval.cli import main
from pilotage.eval.ui import serve

from ...structure import ROOT


@pytest.fixture(scope="module")
def client(address):
    return connected(address)


def connected(address):
    return Client(address, verbose=False, analytics_enabled=False)


def pictures(client, steps=2, **changes):
    """Arguments of the first tab's button: what its controls hold in the beginning, and changes."""
    api = client.view_api(return_format="dict", print_info=False)
    parameters = api["named_endpoints"]["/pictures"]["parameters"]
    held = {
        one["parameter_name"]: steps if one["label"] == "Steps" else one["parameter_default"]
        for one in parameters
    }
    return {"api_name": "/pictures"} | held | changes


def test_pictures_by_their_defaults(client, studio):
    _, slider, figures, left, right, *_ = client.predict(
        **pictures(client, prompt="noto style fox")
    )
    assert "left: cfg" in figures and "right: apg" in figures
    assert Path(left).read_bytes() != Path(right).read_bytes()


def test_errors_are_told(client):
    with pytest.raises(AppError, match="the prompt is empty"):
        client.predict(**pictures(client, prompt=""))


def test_who_comes_second_waits(client):
    jobs = [client.submit(**pictures(client)) for _ in range(2)]
    assert [len(job.result()) for job in jobs] == [len(jobs[0].result())] * 2


def test_it_keeps_to_itself(address, studio):
    answer = httpx.get(address)
    assert answer.status_code == 200 and address.startswith("http://127.0.0.1:")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert httpx.get(address, headers={"Host": "example.org"}).status_code == 400
    secret = studio.folder / "secret.html"
    secret.write_text("secret")
    for path in ("reports/../secret.html", "reports/%2e%2e/secret.html", "secret.html"):
        assert "secret" not in httpx.get(address + path).text
    config = httpx.get(f"{address}config").json()
    assert config["analytics_enabled"] is False


def test_uploads_go_to_the_folder_of_the_studio(address, studio):
    answer = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"content")})
    (path,) = answer.json()
    assert Path(path).read_bytes() == b"content"
    assert Path(path).is_relative_to(studio.folder.resolve())


def test_folders_are_named_only_where_this_machine_alone_has_the_page(studio):
    from pilotage.eval.ui.page import build

    def shown(local):
        blocks = build(studio, local).config["components"]
        labels = {one["props"].get("label"): one["props"].get("visible") for one in blocks}
        return labels["or a folder on this machine"]

    assert shown(True) is True and shown(False) is False


def run(monkeypatch, *arguments):
    """Exit status of ``pilotage ui ARGUMENTS``."""
    monkeypatch.setattr("sys.argv", ["pilotage", "ui", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


def test_without_gradio_it_names_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(monkeypatch) == 1
    error = capsys.readouterr().err
    assert 'pip install "pilotage[ui]"' in error and error.count("\n") == 1


@pytest.mark.parametrize(("host", "warns"), [("0.0.0.0", True), ("localhost", False)])
def test_an_open_address_warns(monkeypatch, capsys, host, warns):
    asked = []
    monkeypatch.setattr(serve, "serve", lambda *arguments: asked.append(arguments[:3]))
    assert run(monkeypatch, "--host", host, "--port", "0", "--no-open") == 0
    assert asked == [(host, 0, False)]
    assert ("everyone who can reach this machine" in capsys.readouterr().err) is warns


def test_a_port_that_is_taken_is_one_line(monkeypatch, capsys, address, tmp_path):
    port = address.rstrip("/").rpartition(":")[2]
    assert run(monkeypatch, "--no-open", "--port", port) == 1
    assert port in capsys.readouterr().err


def test_it_ends_cleanly(tmp_path):
    """Ctrl-C: status 0, no traceback, and nothing left of what it was given."""
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-u", "-m", "pilotage.eval", "ui", "--port", "0", "--no-open"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as program:
        try:
            address = program.stdout.readline().split()[0]
            answer = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.png", b"mine")})
            (path,) = answer.json()
            assert Path(path).is_relative_to(tmp_path)
            client = connected(address)
            job = client.submit(**pictures(client, steps=100))
            while not (job.outputs() or job.done()):  # until it has begun
                time.sleep(0.01)
            program.send_signal(signal.SIGINT)
            out, error = program.communicate()
        finally:
            program.kill()
    assert program.returncode == 0, error
    assert "ended" in out and "Traceback" not in error
    left = [*tmp_path.glob("pilotage-ui-*"), *tmp_path.glob("gradio*")]
    assert left == [] and not Path(path).exists()


def test_the_command_line_begins_without_it():
    program = "import sys, pilotage.eval.cli; assert not {'torch', 'gradio'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
