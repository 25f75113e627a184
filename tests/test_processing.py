import json
import pickle

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from avar_lightning.processing import DEMO_BASE, load_processor, resolve_pretrained


def test_demo_processor_encodes_text_and_image():
    processor = load_processor("demo")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    text = processor.apply_chat_template(messages, tokenize=False)
    encoded = processor(text=[text], images=[Image.new("RGB", (84, 84))], return_tensors="pt")
    assert (encoded["input_ids"] == processor.image_token_id).sum() == 9  # 84 / (14 × 2) squared
    assert encoded["image_grid_thw"].tolist() == [[1, 6, 6]]


def test_pixel_bounds_limit_image_tokens():
    processor = load_processor("demo", max_pixels=56 * 56, min_pixels=28 * 28)
    encoded = processor.image_processor([Image.new("RGB", (400, 400))], return_tensors="pt")
    assert encoded["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_pixel_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(ValueError, match="min_pixels=9999999 is more than"):
        load_processor("demo", min_pixels=9999999)


def test_saved_processor_keeps_the_standard_class_name(tmp_path):
    load_processor("demo").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["processor_class"] == "Qwen2_5_VLProcessor"


def test_processor_reaches_a_spawned_worker():
    processor = load_processor("demo")
    copy = pickle.loads(pickle.dumps(processor))
    assert type(copy) is type(processor)
    encoded = [p(text=["<|image_pad|>"], images=[Image.new("RGB", (84, 84))])["input_ids"] for p in (processor, copy)]
    assert encoded[0] == encoded[1]


def test_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere"):
        resolve_pretrained("./nowhere")


def test_text_only_model_has_no_image_processor(tmp_path):
    PreTrainedTokenizerFast.from_pretrained(DEMO_BASE).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="no image processor"):
        load_processor(str(tmp_path))
