"""Load the processor (image processor + tokenizer + chat template) that belongs to a model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name
from transformers.utils import is_torchvision_available

from avar_lightning.families import PROCESSORS_BEHIND_TORCHVISION

DEMO_BASE = Path(__file__).parent / "data" / "demo_base"
# What ships with the package: the base, the same after the cold start of configs/avar_sft.yaml, and a smaller base.
SHIPPED = {
    "demo": DEMO_BASE,
    "demo_sft": DEMO_BASE.with_name("demo_sft"),
    "demo_small": DEMO_BASE.with_name("demo_small"),
}


def resolve_pretrained(pretrained: str | Path) -> str:
    """The folder or hub name behind `pretrained`; `"demo"`, `"demo_sft"` and `"demo_small"` ship with the package.

    Raises:
        FileNotFoundError: A path-like name that is no folder.
    """
    name = str(pretrained)
    if name in SHIPPED:
        return str(SHIPPED[name])
    folder = Path(name).expanduser()
    if looks_like_path(name) and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"No model at {name!r}: expected a folder with a config.json, or a hub name like "
            f"'Qwen/Qwen2.5-VL-7B-Instruct', or one that ships ({', '.join(SHIPPED)}); check the path."
        )
    return str(folder) if folder.is_dir() else name


def looks_like_path(name: str) -> bool:
    """Whether a model's name can be no name on the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


