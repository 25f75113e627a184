"""A real HTTP server on loopback that speaks vLLM's endpoints, samples from a real model, and fails when it is told to.

Request and response shapes follow vLLM 0.33 (chat completions with token ids and weight versions, LoRA loading,
collective_rpc, encoder cache, weight version). What vLLM would refuse is refused with its status.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

from avar_lightning.processing import load_processor

SAMPLING = {"model", "messages", "n", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed"}
SAMPLING |= {"repetition_penalty", "stop_token_ids", "logit_bias", "logprobs", "return_token_ids", "cache_salt"}
SAMPLING |= {"return_weight_versions"}


class VLLMServer:
    """`vllm serve FOLDER` on a free port.

    Attributes:
        faults: What happens to the next requests, first to last: a status, or one of "drop", "half", "bad json",
            "empty choices", "no token ids", "short logprobs", "slow", "restart", "crash" (the same while it answers);
            with a path they wait for it.
        requests: (path, body) of each request, answered or not.
    """

    def __init__(self, folder: str, *, api_key: str | None = None, lora: bool = False) -> None:
        self.folder, self.api_key, self.lora = folder, api_key, lora
        self.faults: deque[tuple[str, Any]] = deque()
        self.requests: list[tuple[str, Any]] = []
        self.stale = False
        self.lock = threading.RLock()  # a restart ends no request halfway: an answer is of one life of the server
        self.processor = load_processor(folder)
        self.base = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.encoder_cache: set[str] = set()
        self.start_again()
        server = self
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_state": server}))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def start_again(self) -> None:
        """Lose everything that was loaded since the start."""
        with self.lock:
            self.model = copy.deepcopy(self.base)  # loading is not safe beside another thread that loads
            self.stale = False
            self.version: str | None = None
            self.encoder_cache.clear()
            self.adapters: set[str] = set()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    def fault(self, path: str) -> Any:
        with self.lock:
            if self.faults and path.startswith(self.faults[0][0]):
                return self.faults.popleft()[1]
        return None

    # Endpoints

    def models(self) -> tuple[int, Any]:
        names = ["served", *sorted(self.adapters)]
        return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}

    def load_lora_adapter(self, body: Any) -> tuple[int, Any]:
        if not self.lora:
            return 404, {"detail": "Not Found"}
        if body["lora_name"] in self.adapters and not body.get("load_inplace"):
            return 400, {"error": {"message": "The lora adapter has already been loaded."}}
        self.model = PeftModel.from_pretrained(copy.deepcopy(self.base), body["lora_path"]).eval()
        self.adapters.add(body["lora_name"])
        return 200, "Success: LoRA adapter added."

    def collective_rpc(self, body: Any) -> tuple[int, Any]:
        if body.get("method") != "reload_weights":
            return 500, {"error": {"message": f"no method {body.get('method')}"}}
        self.model = AutoModelForImageTextToText.from_pretrained(body["kwargs"]["weights_path"]).eval()
        self.stale = bool(self.encoder_cache)  # until the scheduler's side is emptied too
        return 200, {"results": [None]}

    def reset_encoder_cache(self, body: Any) -> tuple[int, Any]:
        self.encoder_cache.clear()
        self.stale = False
        return 200, ""

    def update_weight_version(self, body: Any) -> tuple[int, Any]:
        self.version = body["new_version"]
        return 200, {"success": True, "new_version": self.version}

    def weight_info(self) -> tuple[int, Any]:
        return 200, {"weight_version": self.version}

    def chat_completions(self, body: Any) -> tuple[int, Any]:
        if unknown := set(body) - SAMPLING:
            return 400, {"error": {"message": f"unknown fields {sorted(unknown)}"}}
        if body["model"] not in {"served", *self.adapters}:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if self.stale and self.encoder_cache:
            return 500, {"error": {"message": "Encoder cache miss"}}
        version = self.version
        self.encoder_cache.add(json.dumps(body["messages"]))
        inputs = self._inputs(body["messages"])
        rows = {name: torch.cat([value] * body["n"]) for name, value in inputs.items()}
        ends = sorted({*body["stop_token_ids"], self.processor.tokenizer.eos_token_id})
        forbidden = [int(token) for token, bias in body["logit_bias"].items() if bias <= -100]
        with torch.random.fork_rng():
            torch.manual_seed(body["seed"])
            out = self.model.generate(
                **rows,
                max_new_tokens=body["max_completion_tokens"],
                do_sample=True,
                temperature=body["temperature"],
                top_p=body["top_p"],
                top_k=0,
                suppress_tokens=forbidden or None,
                pad_token_id=self.processor.tokenizer.pad_token_id,
                eos_token_id=ends,
                return_dict_in_generate=True,
                output_logits=True,
            )
        choices = []
        logps = torch.stack(out.logits, 1).float().div(body["temperature"]).log_softmax(2)
        for index, ids in enumerate(out.sequences[:, inputs["input_ids"].shape[1] :].tolist()):
            length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
            content = [{"token": "", "logprob": float(logps[index, i, ids[i]])} for i in range(length)]
            reason = "stop" if ids[length - 1] in ends else "length"
            message = {"role": "assistant", "content": self.processor.tokenizer.decode(ids[:length])}
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": {"content": content},
                    "finish_reason": reason,
                    "token_ids": ids[:length],
                    "weight_versions": [{"start": 0, "end": length, "version": version}],
                }
            )
        prompt = inputs["input_ids"][0].tolist()
        return 200, {"object": "chat.completion", "choices": choices, "prompt_token_ids": prompt}

    def _inputs(self, messages: Any) -> dict[str, torch.Tensor]:
        images = []
        for message in messages:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image_url":
                    data = part.pop("image_url")["url"].removeprefix("data:image/png;base64,")
                    images.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
                    part["type"] = "image"
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return dict(self.processor(text=[text], images=[images] if images else None, return_tensors="pt"))


class _Handler(BaseHTTPRequestHandler):
    server_state: VLLMServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve(None)

    def do_POST(self) -> None:
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}"))

    def _serve(self, body: Any) -> None:
        state = self.server_state
        state.requests.append((self.path, body))
        fault = state.fault(self.path)
        if fault in ("drop", "crash"):
            if fault == "crash":
                state.start_again()
            self.close_connection = True
            return
        if fault == "slow":
            time.sleep(1.5)
        if fault == "restart":
            state.start_again()
        if isinstance(fault, int):
            return self._send(fault, {"error": {"message": "told to fail"}})
        if state.api_key and self.headers.get("Authorization") != f"Bearer {state.api_key}":
            return self._send(401, {"error": "Unauthorized"})
        answer = {
            "/v1/models": state.models,
            "/weight_info": state.weight_info,
            "/v1/load_lora_adapter": lambda: state.load_lora_adapter(body),
            "/collective_rpc": lambda: state.collective_rpc(body),
            "/reset_encoder_cache": lambda: state.reset_encoder_cache(body),
            "/update_weight_version": lambda: state.update_weight_version(body),
            "/v1/chat/completions": lambda: state.chat_completions(body),
        }.get(self.path)
        with state.lock:
            status, value = answer() if answer else (404, {"detail": "Not Found"})
        if status == 200 and isinstance(value, dict) and "choices" in value:
            if fault == "empty choices":
                value["choices"] = []
            if fault == "no token ids":
                value["choices"][0].pop("token_ids")
            if fault == "short logprobs":
                value["choices"][0]["logprobs"]["content"].pop()
            if fault == "other prompt":
                value["prompt_token_ids"] = value["prompt_token_ids"][:-1]
        self._send(status, value, fault)

    def _send(self, status: int, value: Any, fault: Any = None) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        data = (text[: len(text) // 2] if fault == "bad json" else text).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(value, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client gave up waiting
            self.wfile.write(data[: len(data) // 2] if fault == "half" else data)
        if fault == "half":
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass
