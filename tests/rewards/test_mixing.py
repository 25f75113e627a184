import asyncio
import math

import pytest

from avar_lightning.rewards import RewardConfig, accuracy_reward, call_rewards, load_function, total_reward

SOURCE = """
def length_reward(completions, **columns):
    return [float(len(text)) for text in completions]

number = 3
"""


def test_functions_are_found_by_path_and_by_file(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    assert load_function("avar_lightning.rewards.accuracy_reward") is accuracy_reward
    config = RewardConfig(f"{tmp_path}/mine.py:length_reward", weight=0.5)
    assert config.name == "length"
    assert config.load()(["abc"]) == [3.0]
    assert RewardConfig(**config.as_plain) == config
    assert RewardConfig(accuracy_reward).as_plain["function"] == "avar_lightning.rewards.answers.accuracy_reward"


@pytest.mark.parametrize("path", ["no.module.reward", "avar_lightning.rewards.nothing", "word", "/no/file.py:reward"])
def test_what_cannot_be_loaded_is_said(path):
    with pytest.raises(ValueError, match=f"reward function '{path}' cannot be loaded"):
        load_function(path)


def test_what_cannot_be_called_is_said(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    with pytest.raises(ValueError, match="is a int, expected something to call"):
        load_function(f"{tmp_path}/mine.py:number")


def test_coroutines_run_side_by_side_and_get_every_column():
    running = []

    async def slow(completions, answer, **_):
        running.append(answer)
        while len(running) < 2:  # each waits until the other has begun
            await asyncio.sleep(0)
        return [1.0, None]

    found = call_rewards({"a": slow, "b": slow, "c": lambda completions, **_: [2, 3]}, ["x", "y"], {"answer": [1, 2]})
    assert running == [[1, 2], [1, 2]]
    assert found["c"] == [2.0, 3.0]
    assert found["a"][0] == 1.0
    assert math.isnan(found["a"][1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "gave 1 values for 2 completions"),
        (["good", "bad"], "expected a list of numbers"),
        (None, "expected a list of numbers"),
        ([1.0, math.inf], "gave inf"),
    ],
)
def test_rewards_that_are_none_are_errors(values, message):
    with pytest.raises(ValueError, match=message):
        call_rewards({"odd": lambda completions, **_: values}, ["x", "y"], {})


def test_parts_that_do_not_apply_add_nothing():
    parts = {"a": [1.0, math.nan], "b": [0.5, 0.5]}
    assert total_reward(parts, {"a": 2.0, "b": 1.0}) == [2.5, 0.5]


def test_coroutines_work_inside_a_running_loop_and_find_their_locks_again():
    lock = []

    async def asked(completions, **_):
        lock.append(lock[0] if lock else asyncio.Lock())
        async with lock[0]:
            return [1.0]

    async def notebook():
        return [call_rewards({"a": asked}, ["x"], {})["a"] for _ in range(2)]

    assert asyncio.run(notebook()) == [[1.0], [1.0]]
