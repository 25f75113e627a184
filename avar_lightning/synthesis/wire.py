"""What goes over the wire: the body of a request, and what is read from the body of an answer."""

from __future__ import annotations

import base64
import json
from typing import Any, Literal

from avar_lightning.data.writer import encode_image
from avar_lightning.synthesis.stages import Answer, Call


class Trouble(Exception):
    """No answer, or no whole one: worth another try.

    Attributes:
        tokens: That it cost; None where nobody knows.
        wait: Seconds that the server asks for.
        unusable: Whether an answer came that holds nothing.
    """

    def __init__(self, why: str, tokens: int | None = 0, *, wait: float = 0.0, unusable: bool = False) -> None:
        super().__init__(why)
        self.tokens, self.wait, self.unusable = tokens, wait, unusable


def body_of(call: Call, key: str, *, seed: int | None, image_format: Literal["png", "jpg"]) -> dict[str, Any]:
    """What the client sends for a call."""
    config = call.stage.config
    content: Any = call.prompt
    if call.stage.sends_image and call.item.sample is not None:
        images = [_image_part(image, image_format) for image in call.item.sample.images]
        content = [*images, {"type": "text", "text": call.prompt}]
    body: dict[str, Any] = {"model": config.model, "messages": [{"role": "user", "content": content}]}
    body |= {config.max_tokens_field: config.max_tokens}
    # Mixed with the question: one seed for all would draw the same opening again and again.
    drawn = None if seed is None else int(key[:8], 16) % 2**31
    options = {"temperature": config.temperature, "top_p": config.top_p, "seed": drawn, "extra_body": config.extra}
    return body | {name: value for name, value in options.items() if value is not None and value != {}}


def prompt_estimate(call: Call) -> int:
    """A generous number of tokens of a prompt: half its bytes, and patches of 16 pixels of its images."""
    images = call.item.sample.images if call.stage.sends_image and call.item.sample is not None else []
    return 64 + _tokens(call.prompt) + sum(64 + image.width * image.height // 256 for image in images)


def read_answer(text: str, call: Call) -> Answer:
    """The answer in the body of a response.

    Raises:
        Trouble: It is no JSON, or holds no text.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Trouble(f"an answer that is no JSON ({error})", None) from error
    choices, usage = _object(value).get("choices"), _usage(_object(value).get("usage"))
    choice = _object(choices[0] if isinstance(choices, list) and choices else None)
    message = _object(choice.get("message"))
    content = _text(message.get("content"))
    reasoning = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    reason = str(choice.get("finish_reason") or "stop")
    if not content.strip() and reason not in ("length", "content_filter"):
        what = "content" if choice else "choices"
        raise Trouble(f"an answer with no {what}", sum(usage) if usage else None, unusable=True)
    read, written = usage or (prompt_estimate(call), _tokens(content + reasoning))
    return Answer(content, reasoning, reason, read, written, estimated=usage is None)


def _usage(value: Any) -> tuple[int, int] | None:
    """Tokens of prompt and answer, where the server says both."""
    counts = [_object(value).get(name) for name in ("prompt_tokens", "completion_tokens")]
    known = [count for count in counts if isinstance(count, int) and count >= 0]
    return (known[0], known[1]) if len(known) == 2 else None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    """Text of a message's field, which some servers give in parts; halves of characters cannot be written or sent."""
    parts = value if isinstance(value, list) else [{"text": value}]
    texts = [_object(part).get("text") for part in parts]
    joined = "".join(text for text in texts if isinstance(text, str))
    return joined.encode("utf-8", "replace").decode()


def _tokens(text: str) -> int:
    return len(text.encode("utf-8", "replace")) // 2 + 1


def _image_part(image: Any, image_format: str) -> dict[str, Any]:
    kind = "jpeg" if image_format == "jpg" else "png"
    data = base64.b64encode(encode_image(image, image_format)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}
