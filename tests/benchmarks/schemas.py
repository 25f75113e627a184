"""Small files in each benchmark's own schema, as the Hugging Face Hub serves them.

Columns and types after the dataset cards of AI4Math/MathVista, MathLLMs/MathVision, AI4Math/MathVerse, MMMU/MMMU,
MMMU/MMMU_Pro, Lin-Chen/MMStar and lmms-lab/HallusionBench. Every image has a colour of its own, so that tests can tell
which one stands where.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLOURS = {1: (255, 0, 0), 2: (0, 255, 0), 3: (0, 0, 255), 4: (255, 255, 0)}
Record = dict[str, Any]


def picture(number: int = 1, path: str | None = None) -> Record:
    """A picture in the colour of its number, as datasets stores it."""
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), COLOURS[number]).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": path}


def mathvista(**changes: Any) -> Record:
    metadata = {
        "category": "math-targeted-vqa", "context": "geometry diagram", "grade": "high school", "img_height": 8,
        "img_width": 12, "language": "english", "skills": ["geometry reasoning", "algebraic reasoning"],
        "source": "GeoQA+", "split": "testmini", "task": "geometry problem solving",
    }  # fmt: skip
    record = {
        "pid": "7", "question": "What is the length of AB?", "image": "images/7.jpg", "decoded_image": picture(),
        "choices": None, "unit": None, "precision": None, "answer": "12", "question_type": "free_form",
        "answer_type": "integer", "query": "…", "metadata": metadata | changes.pop("metadata", {}),
    }  # fmt: skip
    return record | changes


def mathvision(**changes: Any) -> Record:
    record = {
        "id": "1", "question": "How large is the angle in <image1>?", "options": [], "image": "images/1.jpg",
        "decoded_image": picture(), "answer": "\\frac{1}{2}", "solution": None, "level": 2,
        "subject": "metric geometry - angle",
    }  # fmt: skip
    return record | changes


def mathverse(**changes: Any) -> Record:
    question = "As shown, angle 1 is 40°. Then angle 2 is ()\nChoices:\nA:40°\nB:50°\nC:60°\nD:140°"
    ask = "According to the question shown in the image, please first conduct reasoning, and then answer the question "
    record = {
        "sample_index": "5", "problem_index": "1", "problem_version": "Vision Only", "question": "",
        "image": picture(path="images_version_6/image_1.png"), "answer": "D", "question_type": "multi-choice",
        "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"},
        "query_wo": "According to the question shown in the image, please directly answer the question.",
        "query_cot": ask + "and provide the correct option letter, e.g., A, B, C, D, at the end.",
        "question_for_eval": question,
    }  # fmt: skip
    return record | changes


def mmmu(**changes: Any) -> Record:
    images = {f"image_{number}": picture(1) if number == 1 else None for number in range(1, 8)}
    record = {
        "id": "validation_Accounting_1", "question": "<image 1> Which one is it?", "options": "['$6', '$7', '$8']",
        "explanation": "", **images, "img_type": "['Tables']", "answer": "B", "topic_difficulty": "Easy",
        "question_type": "multiple-choice", "subfield": "Managerial Accounting",
    }  # fmt: skip
    return record | changes


def mmmu_pro(**changes: Any) -> Record:
    record = mmmu(options=str([f"option {number}" for number in range(10)]), answer="J")
    del record["question_type"], record["subfield"]
    return record | {"id": "test_History_9", "subject": "History"} | changes


def mmmu_pro_vision(**changes: Any) -> Record:
    record = {
        "id": "test_History_9", "image": picture(2), "options": str([f"option {number}" for number in range(10)]),
        "answer": "C", "subject": "History",
    }  # fmt: skip
    return record | changes


def mmstar(**changes: Any) -> Record:
    record = {
        "index": 0, "question": "What is on it?\nOptions: A: a cat, B: a dog on a mat., C: a book, D: nothing",
        "image": picture(), "answer": "B", "category": "coarse perception", "l2_category": "image scene and topic",
        "meta_info": {"source": "MMBench", "split": "val", "image_path": "images/0.jpg"},
    }  # fmt: skip
    return record | changes


def hallusionbench(**changes: Any) -> Record:
    record = {
        "category": "VD", "subcategory": "illusion", "visual_input": "1", "set_id": "0", "figure_id": "0",
        "sample_note": "circle", "question_id": "0", "question": "Is the right circle as large as the left one?",
        "gt_answer_details": "They are equal.", "gt_answer": "1", "filename": "./hallusion_bench/VD/0_0.png",
        "image": picture(),
    }  # fmt: skip
    return record | changes


BUILDERS: dict[str, Callable[..., Record]] = {
    "mathvista": mathvista, "mathvision": mathvision, "mathverse_vo": mathverse, "mmmu": mmmu, "mmmu_pro": mmmu_pro,
    "mmmu_pro_vision": mmmu_pro_vision, "mmstar": mmstar, "hallusionbench": hallusionbench,
}  # fmt: skip
_HASH = "725687bf7a18d64b"
# The files of the Hub, those of other splits included, with what they hold here.
FILES: dict[str, dict[str, list[Record]]] = {
    "mathvista": {
        f"data/testmini-00000-of-00001-{_HASH}.parquet": [
            mathvista(pid="1", unit="cm"),
            mathvista(pid="2", question_type="multi_choice", answer_type="text", choices=["18", "24°"], answer="24°"),
            mathvista(pid="3", answer_type="float", precision=1.0, answer="1.2"),
            mathvista(pid="4", answer_type="list", answer="[0, 2, 4]"),
        ],
        f"data/test-00000-of-00002-{_HASH}.parquet": [mathvista(pid="9", answer="", metadata={"split": "test"})],
    },
    "mathvision": {
        f"data/test-00000-of-00001-{_HASH}.parquet": [
            mathvision(id="1"),
            mathvision(id="2", options=list("ABCDE"), answer="C"),
            mathvision(id="3", options=["1", "$\\frac{1}{2}$", "3", "4", "5"], answer="B"),
        ],
        f"data/testmini-00000-of-00001-{_HASH}.parquet": [mathvision(id="1")],
    },
    "mathverse_vo": {
        "testmini.parquet": [
            mathverse(sample_index="4", problem_version="Vision Dominant", question="Then angle 2 is ()"),
            mathverse(sample_index="5"),
            mathverse(sample_index="10", question_type="free-form", answer="14 cm", question_for_eval="How long?"),
        ],
        "testmini_text_only.parquet": [mathverse(problem_version="Text Only", image=None)],
    },
    "mmmu": {
        "Accounting/validation-00000-of-00001.parquet": [
            mmmu(),
            mmmu(
                id="validation_Accounting_2", question="Compare <image 2> with <image 1>, and <image 2> again.",
                options="['<image 3>', '<image 1>']", answer="A", image_2=picture(2), image_3=picture(3),
                image_4=picture(4), explanation="See <image 4>.",
            ),
        ],
        "Art/validation-00000-of-00001.parquet": [
            mmmu(id="validation_Art_3", question_type="open", options="[]", answer="['8.4', 'eight']", img_type="[]")
        ],
        "Art/test-00000-of-00001.parquet": [mmmu(id="test_Art_1", answer="?")],
    },
    "mmmu_pro": {
        "standard (10 options)/test-00000-of-00002.parquet": [mmmu_pro()],
        "standard (10 options)/test-00001-of-00002.parquet": [mmmu_pro(id="test_Music_2", subject="Music")],
        "standard (4 options)/test-00000-of-00002.parquet": [mmmu_pro(id="other")],
        "vision/test-00000-of-00004.parquet": [mmmu_pro_vision(id="other")],
    },
    "mmmu_pro_vision": {
        "standard (10 options)/test-00000-of-00002.parquet": [mmmu_pro(id="other")],
        "vision/test-00000-of-00004.parquet": [mmmu_pro_vision()],
    },
    "mmstar": {"mmstar.parquet": [mmstar(), mmstar(index=1, image=picture()["bytes"], answer="A", category="math")]},
    "hallusionbench": {
        "data/image-00000-of-00001.parquet": [
            hallusionbench(),
            hallusionbench(question_id="1", gt_answer="0"),
            hallusionbench(category="VS", subcategory="chart", figure_id="1", visual_input="2", gt_answer="0"),
        ],
        "data/non_image-00000-of-00001.parquet": [
            hallusionbench(category="VS", subcategory="chart", visual_input="0", image=None, filename=None)
        ],
    },
}  # fmt: skip


def write_benchmark(folder: Path, name: str) -> Path:
    """Write the files of a benchmark as in a checkout of its hub repository; returns the folder."""
    for path, records in FILES[name].items():
        write_parquet(folder / path, records)
    return folder


def write_parquet(path: Path, records: list[Record]) -> Path:
    """Records as Parquet, images as the structs of datasets; bytes alone stay bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {}
    for name in records[0]:
        values = [record[name] for record in records]
        if all(value is None or (isinstance(value, dict) and set(value) == {"bytes", "path"}) for value in values):
            columns[name] = pa.array(values, IMAGE) if "image" in name else pa.array(values, pa.string())
        elif "image" in name and any(isinstance(value, bytes) for value in values):
            columns[name] = pa.array([value if isinstance(value, bytes) else value["bytes"] for value in values])
        else:
            columns[name] = pa.array(values)
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path
