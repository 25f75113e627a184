"""What was trained opens without this project, and computes the same."""

import json
import pickle

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

from avar_lightning.model import VLMConfig
from avar_lightning.processing import find_processor_class, load_processor
from avar_lightning.sft import SFTModule
from tests.families.conftest import ALL
from tests.families.samples import KINDS


@pytest.mark.slow
@pytest.mark.capability("export")
@pytest.mark.parametrize("family", ALL, indirect=True)
@torch.no_grad()
def test_an_exported_folder_opens_with_equal_logits(family, tmp_path):
    module = SFTModule(VLMConfig(str(family.folder)))
    module.configure_model()
    for parameter in module.model.parameters():
        parameter.add_(0.01)
    folder = module.save_pretrained(tmp_path / "hf")
    written = json.loads((folder / "processor_config.json").read_text())
    assert written["processor_class"] == family.small.processor[0]
    assert {name: written[name] for name in family.small.processor[1]} == family.small.processor[1]
    processor = pickle.loads(pickle.dumps(load_processor(folder)))  # as a spawned data worker gets it
    whole = find_processor_class(family.small.processor[0])
    if "video_processor" in whole.get_attributes():
        # What a machine with torchvision makes its video processor of.
        settings, _ = BaseVideoProcessor.get_video_processor_dict(folder)
        assert settings["image_mean"] == list(processor.image_processor.image_mean)
    if type(processor) is whole:
        processor = AutoProcessor.from_pretrained(folder)
    else:
        assert not is_torchvision_available()
    model = AutoModelForImageTextToText.from_pretrained(folder)
    for kind in ("two", "text"):
        sample = KINDS[kind]
        encoded = family.encode(sample)
        parts = [
            {
                **turn,
                "content": turn["content"]
                if isinstance(turn["content"], list)
                else [{"type": "text", "text": turn["content"]}],
            }
            for turn in sample.messages
        ]
        text = processor.apply_chat_template(parts, tokenize=False)
        bos = processor.tokenizer.bos_token
        special = {} if not bos or not text.startswith(bos) else {"add_special_tokens": False}
        inputs = processor(
            text=[text], images=[sample.images] if sample.images else None, return_tensors="pt", **special
        )
        assert inputs["input_ids"].equal(encoded.tensors["input_ids"])
        ours = module.model.eval()(**{name: encoded.tensors[name] for name in inputs})
        assert model(**inputs).logits.equal(ours.logits)
