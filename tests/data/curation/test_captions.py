"""Captions from an OpenAI-compatible endpoint, asked of a fake server that counts what it sees."""

import base64
import http.server
import json
import threading
import time

import cv2
import numpy as np
import pytest

from walt_jax import media
from walt_jax.data.curation.captions import Captioner
from walt_jax.data.curation.config import (
    CaptionConfig,
    CutConfig,
    EndpointConfig,
    PrepareConfig,
    endpoint_settings,
)
from walt_jax.data.curation.cutting import cut_clips
from walt_jax.data.preparation import prepare_dataset
from walt_jax.data.records import open_dataset
from walt_jax.errors import UserError


class Server:
    """Answers with the grey level of the first frame; `fail` statuses come first."""

    def __init__(self):
        self.fail, self.delay, self.seen, self.keys = [], 0.0, [], []
        self.now = self.most = 0
        self.refuse = None  # a grey level that it will not describe
        lock, outer = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                    outer.seen.append(body)
                    outer.keys.append(self.headers.get("Authorization"))
                    status = outer.fail.pop(0) if outer.fail else 200
                time.sleep(outer.delay)
                level = _level(body)
                if level == outer.refuse:
                    status = 400
                answer = {"choices": [{"message": {"content": f" grey\n {level} "}}]}
                if status != 200:
                    answer = {"error": {"message": f"status {status}"}}
                data = json.dumps(answer).encode()
                with lock:
                    outer.now -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if status == 429:
                    self.send_header("Retry-After", "0")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def _level(body):
    (message,) = body["messages"]
    image = message["content"][1]["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
    frame = cv2.imdecode(np.frombuffer(base64.b64decode(image), np.uint8), cv2.IMREAD_COLOR)
    return round(float(frame.mean()) / 10) * 10


@pytest.fixture
def server(monkeypatch, tmp_path):
    made = Server()
    monkeypatch.setenv("OPENAI_BASE_URL", made.url + "/")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("WALT_CACHE", str(tmp_path / "cache"))
    yield made
    made.close()


def clip(level):
    frames = [(i / 10, np.full((32, 32, 3), level, np.uint8)) for i in range(6)]
    (made,) = cut_clips(frames, 0.0, CutConfig())
    return made


def captioner(**options):
    config = EndpointConfig("some-model", **options)
    return Captioner(config, *endpoint_settings(config))


def test_what_is_asked(server):
    caption = captioner(frames=3, max_tokens=77, prompt="What is it?")(clip(120))
    assert caption.text == "grey 120" and not caption.refusal
    (body,) = server.seen
    assert body["model"] == "some-model" and body["max_tokens"] == 77
    text, *images = body["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is it?"} and len(images) == 3
    assert server.keys == ["Bearer secret"]


def test_busy_and_failing_servers_are_asked_again(server):
    server.fail = [429, 503]
    assert captioner()(clip(50)).text == "grey 50"
    assert len(server.seen) == 3
    server.fail = [503] * 9
    with pytest.raises(UserError, match=r"answers 503 .*run again to go on"):
        captioner(retries=1)(clip(60))
    assert len(server.seen) == 5
    server.fail = [401]
    with pytest.raises(UserError, match=r"answers 401 .*OPENAI_API_KEY"):
        captioner()(clip(70))
    assert len(server.seen) == 6  # a wrong key is not tried twice


def test_unreachable(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="does not answer"):
        captioner(retries=0)(clip(10))
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(UserError, match=r"\$OPENAI_BASE_URL is not set"):
        captioner()


def test_an_answer_is_kept(server):
    assert captioner()(clip(90)) == captioner()(clip(90))
    assert len(server.seen) == 1
    captioner()(clip(100))
    captioner(prompt="Something else?")(clip(90))
    assert len(server.seen) == 3


def test_a_damaged_answer_on_disk_is_asked_for_again(server, tmp_path):
    captioner()(clip(90))
    (path,) = (tmp_path / "cache" / "captions").rglob("*.json")
    path.write_text('{"text": "gr')
    assert captioner()(clip(90)).text == "grey 90"
    assert len(server.seen) == 2


def write_videos(folder, levels):
    for level in levels:
        folder.mkdir(exist_ok=True)
        frames = np.full((6, 32, 32, 3), level, np.uint8)
        media.write_mp4(folder / f"{level:03d}.mp4", frames, 10)
    return folder


def prepare(folder, output, **options):
    captions = CaptionConfig(".txt", EndpointConfig("some-model", **options))
    config = PrepareConfig(captions=captions)
    report = prepare_dataset(folder, output, config=config, runner="threads", workers=2, shards=2)
    dataset = open_dataset(output)
    return report, [dataset.read(i)["caption"] for i in range(len(dataset))]


def test_captions_of_a_preparation(server, tmp_path):
    folder = write_videos(tmp_path / "in", range(20, 200, 20))
    (folder / "040.txt").write_text("from the side-car\n")
    server.delay, server.refuse = 0.05, 100
    report, captions = prepare(folder, tmp_path / "out", concurrency=3)
    levels = [20, 60, 80, 100, 120, 140, 160, 180]
    expected = {level: f"grey {level}" for level in levels} | {40: "from the side-car", 100: ""}
    assert captions == [expected[level] for level in sorted(expected)]
    # Of both threads together no more than three at a time, and not one after the other.
    assert server.most == 3 and len(server.seen) == len(levels)
    (refused,) = report.refused
    assert refused["source"] == "100.mp4" and refused["reason"].startswith("400")


def test_an_endpoint_that_dies_costs_nothing(server, tmp_path):
    folder = write_videos(tmp_path / "in", range(20, 200, 20))
    server.fail = [200] * 4 + [401] * 99
    with pytest.raises(UserError, match="run again to go on"):
        prepare(folder, tmp_path / "out", concurrency=1)
    assert not (tmp_path / "out").exists()
    server.fail, server.seen = [], []
    _, captions = prepare(folder, tmp_path / "out", concurrency=1)
    assert captions == [f"grey {level}" for level in range(20, 200, 20)]
    assert len(server.seen) == 9 - 4
