"""Hub names: one question, seconds, then what to do."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from pilotage.eval import hub
from pilotage.eval.embedded import load_pipeline
from pilotage.eval.metrics.alignment import load_scorer
from pilotage.eval.metrics.extractors import load_extractor


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """An empty cache, and a hub that takes connections and never answers."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub, "WAIT", 0.1)
        hub.located.cache_clear()
        yield tmp_path / "cache"
    hub.located.cache_clear()


@pytest.fixture
def answers(monkeypatch, cache):
    """Sets what the hub answers: status, headers, content; keeps the paths it was asked for."""
    asked, answer = [], {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(answer["status"])
            for name, value in answer.get("headers", {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(json.dumps(answer.get("content", {})).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(hub, "WAIT", 60)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield answer, asked
    server.shutdown()
    thread.join()
    server.server_close()


LOADERS = {
    "pipeline": load_pipeline,
    "alignment": load_scorer,
    "clip": lambda name: load_extractor(f"clip:{name}"),
    "dinov2": lambda name: load_extractor(f"dinov2:{name}"),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_hub_that_does_not_answer(cache, load):
    """It would be asked for minutes if nothing stopped it."""
    with pytest.raises(FileNotFoundError, match="does not answer.*no copy in.*hf download some/na"):
        load("some/name")


@pytest.mark.parametrize("name", ["three/parts/name", "../folder", "a b"])
def test_no_name(cache, name):
    with pytest.raises(FileNotFoundError, match="no folder.*nor is that a name on the hub"):
        hub.located(name)


def test_the_copy_in_the_cache(cache):
    model = cache / "models--some--name"
    (model / "snapshots" / "abc").mkdir(parents=True)
    (model / "snapshots" / "abc" / "config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc")
    assert hub.located("some/name") == str(model / "snapshots" / "abc")


def test_a_folder_asks_nobody(answers, tmp_path):
    assert hub.located(str(tmp_path)) == str(tmp_path) and answers[1] == []


def test_a_hub_that_answers_is_asked_once(answers):
    answer, asked = answers
    answer |= {"status": 200, "content": {"id": "some/name"}}
    assert [hub.located("some/name") for _ in range(3)] == ["some/name"] * 3
    assert asked == ["/api/models/some/name"]


def test_a_model_that_the_hub_does_not_have(answers):
    answer, _ = answers
    answer |= {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}
    with pytest.raises(FileNotFoundError, match="no folder here and no model on the hub"):
        hub.located("some/name")


@pytest.mark.parametrize("status", [403, 503])
def test_what_the_hub_refuses_loading_tells(answers, status):
    answer, _ = answers
    answer |= {"status": status, "headers": {"X-Error-Code": "GatedRepo"} if status == 403 else {}}
    assert hub.located("some/name") == "some/name"
