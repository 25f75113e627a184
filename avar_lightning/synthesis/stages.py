"""The three stages: how each is asked, and what is read from its answer.

`walk` is the one definition of a sample's way through them. It asks for answers and does not care where they come from,
so that the same code asks servers, reads the journal and decides what is kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from avar_lightning.rewards.answers import extract_answer, judge
from avar_lightning.synthesis.config import STAGES, StageConfig, SynthesisConfig
from avar_lightning.synthesis.filters import FilterConfig, first_objection, score
from avar_lightning.synthesis.inputs import Item, options_text

PLACEHOLDERS = {
    "describe": ({"question", "options"}, set()),
    "reason": ({"question", "options", "description"}, {"question", "description"}),
    "anchor": ({"question", "options", "description", "chain", "answer"}, {"chain"}),
}
"""What a stage's prompt may ask for, and what it must."""
_TAG = re.compile(r"</?(?:think|answer)>")


@dataclass(frozen=True)
class Stage:
    """A stage with its prompt."""

    name: str
    config: StageConfig
    template: Template
    prompt_hash: str

    @property
    def sends_image(self) -> bool:
        """Whether its requests carry the images."""
        return self.name == "describe" if self.config.image is None else self.config.image


@dataclass(frozen=True)
class Answer:
    """What a server answered to a call.

    Attributes:
        content: The text.
        reasoning: What the model thought before, where the server keeps that apart.
        finish_reason: `stop`, or why there is no more of it.
        prompt_tokens: Read.
        completion_tokens: Generated.
        estimated: Whether the server did not say how many tokens these were.
        refused: Why there is no answer to this sample.
    """

    content: str = ""
    reasoning: str = ""
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
    refused: str = ""


@dataclass(frozen=True)
class Call:
    """One question to one model."""

    stage: Stage
    prompt: str
    item: Item


@dataclass(frozen=True)
class Outcome:
    """What became of a sample.

    Attributes:
        reason: Name of the filter that rejected it; empty where it is kept.
        detail: What was wrong.
        response: The last text that there was.
        scores: Of the final chain.
        tokens: By stage, of prompt and answer.
    """

    reason: str = ""
    detail: str = ""
    response: str = ""
    scores: Mapping[str, Any] | None = None
    tokens: Mapping[str, Any] | None = None


def load_stages(config: SynthesisConfig) -> dict[str, Stage]:
    """Stages with their prompts, checked.

    Raises:
        ValueError: A prompt cannot be read, or its placeholders are not those of its stage.
    """
    return {name: _load_stage(name, getattr(config.stages, name)) for name in STAGES}


def _load_stage(name: str, config: StageConfig) -> Stage:
    shipped = files("avar_lightning.synthesis") / "prompts" / f"{name}.md"
    where = config.prompt or f"the shipped {name}.md"
    try:
        text = Path(config.prompt).expanduser().read_text("utf-8") if config.prompt else shipped.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"stages.{name}.prompt={where!r} cannot be read ({error}); correct the path.") from error
    template, (allowed, needed) = Template(text.strip()), PLACEHOLDERS[name]
    if not template.is_valid():
        raise ValueError(f"{where} has a $ that begins no placeholder; write $$ for a dollar sign.")
    found = set(template.get_identifiers())
    if found - allowed or needed - found:
        wrong = f"asks for ${min(found - allowed)}" if found - allowed else f"lacks ${min(needed - found)}"
        names = ", ".join(f"${each}" for each in sorted(allowed))
        raise ValueError(f"{where} {wrong}; the prompt of stage {name} may use {names}" + (
            f" and must use {', '.join(f'${each}' for each in sorted(needed))}." if needed else "."))  # fmt: skip
    return Stage(name, config, template, hashlib.sha256(text.encode()).hexdigest()[:16])


def prompt_of(stage: Stage, item: Item, **texts: str) -> str:
    """A stage's prompt for an item."""
    return stage.template.safe_substitute(question=item.question, options=options_text(item.options), **texts)


class _Rejected(Exception):
    def __init__(self, reason: str, detail: str, response: str = "") -> None:
        self.reason, self.detail, self.response = reason, detail, response