@cache
def image_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """`processor_class` without what videos alone need: a video processor, which needs torchvision, and num2words.

    The subclass keeps its parent's name, so that what it saves opens with the parent class elsewhere.
    """
    parameters = inspect.signature(processor_class.__init__).parameters
    without = {"video_processor": None} if "video_processor" in parameters else {}

    def __init__(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        given = dict(zip(("image_processor", "tokenizer"), args)) | kwargs
        with _num2words_in(processor_class.__module__):
            processor_class.__init__(self, **given, **without)

    # transformers reads off signature and code of a constructor what a processor is made of and which options it has.
    kept = {name: parameter for name, parameter in parameters.items() if name not in without}
    __init__.__signature__ = inspect.Signature(list(kept.values()))  # type: ignore[attr-defined]

    def validate_init_kwargs(processor_config, valid_kwargs):  # type: ignore[no-untyped-def]
        return processor_class.validate_init_kwargs(processor_config, list(kept)[1:])

    def save_pretrained(self, save_directory, **kwargs):  # type: ignore[no-untyped-def]
        written = processor_class.save_pretrained(self, save_directory, **kwargs)
        if without:  # where there is torchvision, the settings of videos are read off this file
            self.image_processor.save_pretrained(save_directory)
        return written

    # A class made here has no name to import, and workers that are spawned get their processor pickled.
    def __reduce__(self):  # type: ignore[no-untyped-def]
        return _unpickle, (processor_class.__name__, self.__dict__)

    # SmolVLM's own asks its video processor first.
    own = {
        "__init__": __init__,
        "__reduce__": __reduce__,
        "save_pretrained": save_pretrained,
        "validate_init_kwargs": staticmethod(validate_init_kwargs),
        "apply_chat_template": ProcessorMixin.apply_chat_template,
    }
    return type(processor_class.__name__, (processor_class,), own)


def _unpickle(class_name: str, state: dict[str, Any]) -> ProcessorMixin:
    processor: ProcessorMixin = object.__new__(image_only(find_processor_class(class_name)))
    processor.__dict__.update(state)
    return processor


def find_processor_class(class_name: str) -> Any:
    """A processor class by its name, also one that transformers hides because its file imports torchvision.

    Such a file asks torchvision's image processor for a function of sizes, which its twin for PIL has too.
    """
    package = PROCESSORS_BEHIND_TORCHVISION.get(class_name)
    if package is None or is_torchvision_available():
        return processor_class_from_name(class_name)
    name = package.rpartition(".")[2]
    twin = import_module(f"{package}.image_processing_pil_{name}")
    with _replaced(sys.modules, f"{package}.image_processing_{name}", twin):
        return getattr(import_module(f"{package}.processing_{name}"), class_name)


@contextmanager
def _num2words_in(module_name: str) -> Iterator[None]:
    """Let SmolVLM's processor do without the package that it writes lengths of videos with."""
    names = vars(sys.modules[module_name])
    with _replaced(names, "num2words", str) if names.get("num2words", ...) is None else nullcontext():
        yield


@contextmanager
def _replaced(mapping: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    before = mapping.get(name, ...)
    mapping[name] = value
    try:
        yield
    finally:
        if before is ...:
            del mapping[name]
        else:
            mapping[name] = before


def load_processor(
    pretrained: str | Path = "demo", *, min_pixels: int | None = None, max_pixels: int | None = None
) -> ProcessorMixin:
    """Load a vision-language processor from a folder, the hub, or the embedded demo base.

    Where torchvision is missing, processors that would need it for video only (Qwen-VL, …) load image-only.

    Args:
        pretrained: Folder, hub name, or `"demo"`.
        min_pixels: Fewest pixels of a resized image (Qwen-VL families); `None` keeps the model's own.
        max_pixels: Most pixels of a resized image, which bounds the image tokens; `None` keeps the model's own.

    Raises:
        FileNotFoundError: `pretrained` is a path without a model.
        ValueError: The model has no image processor, or `min_pixels`/`max_pixels` do not apply to it.
    """
    path = resolve_pretrained(pretrained)
    model_type = AutoConfig.from_pretrained(path).model_type
    class_name = PROCESSOR_MAPPING_NAMES.get(model_type)
    processor_class = find_processor_class(class_name) if class_name else None
    torchvision_for_nothing = (
        processor_class is not None
        and not is_torchvision_available()
        and ("video_processor" in processor_class.get_attributes() or class_name in PROCESSORS_BEHIND_TORCHVISION)
    )
    loader = image_only(processor_class) if torchvision_for_nothing else AutoProcessor
    try:
        processor = loader.from_pretrained(path)
    except OSError as error:
        raise ValueError(_no_image_processor(pretrained, model_type)) from error
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None:
        raise ValueError(_no_image_processor(pretrained, model_type))
    if min_pixels is not None or max_pixels is not None:
        _limit_pixels(image_processor, min_pixels, max_pixels)
    return processor


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def padding_id(processor: Any) -> int:
    """The token that fills up sequences: that of padding, or where there is none, of the end."""
    tokenizer = tokenizer_of(processor)
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def _no_image_processor(pretrained: str | Path, model_type: str) -> str:
    return (
        f"{str(pretrained)!r} (model type {model_type!r}) has no image processor, expected a vision-language model; "
        "give the folder of one that was saved together with its processor."
    )


def _limit_pixels(image_processor: object, min_pixels: int | None, max_pixels: int | None) -> None:
    size = dict(getattr(image_processor, "size", None) or {})
    if not {"shortest_edge", "longest_edge"} <= size.keys():
        raise ValueError(
            f"min_pixels={min_pixels}, max_pixels={max_pixels}: {type(image_processor).__name__} resizes to a fixed "
            f"size {size}, expected one that keeps the aspect ratio (Qwen-VL families); leave both unset."
        )
    # Qwen-VL names the bounds on height × width (pixels) by edges.
    size["shortest_edge"] = min_pixels if min_pixels is not None else size["shortest_edge"]
    size["longest_edge"] = max_pixels if max_pixels is not None else size["longest_edge"]
    if size["shortest_edge"] > size["longest_edge"]:
        raise ValueError(
            f"min_pixels={size['shortest_edge']} is more than "
            f"max_pixels={size['longest_edge']}; lower the first or raise the second."
        )
    image_processor.size = size  # type: ignore[attr-defined]
