"""A teacher for the demo world: answers all three stages from the scenes themselves, in the form of a server.

It recognises pictures and questions among the demo's own samples, drawn anew from their seed, so that the whole
pipeline runs offline, and ends with the responses of the demo's style `anchored`.
"""

from __future__ import annotations

import base64
import io
import random
import re
from functools import cached_property
from typing import Any

from PIL import Image

from avar_lightning.data.demo import TASKS, Problem, respond, sample_problem
from avar_lightning.synthesis.config import STAGES, DemoConfig
from avar_lightning.synthesis.inputs import fingerprint

_QUESTION = re.compile(r"[^\n]*\? Note: it may be [^\n]+\.")
_SCENE = re.compile(r"A (?:empty|\w+ \w+), B [^\n.]*, I (?:empty|\w+ \w+)\.|bars: [^\n.]*\.|a triangle whose dotted "
                    r"corner is [^\n.]*degrees\.")  # fmt: skip


class DemoTeacher:
    """Answers bodies of `/v1/chat/completions`; its models are `describe`, `reason` and `anchor`.

    Args:
        demo: The world that it knows.
    """

    def __init__(self, demo: DemoConfig) -> None:
        self.demo = demo

    @cached_property
    def _world(self) -> tuple[dict[str, str], dict[tuple[str, str], tuple[Problem, str]]]:
        """Descriptions by picture, and problems with their notes by description and question."""
        demo, pictures, problems = self.demo, {}, {}
        for index in range(demo.num_samples):
            rng = random.Random(f"{demo.seed}/{demo.split}/{index}")  # as `demo_samples` draws
            problem = sample_problem(TASKS[index % len(TASKS)], rng)
            note = problem.answer if rng.random() < demo.hint_rate else rng.choice(problem.wrong)
            described = problem.scene.describe()
            pictures[fingerprint(problem.scene.draw(rng))] = described
            problems[described, f"{problem.question} Note: it may be {note}."] = problem, note
        return pictures, problems

    def __call__(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer."""
        model, content = body["model"], body["messages"][-1]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        prompt = "".join(part["text"] for part in parts if part["type"] == "text")
        if model not in STAGES:
            return 404, _error(f"the demo teacher has the models {', '.join(STAGES)}, and not {model!r}")
        try:
            text = self._describe(parts) if model == "describe" else self._solve(model, prompt)
        except (KeyError, OSError):
            return 400, _error(
                f"the demo teacher knows the {self.demo.num_samples} samples of demo.seed={self.demo.seed}, "
                f"demo.split={self.demo.split} by their pixels, and not this one; set demo as they were drawn, and "
                "image_format to png"
            )
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return 200, {"object": "chat.completion", "model": model, "choices": [choice], "usage": usage}

    def _describe(self, parts: list[dict[str, Any]]) -> str:
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        with Image.open(io.BytesIO(base64.b64decode(urls[0].partition(",")[2] if urls else ""))) as image:
            return self._world[0][fingerprint(image.convert("RGB"))]

    def _solve(self, model: str, prompt: str) -> str:
        scene, question = _SCENE.search(prompt), _QUESTION.search(prompt)
        known = (scene[0] if scene else "", question[0].removeprefix("Question: ") if question else "")
        problem, note = self._world[1][known]
        if model == "anchor":
            return respond(problem, note, "anchored")
        agrees = "That fits the note." if note == problem.answer else f"The note says {note}, which does not fit."
        return (
            f"The question is about {problem.topic}. {known[0]} {problem.second_look} {agrees} Let me check that "
            f"once more. {problem.second_look} It holds.\n<answer>{problem.answer}</answer>"
        )


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}
