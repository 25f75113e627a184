"""A callback finds what it needs in a module and batch that know nothing of it, or says what to do."""

from collections import UserDict
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from avar_lightning.callbacks.foreign import (
    find_input_ids,
    find_processor,
    find_role_ids,
    locate_vlm,
    sample_ids,
)
from tests.factories import tiny_vlm


class Module(L.LightningModule):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        self.trainer = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, barebones=True)


def with_template() -> Any:
    return SimpleNamespace(apply_chat_template=lambda: None)


def test_model_is_found_under_wrappers_and_compilation() -> None:
    vlm = tiny_vlm()
    assert locate_vlm(Module(anything=nn.Sequential(vlm))) is vlm
    assert locate_vlm(Module(compiled=torch.compile(vlm))) is vlm


def test_several_models_need_a_choice_and_none_is_an_error() -> None:
    student, teacher = tiny_vlm(), tiny_vlm(seed=1)
    module = Module(student=student, teacher=nn.Sequential(teacher))
    with pytest.raises(ValueError, match=r"2 vision-language models.*the callback"):
        locate_vlm(module)
    assert locate_vlm(module, "teacher") is teacher
    with pytest.raises(AttributeError, match="pupil"):
        locate_vlm(module, "pupil")
    with pytest.raises(ValueError, match="holds no Hugging Face vision-language model"):
        locate_vlm(Module(net=nn.Linear(1, 1)))


def test_processor_comes_from_the_user_then_the_module_then_its_datamodule() -> None:
    given, own, data = with_template(), with_template(), with_template()
    module = Module(processor="a name", tokenizer=own)
    module.trainer.datamodule = SimpleNamespace(processor=data)  # type: ignore[attr-defined]
    assert find_processor(module, given) is given
    assert find_processor(module) is own
    module.tokenizer = None  # type: ignore[assignment]
    assert find_processor(module) is data
    assert find_processor(Module()) is None


def test_processor_given_by_name_is_loaded_once() -> None:
    loaded = find_processor(Module(), "demo")
    assert hasattr(loaded, "apply_chat_template")
    assert find_processor(Module(), "demo") is loaded


def test_batch_of_the_wrong_kind_is_described() -> None:
    with pytest.raises(ValueError, match="validation batch is list, expected a mapping"):
        find_input_ids([torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"validation batch is \['tokens'\], expected a mapping"):
        find_input_ids({"tokens": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="of shape \\(batch, tokens\\)"):
        find_input_ids({"input_ids": torch.ones(3)})


def test_roles_of_the_batch_are_taken_when_they_fit() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    roles = find_role_ids(UserDict(input_ids=ids, role_ids=ids.int()), Module())
    assert roles.dtype == torch.long
    with pytest.raises(ValueError, match=r"role_ids has shape \(2, 2\), expected that of input_ids \(2, 3\)"):
        find_role_ids({"input_ids": ids, "role_ids": ids[:, :2]}, Module())


def test_sample_ids_come_from_columns_or_are_none() -> None:
    assert sample_ids({"columns": [{"id": "a"}, {"answer": 1}]}, 2) == ["a", None]
    assert sample_ids({}, 2) == [None, None]
