"""The demo world: small pictures with verifiable questions, drawn from a seed, for training and tests offline.

A scene is a 3×3 grid of coloured shapes, a bar chart or a triangle. Each question carries a note that suggests an
answer. The note is right far more often in training than in validation, so a model that trusts text over the picture
does well in training and badly in validation: the gap between language prior and looking can be measured.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image, ImageDraw

from avar_lightning.data.sample import Sample

Task = Literal["locate", "count", "compare", "chart", "angle"]
Style = Literal["direct", "reasoned", "anchored", "mixed"]
Stage = Literal["see", "read"]

TASKS: tuple[Task, ...] = ("locate", "count", "compare", "chart", "angle")
MIXTURES: dict[Stage, dict[str, int]] = {
    "see": {"caption": 13, "part": 3, "question": 3, "text": 1},
    "read": {"part": 3, "list": 3, "text": 3, "list_text": 3, "then": 4, "note": 1, "then_note": 3, "question": 2},
}
STYLES: tuple[Style, ...] = ("direct", "reasoned", "anchored")
COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 200), "yellow": (235, 190, 20)}
SHAPES = ("circle", "square", "triangle")
CELL_NAMES = tuple("ABCDEFGHI")  # in reading order; one token each, so that finding a cell again is one step
ANGLES = (30, 60, 90, 120)
MAX_BAR = 6
IMAGE_SIZE = 84  # pixels; with patches of 14 merged 2×2, one visual token is one cell of the 3×3 grid
WORLD_VERSION = 2  # raised with every change of the samples, so that shards of an older world are not taken for these
SYSTEM_PROMPT = "You are a helpful assistant. Think first, then give the answer."


@dataclass(frozen=True)
class Grid:
    """Nine cells in reading order, each `"colour shape"` or `"empty"`."""

    cells: tuple[str, ...]

    @classmethod
    def sample(cls, rng: random.Random) -> Grid:
        """Draw a grid with about one cell in four empty."""
        return cls(
            tuple(
                "empty" if rng.random() < 0.25 else f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
                for _ in range(9)
            )
        )

    def describe(self) -> str:
        """What a careful reader of the picture would write."""
        return ", ".join(f"{name} {cell}" for name, cell in zip(CELL_NAMES, self.cells)) + "."

    def ask(self, rng: random.Random) -> tuple[str, str]:
        """All cells in a random order: their names, and the description that finds each by its name."""
        return _listing(rng.sample(list(zip(CELL_NAMES, self.cells)), len(self.cells)))

    def draw(self, rng: random.Random) -> Image.Image:
        """Paint the grid; position within a cell and size vary a little."""
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
        canvas = ImageDraw.Draw(image)
        side = IMAGE_SIZE // 3
        for index, cell in enumerate(self.cells):
            if cell == "empty":
                continue
            colour, shape = cell.split()
            radius = rng.uniform(8, 11)
            x = (index % 3 + 0.5) * side + rng.uniform(-2, 2)
            y = (index // 3 + 0.5) * side + rng.uniform(-2, 2)
            box = (x - radius, y - radius, x + radius, y + radius)
            if shape == "circle":
                canvas.ellipse(box, fill=COLOURS[colour])
            elif shape == "square":
                canvas.rectangle(box, fill=COLOURS[colour])
            else:
                canvas.polygon(
                    [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=COLOURS[colour]
                )
        return image


@dataclass(frozen=True)
class Chart:
    """Three bars of different colours, heights 1 to `MAX_BAR` with a unique tallest."""

    bars: tuple[tuple[str, int], ...]

    @classmethod
    def sample(cls, rng: random.Random) -> Chart:
        """Draw three different colours and three different heights."""
        colours = rng.sample(list(COLOURS), 3)
        return cls(tuple(zip(colours, rng.sample(range(1, MAX_BAR + 1), 3))))

    def describe(self) -> str:
        """What a careful reader of the picture would write."""
        return "bars: " + ", ".join(f"{colour} {height}" for colour, height in self.bars) + "."

    def ask(self, rng: random.Random) -> tuple[str, str]:
        """All bars in a random order: their colours, and the description that finds each by its colour."""
        return _listing(rng.sample(self.bars, len(self.bars)))

    def draw(self, rng: random.Random) -> Image.Image:
        """Paint the bars over a light rule at each unit of height."""
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
        canvas = ImageDraw.Draw(image)
        unit, side = 12, IMAGE_SIZE // 3
        floor = IMAGE_SIZE - 6
        for level in range(MAX_BAR + 1):
            canvas.line((0, floor - level * unit, IMAGE_SIZE, floor - level * unit), fill=(215, 215, 215))
        for index, (colour, height) in enumerate(self.bars):
            left = index * side + 6 + rng.uniform(-2, 2)
            canvas.rectangle((left, floor - height * unit, left + 16, floor), fill=COLOURS[colour])
        return image


@dataclass(frozen=True)
class Angle:
    """A triangle with one corner marked by a dot; `degrees` is the angle at that corner."""

    degrees: int

    @classmethod
    def sample(cls, rng: random.Random) -> Angle:
        """Draw one of `ANGLES`."""
        return cls(rng.choice(ANGLES))

    def describe(self) -> str:
        """What a careful reader of the picture would write."""
        than = "as wide as" if self.degrees == 90 else "wider than" if self.degrees > 90 else "narrower than"
        return f"a triangle whose dotted corner is {than} a right corner, near {self.degrees} degrees."

    def ask(self, rng: random.Random) -> tuple[str, str]:
        """The one part there is."""
        return "the dotted corner", f"the dotted corner: {self.degrees} degrees."

    def draw(self, rng: random.Random) -> Image.Image:
        """Paint the triangle, one side near the horizontal, left or right, and the dot at the corner."""
        image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
        canvas = ImageDraw.Draw(image)
        turn, length = rng.uniform(-0.2, 0.2), 38.0
        rays = [turn, turn - math.radians(self.degrees)]
        if rng.random() < 0.5:
            rays = [math.pi - ray for ray in rays]
        points = [(0.0, 0.0)] + [(length * math.cos(a), length * math.sin(a)) for a in rays]
        # Centre the bounding box, so that the triangle never leaves the picture.
        dx, dy = (IMAGE_SIZE / 2 - (min(axis) + max(axis)) / 2 for axis in zip(*points))
        points = [(x + dx, y + dy) for x, y in points]
        canvas.polygon(points, outline=(20, 20, 20), width=2)
        x, y = points[0]
        canvas.ellipse((x - 4, y - 4, x + 4, y + 4), fill=COLOURS["red"])
        return image


def _listing(parts: list[tuple[str, Any]]) -> tuple[str, str]:
    return ", ".join(name for name, _ in parts), ", ".join(f"{name} {what}" for name, what in parts) + "."


@dataclass(frozen=True)
class Problem:
    """A question about a scene with its answer, plausible wrong answers, and the check that a second look makes."""

    task: Task
    scene: Grid | Chart | Angle
    question: str
    topic: str
    answer: str
    wrong: tuple[str, ...]
    second_look: str


def sample_problem(task: Task, rng: random.Random) -> Problem:
    """Draw a scene and a question of kind `task`; the same state of `rng` gives the same problem."""
    if task == "locate":
        return _locate(Grid.sample(rng), rng)
    if task == "count":
        return _count(Grid.sample(rng), rng)
    if task == "compare":
        return _compare(Grid.sample(rng), rng)
    if task == "chart":
        return _chart(Chart.sample(rng), rng)
    if task == "angle":
        return _angle(Angle.sample(rng))
    raise ValueError(f"Unknown task {task!r}, expected one of {TASKS}; check the spelling.")


def _locate(grid: Grid, rng: random.Random) -> Problem:
    name, answer = rng.choice(list(zip(CELL_NAMES, grid.cells)))
    everything = ["empty"] + [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    wrong = tuple(item for item in everything if item != answer)
    return Problem("locate", grid, f"What is in {name}?", name, answer, wrong, f"{name} {answer}.")


def _count(grid: Grid, rng: random.Random) -> Problem:
    word = rng.choice([*COLOURS, *SHAPES])
    number, steps = 0, []
    for name, cell in zip(CELL_NAMES, grid.cells):
        number += word in cell.split()
        steps.append(f"{name} {cell} {number}")
    wrong = tuple(str(n) for n in range(max(0, number - 2), number + 3) if n != number)
    topic = f"{word} things"
    look = f"{word}: {', '.join(steps)}."
    return Problem("count", grid, f"How many {topic} are there?", topic, str(number), wrong, look)


def _compare(grid: Grid, rng: random.Random) -> Problem:
    aspect = rng.choice(("colour", "shape"))
    (first, a), (second, b) = sorted(rng.sample(list(zip(CELL_NAMES, grid.cells)), 2))
    same = a.split()[0 if aspect == "colour" else -1] == b.split()[0 if aspect == "colour" else -1]
    answer = "yes" if same else "no"
    topic = f"the {aspect} of {first} and {second}"
    question = f"Have {first} and {second} the same {aspect}?"
    look = f"{first} {a}, {second} {b}: {answer}."
    return Problem("compare", grid, question, topic, answer, ("no" if same else "yes",), look)


def _chart(chart: Chart, rng: random.Random) -> Problem:
    if rng.random() < 0.5:
        answer, height = max(chart.bars, key=lambda bar: bar[1])
        wrong = tuple(colour for colour, _ in chart.bars if colour != answer)
        look = f"the tallest bar: {answer} {height}."
        return Problem("chart", chart, "Which bar is the tallest?", "the tallest bar", answer, wrong, look)
    (low, small), (high, large) = sorted(rng.sample(chart.bars, 2), key=lambda bar: bar[1])
    number = large - small
    wrong = tuple(str(n) for n in range(1, MAX_BAR) if n != number)
    topic = f"how much taller the {high} bar is than the {low} bar"
    question = f"How much taller is the {high} bar than the {low} bar?"
    look = f"{high} {large}, {low} {small}. {large} minus {small} is {number}."
    return Problem("chart", chart, question, topic, str(number), wrong, look)


def _angle(scene: Angle) -> Problem:
    question = "How many degrees has the dotted corner?"
    wrong = tuple(str(angle) for angle in ANGLES if angle != scene.degrees)
    look = f"the dotted corner: {scene.degrees} degrees."
    return Problem("angle", scene, question, "the dotted corner", str(scene.degrees), wrong, look)


def respond(problem: Problem, note: str, style: Style) -> str:
    """The assistant's answer in one of three styles.

    `direct` answers at once; `reasoned` reasons over the text alone and never mentions looking; `anchored` describes
    the picture, looks again at what the question needs, and weighs the note against it. `mixed`, which is a style of
    samples, is none of a response.
    """
    answer = f"<answer>{problem.answer}</answer>"
    if style == "direct":
        return answer
    if style == "reasoned":
        agrees = "It fits." if note == problem.answer else "It does not fit."
        return (
            f"<think>The question is about {problem.topic}. The note says {note}. A note can be right or wrong. "
            f"{agrees} So it should be {problem.answer}.</think>{answer}"
        )
    if style == "anchored":
        agrees = "and" if note == problem.answer else "but"
        return (
            f"<think>I look at the picture. {problem.scene.describe()} I look again. {problem.second_look} "
            f"I see {problem.answer}, {agrees} the note says {note}.</think>{answer}"
        )
    raise ValueError(f"Unknown style {style!r}, expected one of {STYLES}; check the spelling.")


def _conversation(user: str, response: str, *, picture: bool) -> list[dict[str, Any]]:
    parts: list[dict[str, str]] = [{"type": "image"}] if picture else []
    return [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": [*parts, {"type": "text", "text": user}]},
        {"role": "assistant", "content": response},
    ]


def demo_samples(
    count: int,
    *,
    style: Style,
    hint_rate: float,
    seed: int,
    split: str,
    tasks: Sequence[Task] = TASKS,
    pictures: bool = True,
) -> Iterator[Sample]:
    """Questions with notes; the columns tell `task`, `style`, the `note` and whether it is right (`note_right`).

    Args:
        count: Number of samples; the tasks take turns, so that each has the same share.
        style: How the assistant answers; `mixed` draws one of the styles for each sample, so that a model trained on
            it has a choice to make.
        hint_rate: Probability in [0, 1] that the note is right.
        seed: Same seed and split, same samples, whatever `count` and `style`.
        split: Name that separates streams (`"train"`, `"val"`, `"test"`); part of the ids.
        tasks: Which questions are asked.
        pictures: Whether the scene is shown; if not, its description stands before the question.
    """
    for index in range(count):
        rng = random.Random(f"{seed}/{split}/{index}")
        task = tasks[index % len(tasks)]
        problem = sample_problem(task, rng)
        hint_right = rng.random() < hint_rate
        note = problem.answer if hint_right else rng.choice(problem.wrong)
        user = f"{problem.question} Note: it may be {note}."
        image = problem.scene.draw(rng)
        if not pictures:
            user = f"{problem.scene.describe()} {user}"
        response = respond(problem, note, rng.choice(STYLES) if style == "mixed" else style)
        yield Sample(
            messages=_conversation(user, response, picture=pictures),
            images=[image] if pictures else [],
            answer=problem.answer,
            id=f"{split}-{index:06d}",
            source=f"demo/{split}",
            columns={"task": task, "style": style, "note": note, "note_right": hint_right},
        )


def pretraining_samples(count: int, *, stage: Stage, seed: int) -> Iterator[Sample]:
    """What the demo base is pretrained on, in two stages: first to `see`, then to `read`.

    `see` is mostly captions; `read` is mostly what needs words of the question or of a text to be found again, at once
    or behind a caption: parts of a picture, parts of a description, the note. Both have questions with notes that are
    right 80 % of the time and `direct` answers. Nothing here reasons, so the base can see and read, and trusts the
    note.
    """
    if stage not in MIXTURES:
        raise ValueError(f"Unknown pretraining stage {stage!r}, expected one of {tuple(MIXTURES)}; check the spelling.")
    for index in range(count):
        rng = random.Random(f"{seed}/{stage}/{index}")
        problem = sample_problem(rng.choices(TASKS, weights=(3, 2, 1, 2, 1))[0], rng)
        kinds, weights = zip(*MIXTURES[stage].items())
        kind = rng.choices(kinds, weights)[0]
        note = problem.answer if rng.random() < 0.8 else rng.choice(problem.wrong)
        asked = f"{problem.question} Note: it may be {note}."
        caption = problem.scene.describe()
        names, listing = problem.scene.ask(rng)
        user, response = {
            "caption": ("Describe the picture.", caption),
            "part": (f"Describe {problem.topic}.", problem.second_look),
            "list": (f"Describe {names}.", listing),
            "text": (f"{caption} Describe {problem.topic}.", problem.second_look),
            "list_text": (f"{caption} Describe {names}.", listing),
            "then": (f"Describe the picture, then {problem.topic}.", f"{caption} {problem.second_look}"),
            "note": (f"{asked} Describe the note.", f"The note says {note}."),
            "then_note": (f"{asked} Describe the picture, then the note.", f"{caption} The note says {note}."),
            "question": (asked, respond(problem, note, "direct")),
        }[kind]
        picture = "text" not in kind
        yield Sample(
            messages=_conversation(user, response, picture=picture),
            images=[problem.scene.draw(rng)] if picture else [],
            answer=problem.answer if kind == "question" else response,
            id=f"{stage}-{index:06d}",
            source=f"demo/{stage}/{kind}",
            columns={"task": problem.task},
        )
