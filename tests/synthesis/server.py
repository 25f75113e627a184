"""A real HTTP server on loopback that speaks OpenAI's chat completions by a script, and fails when it is told to.

Questions are of the form "Item 7: how many dots?", pictures are squares whose red value is the item's number, and the
answers follow from these, so that what is asked in any order and any number of tries is answered the same.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import socket
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "hazel", "inlet", "jetty", "knoll", "larch")


class ScriptedServer:
    """Answers the models `describe`, `reason` and `anchor`.

    Attributes:
        faults: What happens to the next requests of a model, first to last: a status, (status, headers, text), or one
            of "slow", "drop", "half", "bad json", "list", "empty choices", "no content", "null choice", "no usage",
            "length", "content_filter", or a function of the body that gives the answer's text.
        requests: Body of each request, answered or not, with `headers`.
        answered: Bodies of those whose answer was written whole.
        texts: By model and item, what is answered instead.
        refusals: By model and item, the status and text with which every such request is refused.
        most: The most requests that were here at one time.
    """

    def __init__(self, *, delay: float = 0.0, key: str | None = None) -> None:
        self.delay, self.key = delay, key
        self.faults: dict[str, deque[Any]] = {name: deque() for name in ("describe", "reason", "anchor")}
        self.requests: list[dict[str, Any]] = []
        self.answered: list[dict[str, Any]] = []
        self.texts: dict[tuple[str, int], Any] = {}
        self.refusals: dict[tuple[str, int], tuple[int, str]] = {}
        self.here = self.most = 0
        self.lock = threading.Lock()
        server = self
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": server}))
        self.http.daemon_threads = True
        self.http.block_on_close = False
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def asked(self, model: str) -> list[dict[str, Any]]:
        return [body for body in self.requests if body["model"] == model]

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a body, when all goes well."""
        model, item = body["model"], item_of(body)
        message = {"role": "assistant", "content": self.texts.get((model, item), script(model, item))}
        if isinstance(message["content"], dict):
            message |= message["content"]
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
        return {"id": "x", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage}


def item_of(body: dict[str, Any]) -> int:
    content = body["messages"][-1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts:
        if part["type"] == "image_url":
            data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
            return Image.open(io.BytesIO(data)).getpixel((0, 0))[0]
    return int(re.findall(r"Item (\d+)", parts[0]["text"])[-1])


def script(model: str, item: int) -> str:
    """What a model answers of an item."""
    words = " ".join(WORDS[(item * 7 + i * (1 + item % 5)) % len(WORDS)] + str(item * i) for i in range(12))
    return {
        "describe": f"A plain square, number {item}.",
        "reason": f"There are {item} dots, by {words}. Let me check: yes.\n<answer>{item}</answer>",
        "anchor": f"<think>I look at the square. It has {words}. Looking back at the dots, I count {item}. Let me "
        f"check in the picture: I see {item} dots, so that is right.</think>\n<answer>{item}</answer>",
    }[model]


def write_questions(folder: Path, count: int, **fields: Any) -> Path:
    """A JSONL file with its pictures."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for item in range(count):
        Image.new("RGB", (8, 8), (item, 0, 0)).save(folder / "pictures" / f"{item}.png")
        row = {"question": f"Item {item}: how many dots?", "image": f"pictures/{item}.png", "answer": item}
        rows.append(row | {"id": f"q{item}"} | fields)
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class _Handler(BaseHTTPRequestHandler):
    state: ScriptedServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        state = self.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with state.lock:
            state.requests.append(
                body
                | {
                    "headers": {k.lower(): v for k, v in self.headers.items()},
                    "path": self.path,
                    "time": time.monotonic(),
                }
            )
            state.here += 1
            state.most = max(state.most, state.here)
            faults = state.faults.get(body["model"])
            fault = faults.popleft() if faults else None
        try:
            time.sleep(state.delay)
            self._answer(body, fault)
        finally:
            with state.lock:
                state.here -= 1

    def _answer(self, body: dict[str, Any], fault: Any) -> None:
        state = self.state
        if isinstance(fault, int):
            fault = (fault, {}, "told to fail")
        if isinstance(fault, tuple):
            status, headers, text = fault
            return self._send(status, {"error": {"message": text}}, headers=headers)
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        if fault == "slow":
            time.sleep(1.5)
        if self.path != "/v1/chat/completions" or body["model"] not in state.faults:
            return self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if state.key and given != state.key:
            return self._send(401, {"error": {"message": f"Incorrect API key provided: {given}."}})
        if refusal := state.refusals.get((body["model"], item_of(body))):
            return self._send(refusal[0], {"error": {"message": refusal[1]}})
        value: Any = state.answer(body)
        choice = value["choices"][0]
        if callable(fault):
            choice["message"]["content"] = fault(body)
        if fault in ("length", "content_filter"):
            choice["finish_reason"] = fault
        if fault == "empty choices":
            value["choices"] = []
        if fault == "null choice":
            value["choices"] = [None]
        if fault == "no content":
            choice["message"].pop("content")
        if fault == "no usage":
            value.pop("usage")
        if fault == "list":
            value = [value]
        self._send(200, value, fault)
        if fault not in ("half", "bad json", "slow"):
            with state.lock:
                state.answered.append(body)
        return None

    def _send(self, status: int, value: Any, fault: Any = None, headers: dict[str, str] | None = None) -> None:
        text = json.dumps(value)
        data = (text[: len(text) // 2] if fault == "bad json" else text).encode()
        with contextlib.suppress(OSError):  # the client gave up waiting, or was killed
            self.send_response(status)
            for name, each in {
                "Content-Type": "application/json",
                "Content-Length": len(data),
                **(headers or {}),
            }.items():
                self.send_header(name, str(each))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if fault == "half" else data)
        if fault == "half":
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass
