"""The vLLM engine against a server that samples from a real model and fails in every way that such a server can."""

import math

import pytest
import torch

from avar_lightning.grpo.policy import completion_batch, completion_logps
from avar_lightning.model import LoRAConfig, VLMConfig, load_model
from avar_lightning.processing import load_processor, padding_id, resolve_pretrained
from avar_lightning.rollout import Prompts, SamplingConfig, VLLMRolloutEngine
from avar_lightning.rollout.vllm_engine import ADAPTER
from tests.rollout.vllm_server import VLLMServer

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def running():
    server = VLLMServer(resolve_pretrained("demo_sft"), lora=True)
    yield server
    server.stop()


@pytest.fixture
def server(running):
    running.faults.clear()
    running.requests.clear()
    running.start_again()
    return running


@pytest.fixture
def prompts(make_data):
    batch = next(iter(make_data(train_prompts=True, batch_size=3).train_dataloader()))
    return Prompts(batch["rows"], batch["messages"], batch["images"])


def make_engine(server, tmp_path, *, model=None, **options):
    engine = VLLMRolloutEngine(server.url, str(tmp_path / "sync"), **({"patience": 20.0, "max_wait": 0.02} | options))
    model = model or load_model("demo_sft")
    engine.setup(model, load_processor("demo_sft"), SamplingConfig(max_new_tokens=6, temperature=0.9))
    return engine


