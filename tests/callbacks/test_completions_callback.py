import json

import lightning as L
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from avar_lightning.callbacks import CompletionsCallback
from avar_lightning.callbacks.completions import markdown
from tests.grpo.test_grpo_module import G, make_module

ROW = {
    "prompt": 0,
    "id": "x",
    "question": "a | b?",
    "answer": 3,
    "completion": "<think>\n1|2</think>",
    "total": 0.12345,
}


def test_cells_show_tags_and_keep_the_table_whole():
    text = markdown([ROW, ROW | {"completion": "y" * 1000}])
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert len({line.count("|") for line in table}) == 1
    assert "&lt;think&gt; 1&#124;2&lt;/think&gt;" in table[2]
    assert "0.123" in table[2]
    assert len(table[3]) < 500


def test_what_it_writes(make_data, tmp_path):
    module = make_module()
    logger = L.pytorch.loggers.TensorBoardLogger(tmp_path, name="run", version=0)
    data = make_data(train_prompts=True, batch_size=3)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callbacks = [CompletionsCallback(every_n_batches=2, num_prompts=2)]
    L.Trainer(accelerator="cpu", max_steps=3, limit_val_batches=0, logger=logger, callbacks=callbacks, **quiet).fit(
        module, data
    )
    folder = tmp_path / "run" / "version_0" / "completions"
    assert sorted(path.name for path in folder.glob("*.jsonl")) == ["step_00000001.jsonl", "step_00000003.jsonl"]
    rows = [json.loads(line) for line in (folder / "step_00000003.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * G
    assert [row["completion"] for row in rows] == module.rollouts.texts[: 2 * G]
    assert [row["total"] for row in rows] == pytest.approx(module.rollouts.total[: 2 * G])
    assert all((folder / name).is_file() for row in rows for name in row["images"])
    events = EventAccumulator(str(folder.parent), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    assert len(events.Tensors("completions/text_summary")) == 2
    assert len(events.Images("completions/prompt_1")) == 2


def test_modules_without_rollouts_are_left_alone(tmp_path):
    callback = CompletionsCallback()
    callback.on_train_batch_end(L.Trainer(logger=False, accelerator="cpu"), L.LightningModule(), None, None, 0)
    with pytest.raises(ValueError, match="num_prompts=0"):
        CompletionsCallback(num_prompts=0)