def walk(item: Item, stages: Mapping[str, Stage], filters: FilterConfig) -> Generator[Call, Answer, Outcome]:
    """A sample's way through the stages: yields calls, takes their answers, returns the outcome.

    A chain whose answer is wrong ends it, so that nobody pays for anchoring it.
    """
    tokens: dict[str, Any] = {}

    def read(stage: str, answer: Answer) -> str:
        tokens[stage] = {"prompt": answer.prompt_tokens, "completion": answer.completion_tokens}
        return _usable(stage, answer, stages[stage].config)

    try:
        if item.problem is not None:
            raise _Rejected("input", item.problem)
        answer = yield Call(stages["describe"], prompt_of(stages["describe"], item), item)
        description = after_thinking(read("describe", answer))
        prompt = prompt_of(stages["reason"], item, description=description)
        answer = yield Call(stages["reason"], prompt, item)
        read("reason", answer)
        chain, reached = chain_of(answer)
        _agrees(reached, f"{chain}\n<answer>{reached}</answer>", "reason", item, filters)
        texts = {"description": description, "chain": f"{chain}\n\nFinal answer: {reached}", "answer": reached}
        answer = yield Call(stages["anchor"], prompt_of(stages["anchor"], item, **texts), item)
        chain, reached = woven(read("anchor", answer))
        response = f"<think>{chain}</think><answer>{reached}</answer>"
        _agrees(reached, response, "anchor", item, filters)
        scores = score(chain, filters)
        if objection := first_objection(chain, scores, filters):
            raise _Rejected(*objection, response)
        return Outcome(response=response, scores=asdict(scores), tokens=tokens)
    except _Rejected as rejected:
        return Outcome(rejected.reason, rejected.detail, rejected.response, None, tokens)


def _usable(stage: str, answer: Answer, config: StageConfig) -> str:
    if answer.refused:
        raise _Rejected("refused", f"{stage}: {answer.refused}")
    if answer.finish_reason == "length":
        raise _Rejected(
            "cut", f"{stage}: the answer was cut off at max_tokens={config.max_tokens}; raise it", answer.content
        )
    if answer.finish_reason == "content_filter":
        raise _Rejected("refused", f"{stage}: the server's content filter ended the answer", answer.content)
    return answer.content


def _agrees(reached: str, response: str, stage: str, item: Item, filters: FilterConfig) -> None:
    assert item.sample is not None
    gold = item.sample.answer
    if filters.agreement:
        columns = {"options": item.options, "tolerance": item.sample.columns.get("tolerance"), "answer": gold}
        try:
            verdict = judge([f"<answer>{reached}</answer>"], [columns])[0]
        except ValueError as error:  # a tolerance that is none
            raise _Rejected("input", str(error), response) from error
        if verdict != 1.0:
            raise _Rejected("agreement", f"{stage}: answers {reached!r}, the gold answer is {gold!r}", response)


def after_thinking(content: str) -> str:
    """What a model says when it has thought, where the server leaves both in one text.

    >>> after_thinking("Hm. A cube?</think>A red cube.")
    'A red cube.'
    """
    return content.rpartition("</think>")[2].strip()


def chain_of(answer: Answer) -> tuple[str, str]:
    r"""Chain and final answer of the reasoning stage; thinking is part of the chain, wherever the server puts it.

    >>> chain_of(Answer("So it is red. <answer>red</answer>", reasoning="I count two."))
    ('I count two.\n\nSo it is red.', 'red')
    >>> chain_of(Answer("<think>I count two.</think>So it is red. <answer>red</answer>"))
    ('I count two.\n\nSo it is red.', 'red')
    """
    reached = extract_answer(answer.content)
    if not reached:
        raise _Rejected("format", "reason: there is no <answer>…</answer>", answer.content)
    said = re.sub(r"<answer>(?:(?!<answer>).)*</answer>\s*$", "", answer.content.strip(), flags=re.DOTALL)
    parts = [answer.reasoning, *re.split(r"</?think>", said)]
    chain = "\n\n".join(part.strip() for part in parts if part.strip())
    return _TAG.sub("", chain).strip(), reached


def woven(content: str) -> tuple[str, str]:
    """Chain and answer of the anchoring stage; what the model thought before it is left out.

    >>> woven("<think>Easy.</think><think>I see two dots.</think> <answer>2</answer>")
    ('I see two dots.', '2')
    """
    head, _, reached = content.strip().rstrip("`").rstrip().removesuffix("</answer>").rpartition("<answer>")
    whole = content.strip().rstrip("`").rstrip().endswith("</answer>") and head.rstrip().endswith("</think>")
    before = head.rstrip().removesuffix("</think>")
    # Some templates write the first <think> themselves, so that the answer begins without it.
    chain = before.rpartition("<think>")[2] if "<think>" in before else before
    if not whole or not chain.strip() or not reached.strip() or _TAG.search(chain + reached):
        raise _Rejected("format", "anchor: it does not end with <think>…</think><answer>…</answer>", content)
    return chain.strip(), reached.strip()