def changed(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def our_logps(model, prompts, completions, num_generations):
    rows = [row for row in prompts.rows for _ in range(num_generations)]
    pad = padding_id(load_processor("demo_sft"))
    batch = completion_batch(rows, completions.token_ids, pad_token_id=pad, device="cpu")
    with torch.no_grad():
        logps, _ = completion_logps(model, batch, temperature=0.9)
    return [row[mask] for row, mask in zip(logps, batch.completion_mask)]


@pytest.mark.parametrize("lora", [False, True])
def test_it_samples_with_the_weights_of_the_policy(server, prompts, tmp_path, lora):
    model = changed(load_model(VLMConfig("demo_sft", lora=LoRAConfig(r=2) if lora else None)))
    engine = make_engine(server, tmp_path, model=model)
    engine.sync(3)
    completions = engine.generate(prompts, 2, seed=5)
    assert len(completions.token_ids) == 6
    for ours, theirs in zip(our_logps(model, prompts, completions, 2), completions.logps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    bodies = [body for path, body in server.requests if path == CHAT]
    assert {body["model"] for body in bodies} == {ADAPTER if lora else "served"}
    placeholders = load_processor("demo_sft").image_token_id
    assert all(str(placeholders) in body["logit_bias"] for body in bodies)


def test_each_update_replaces_the_weights_and_leaves_one_folder(server, prompts, tmp_path):
    model = load_model("demo_sft")
    engine = make_engine(server, tmp_path, model=model)
    for step in range(3):
        changed(model, step)
        engine.sync(step)
        completions = engine.generate(prompts, 2, seed=step)
        for ours, theirs in zip(our_logps(model, prompts, completions, 2), completions.logps, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert len(list((tmp_path / "sync").iterdir())) == 1
    engine.teardown()
    assert not list((tmp_path / "sync").iterdir())


def test_no_two_completions_share_a_seed(server, prompts, tmp_path):
    """vLLM gives the completions of one request its seed and those that follow."""
    engine = make_engine(server, tmp_path)
    engine.sync(0)
    engine.generate(prompts, 4, seed=9)
    seeds = [body["seed"] + number for path, body in server.requests if path == CHAT for number in range(4)]
    assert len(set(seeds)) == len(seeds) == 12


def test_sampling_is_reproducible(server, prompts, tmp_path):
    engine = make_engine(server, tmp_path, model=changed(load_model("demo_sft")))
    engine.sync(0)
    one, again, other = (engine.generate(prompts, 2, seed=seed) for seed in (7, 7, 8))
    assert [ids.tolist() for ids in one.token_ids] == [ids.tolist() for ids in again.token_ids]
    assert [ids.tolist() for ids in one.token_ids] != [ids.tolist() for ids in other.token_ids]


@pytest.mark.parametrize(
    "fault",
    [429, 500, 503, "drop", "half", "bad json", "empty choices", "no token ids", "short logprobs"],
)
def test_what_passes_is_tried_again(server, prompts, tmp_path, fault):
    engine = make_engine(server, tmp_path)
    engine.sync(0)
    expected = engine.generate(prompts, 2, seed=1)
    server.faults.extend([(CHAT, fault), (CHAT, fault)])
    found = engine.generate(prompts, 2, seed=1)
    assert not server.faults
    assert [ids.tolist() for ids in found.token_ids] == [ids.tolist() for ids in expected.token_ids]


def test_a_slow_answer_is_asked_for_again(server, prompts, tmp_path):
    engine = make_engine(server, tmp_path, timeout=1.0, concurrency=1)
    engine.sync(0)
    server.faults.append((CHAT, "slow"))
    assert len(engine.generate(prompts, 2, seed=1).token_ids) == 6


@pytest.mark.parametrize("path", ["/v1/models", "/collective_rpc", "/reset_encoder_cache", "/update_weight_version"])
def test_every_endpoint_is_tried_again(server, prompts, tmp_path, path):
    server.faults.append((path, 503))
    engine = make_engine(server, tmp_path)
    engine.sync(0)
    assert len(engine.generate(prompts, 1, seed=1).token_ids) == 3
    assert not server.faults


@pytest.mark.parametrize("lora", [False, True])
def test_a_server_that_was_started_again_gets_the_weights_back(server, prompts, tmp_path, lora):
    model = changed(load_model(VLMConfig("demo_sft", lora=LoRAConfig(r=2) if lora else None)))
    engine = make_engine(server, tmp_path, model=model)
    engine.sync(0)
    server.faults.extend([(CHAT, "restart"), (CHAT, "drop")])
    completions = engine.generate(prompts, 2, seed=1)
    for ours, theirs in zip(our_logps(model, prompts, completions, 2), completions.logps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    loading = "/v1/load_lora_adapter" if lora else "/collective_rpc"
    assert sum(path == loading for path, _ in server.requests) == 2  # once for all requests that noticed


def test_a_server_that_starts_again_while_weights_are_brought_has_them(server, prompts, tmp_path):
    """It must not bear the version of weights that went with its earlier life."""
    model = changed(load_model("demo_sft"))
    engine = make_engine(server, tmp_path, model=model)
    server.faults.extend([("/reset_encoder_cache", "crash"), ("/update_weight_version", "crash")])
    engine.sync(0)
    completions = engine.generate(prompts, 2, seed=1)
    for ours, theirs in zip(our_logps(model, prompts, completions, 2), completions.logps, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_server_that_keeps_losing_the_weights_is_reported(server, prompts, tmp_path):
    engine = make_engine(server, tmp_path, concurrency=1)
    engine.sync(0)
    server.faults.extend([(CHAT, "restart")] * 20)
    with pytest.raises(RuntimeError, match="lost the weights 5 times"):
        engine.generate(prompts, 1, seed=1)


def test_a_server_that_stays_away_is_reported(server, prompts, tmp_path):
    engine = make_engine(server, tmp_path, patience=0.3)
    engine.sync(0)
    server.faults.extend([(CHAT, 503)] * 1000)
    with pytest.raises(RuntimeError, match=r"did not answer /v1/chat/completions in .* tries .*503.*--ckpt_path"):
        engine.generate(prompts, 1, seed=1)
    gone = VLLMRolloutEngine("http://127.0.0.1:9", str(tmp_path), patience=0.2, max_wait=0.01)
    with pytest.raises(RuntimeError, match="did not answer /v1/models"):
        gone.setup(load_model("demo_sft"), load_processor("demo_sft"), SamplingConfig())


def test_what_will_not_pass_is_said_at_once(server, prompts, tmp_path):
    engine = make_engine(server, tmp_path, concurrency=1)
    engine.sync(0)
    before = len(server.requests)
    server.faults.extend([(CHAT, 400)])
    with pytest.raises(RuntimeError, match=r"answered 400 .*told to fail"):
        engine.generate(prompts, 1, seed=1)
    assert len(server.requests) - before <= len(prompts)  # those that were on their way, none twice
    # One that was on its way when the run ended may take a fault with it.
    server.faults.extend([(CHAT, "other prompt")] * (len(prompts) + 2))
    with pytest.raises(RuntimeError, match="read a prompt as"):
        engine.generate(prompts, 1, seed=1)
    server.faults.clear()
    with pytest.raises(RuntimeError, match=r"serves \['served'\], and not rollout.model='other'"):
        make_engine(server, tmp_path, model=None).__class__(server.url, model="other").setup(
            load_model("demo_sft"), load_processor("demo_sft"), SamplingConfig()
        )
    server.lora = False
    try:
        adapters = make_engine(server, tmp_path, model=load_model(VLMConfig("demo_sft", lora=LoRAConfig(r=2))))
        with pytest.raises(RuntimeError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
            adapters.sync(0)
    finally:
        server.lora = True


def test_a_key_comes_from_the_environment_and_is_not_said(server, prompts, tmp_path, monkeypatch):
    server.api_key = "secret"
    try:
        with pytest.raises(RuntimeError, match="VLLM_API_KEY") as caught:
            make_engine(server, tmp_path)
        assert "secret" not in str(caught.value)
        monkeypatch.setenv("VLLM_API_KEY", "secret")
        make_engine(server, tmp_path)
    finally:
        server.api_key = None


def test_log_probabilities_are_numbers(server, prompts, tmp_path):
    engine = make_engine(server, tmp_path)
    engine.sync(0)
    completions = engine.generate(prompts, 2, seed=1)
    assert all(math.isfinite(value) and value <= 1e-6 for row in completions.logps for value in row.tolist())
    assert [len(ids) for ids in completions.token_ids] == [len(row) for row in completions.logps]
    assert all(len(ids) <= 6 for ids in completions.token_ids)


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rollout\.url='localhost:8000'"):
        VLLMRolloutEngine("localhost:8000")
    with pytest.raises(ValueError, match=r"rollout\.patience=0"):
        VLLMRolloutEngine(patience=0)
