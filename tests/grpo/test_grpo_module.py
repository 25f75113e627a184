"""GRPOModule against GRPO written by hand: one sample at a time, unpadded, with eager attention."""

import math

import lightning as L
import pytest
import torch

from avar_lightning import GRPOModule
from avar_lightning.grpo import GRPOConfig
from avar_lightning.losses import POLICY_LOSSES
from avar_lightning.model import LoRAConfig, VLMConfig
from avar_lightning.module import OptimizerConfig
from avar_lightning.rewards import RewardConfig, VisualAttentionReward
from avar_lightning.roles import Role
from avar_lightning.rollout import Completions, HFRolloutEngine, Prompts, SamplingConfig
from tests.factories import StopAfter

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
G = 4


def parity_reward(completions, completion_ids, **_):
    """Something that differs within groups."""
    return [float(sum(ids) % 5) / 5 for ids in completion_ids]


def right_reward(completions, completion_ids, **_):
    return [float(len(ids) > 0 and ids[0] % 2) for ids in completion_ids]


PARITY = RewardConfig(parity_reward)
ACCURACY = RewardConfig(right_reward, name="accuracy")


def make_module(grpo=None, *, rewards=(PARITY,), visual=None, lora=None, lr=1e-3, temperature=1.0, rollout=None, **vlm):
    torch.manual_seed(7)
    return GRPOModule(
        VLMConfig("demo", from_scratch=True, lora=lora, **vlm),
        grpo or GRPOConfig(num_generations=G, micro_batch_size=3),
        SamplingConfig(max_new_tokens=6, temperature=temperature, seed=3),
        list(rewards),
        visual,
        rollout,
        OptimizerConfig(lr=lr, warmup_fraction=0.0),
    )


def fit(module, data, steps=1, **options):
    options = QUIET | {"max_steps": steps, "limit_val_batches": 0, "enable_checkpointing": False} | options
    ckpt_path = options.pop("ckpt_path", None)
    trainer = L.Trainer(**options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


@pytest.fixture
def prompts(make_data):
    return lambda **options: make_data(**{"train_prompts": True, "batch_size": 3} | options)


class Watch(L.Callback):
    """Keeps the gradients of the first update, and what was logged of each batch."""

    def __init__(self):
        self.gradients, self.logged = None, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.gradients is None:
            self.gradients = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Fixed:
    """An engine that has its completions from the prompt's id, so that it gives the same in any process."""

    def __init__(self, empty=False, logps=None):
        self.empty, self.logps, self.synced = empty, logps, []

    def setup(self, model, processor, sampling):
        self.longest, self.end = sampling.max_new_tokens, processor.tokenizer.eos_token_id

    def sync(self, step):
        self.synced.append(step)

    def teardown(self):
        self.synced.append("down")

    def generate(self, prompts, num_generations, *, seed):
        ids, finished = [], []
        for row in prompts.rows:
            for number in range(num_generations):
                generator = torch.Generator().manual_seed(int(row["input_ids"].sum()) * 100 + number)
                length = 0 if self.empty and number == 0 else 1 + (number * 2) % self.longest
                tokens = torch.randint(270, 500, (length,), generator=generator)
                done = number % 2 == 0 and length > 0
                if done:
                    tokens[-1] = self.end
                ids.append(tokens)
                finished.append(done or length == 0)
        logps = None if self.logps is None else [torch.full((len(tokens),), self.logps) for tokens in ids]
        return Completions(ids, finished, logps)


def test_completions_are_sampled_without_gradients_in_memory(prompts):
    class Engine(Fixed):
        def setup(self, model, processor, sampling):
            super().setup(model, processor, sampling)
            self.model, self.kept = model, []

        def generate(self, *args, **kwargs):
            self.kept.append(any(parameter.grad is not None for parameter in self.model.parameters()))
            return super().generate(*args, **kwargs)

    engine, watch = Engine(), Watch()
    fit(make_module(rollout=engine), prompts(), steps=3, callbacks=[watch])
    assert watch.gradients
    assert engine.kept == [False] * 3


def one_by_one(model, rollouts, temperature=1.0):
    """Log-probabilities of each completion from a forward of its own: no padding, all logits, float64 softmax."""
    logps = []
    for index, tokens in enumerate(rollouts.token_ids):
        row = dict(rollouts.row(index))
        count = row["input_ids"].shape[1]
        ids = torch.cat([row["input_ids"], tokens[None]], 1)
        inputs = {name: value for name, value in row.items() if name not in ("role_ids", "input_ids")}
        inputs |= {"attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in row:
            inputs["mm_token_type_ids"] = torch.cat([row["mm_token_type_ids"], torch.zeros_like(tokens[None])], 1)
        logits = model(input_ids=ids, **inputs).logits[0, count - 1 : -1].double() / temperature
        logps.append(logits.log_softmax(1).gather(1, tokens[:, None])[:, 0])
    return logps


def by_hand(module, rollouts, loss_type):
    """The loss of a batch at its start, as the formulas have it."""
    length = module.sampling.max_new_tokens
    logps = one_by_one(module.model, rollouts, module.sampling.temperature)
    total = sum(len(row) for row in logps)
    rewards = torch.tensor(rollouts.total, dtype=torch.float64).view(-1, G)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    losses = []
    for row, advantage in zip(logps, advantages):
        per_token = -(row - row.detach()).exp() * advantage
        if loss_type in ("grpo", "gspo"):
            losses.append(per_token.mean() / len(logps))
        elif loss_type == "dapo":
            losses.append(per_token.sum() / total)
        else:
            losses.append(per_token.sum() / length / len(logps))
    return sum(losses)


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
@pytest.mark.parametrize("micro_batch_size", [1, 5, 64])
def test_gradient_is_that_of_grpo_written_by_hand(prompts, loss_type, micro_batch_size):
    config = GRPOConfig(
        loss_type=loss_type, num_generations=G, micro_batch_size=micro_batch_size, max_grad_norm=0.0, vas_every=0
    )
    module, watch = make_module(config, temperature=0.7), Watch()
    fit(module, prompts(), callbacks=[watch])
    twin = make_module(config, temperature=0.7)
    twin.configure_model()
    twin.eval()
    by_hand(twin, module.rollouts, loss_type).backward()
    assert max(float(gradient.abs().max()) for gradient in watch.gradients.values()) > 1e-5
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(watch.gradients[name], parameter.grad, rtol=1e-3, atol=2e-6, msg=name)


def test_visual_reward_is_that_of_eager_attention(prompts):
    for transform in ("ratio", "log", "share", "tanh"):
        module = make_module(
            rewards=[ACCURACY], visual=VisualAttentionReward(transform, weight=0.5, layers="1-2"), lr=0.0
        )
        fit(module, prompts())
        rollouts = module.rollouts
        module.model.set_attn_implementation("eager")
        module.eval()
        found = []
        for index, tokens in enumerate(rollouts.token_ids):
            row = dict(rollouts.row(index))
            roles = torch.cat([row.pop("role_ids")[0], torch.full_like(tokens, int(Role.RESPONSE))])
            ids = torch.cat([row.pop("input_ids"), tokens[None]], 1)
            row["mm_token_type_ids"] = torch.cat([row["mm_token_type_ids"], torch.zeros_like(tokens[None])], 1)
            row["attention_mask"] = torch.ones_like(ids)
            with torch.no_grad():
                attentions = module.model(input_ids=ids, **row, output_attentions=True).attentions
            values = []
            for layer in (1, 2):
                heads = attentions[layer][0].double().mean(0)[roles == Role.RESPONSE]
                image, system = heads[:, roles == Role.IMAGE].sum(1), heads[:, roles == Role.SYSTEM].sum(1)
                values.append(image / (image + system + 1e-6) if transform == "share" else image / (system + 1e-6))
            value = torch.stack(values)
            found.append(float((value.log1p() if transform == "log" else value).mean()))
        if transform == "tanh":
            groups = torch.tensor(found).view(-1, G)
            spread = groups.std(1, keepdim=True, correction=0)
            found = ((groups - groups.mean(1, keepdim=True)) / spread).tanh().flatten().tolist()
        right = rollouts.rewards["accuracy"]
        assert 0 < sum(right) < len(right)
        expected = [value if yes else 0.0 for value, yes in zip(found, right)]
        assert rollouts.rewards["visual"] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert rollouts.total == pytest.approx([a + 0.5 * v for a, v in zip(right, expected)], rel=1e-3, abs=1e-3)


def test_groups_without_variance_cost_nothing_and_change_nothing(prompts):
    def half(completions, completion_ids, **_):
        return [parity_reward([], [ids])[0] if number >= G else 1.0 for number, ids in enumerate(completion_ids)]

    watch, lengths = Watch(), []
    module = make_module(rewards=[RewardConfig(half, name="half")])
    original = module._batch
    module._batch = lambda rollouts, chunk: lengths.append(len(chunk)) or original(rollouts, chunk)
    fit(module, prompts(), callbacks=[watch])
    assert watch.logged[-1]["rollout/groups_without_variance"] == pytest.approx(1 / 3)
    scored = 3 * G  # of the pass that measures attention
    assert sum(lengths) - scored == sum(float(a) != 0 for a in module.rollouts.advantages) <= 2 * G
    twin = make_module(rewards=[RewardConfig(half, name="half")])
    twin.configure_model()
    twin.eval()
    by_hand(twin, module.rollouts, "grpo").backward()
    norm = torch.stack([p.grad.norm() for p in twin.parameters()]).norm()
    scale = min(1.0, 1.0 / float(norm))
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(watch.gradients[name], scale * parameter.grad, rtol=1e-3, atol=2e-6, msg=name)


def test_nothing_to_learn_leaves_the_weights_alone_and_is_said(prompts, monkeypatch):
    monkeypatch.setattr("avar_lightning.grpo.module.PATIENCE", 2)
    module = make_module(rewards=[RewardConfig(lambda completions, **_: [1.0] * len(completions), name="same")])
    module.configure_model()
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    with pytest.warns(UserWarning, match=r"No group of 2 batches in a row .*mean 1"):
        trainer = fit(module, prompts(), steps=2)
    assert trainer.global_step == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.model.state_dict().items())


def test_everything_that_is_promised_is_logged(prompts):
    watch = Watch()
    module = make_module(rewards=[ACCURACY, PARITY], visual=VisualAttentionReward())
    fit(module, prompts(), callbacks=[watch])
    names = "accuracy parity visual total"
    expected = {f"reward/{name}" for name in names.split()}
    expected |= {f"rollout/{name}" for name in ("length", "truncated", "empty", "groups_without_variance", "vas")}
    names = "loss entropy kl clip_fraction_low clip_fraction_high grad_norm"
    expected |= {f"train/{name}" for name in names.split()}
    expected |= {f"time/{name}_s" for name in ("rollout", "reward", "score", "update")}
    assert expected <= watch.logged[-1].keys()
    assert all(map(math.isfinite, watch.logged[-1].values()))
    first, last = module.trend
    assert first == last  # of a single batch
    assert first["reward/total"] == pytest.approx(watch.logged[-1]["reward/total"])


def test_several_updates_of_one_batch_follow_the_ratio(prompts):
    config = GRPOConfig(
        num_generations=G, micro_batch_size=5, num_epochs=2, num_minibatches=3, clip_low=0.01, clip_high=0.01
    )
    watch = Watch()
    module = make_module(config, lr=3e-3)
    trainer = fit(module, prompts(), steps=6, callbacks=[watch])
    assert trainer.global_step == 6
    assert len(watch.logged) == 1
    assert watch.logged[0]["train/clip_fraction_low"] + watch.logged[0]["train/clip_fraction_high"] > 0
    twin = make_module(config)
    twin.configure_model()
    twin.eval()
    with torch.no_grad():
        for ours, expected in zip(module.rollouts.old_logps, one_by_one(twin.model, module.rollouts)):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=2)])
def test_the_reference_is_where_training_started(prompts, lora):
    config = GRPOConfig(num_generations=G, beta=0.1)
    module, watch = make_module(config, lora=lora, lr=1e-2), Watch()
    trainer = fit(module, prompts(), steps=3, callbacks=[watch])
    assert watch.logged[0]["train/kl"] == pytest.approx(0.0, abs=1e-6)
    assert watch.logged[2]["train/kl"] > 1e-5
    twin = make_module(config, lora=lora)
    twin.configure_model()
    twin.eval()
    with torch.no_grad():
        expected = one_by_one(twin.model, module.rollouts)
    for ours, theirs in zip(module.rollouts.ref_logps, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    assert not any("reference" in name for name in trainer._checkpoint_connector.dump_checkpoint()["state_dict"])


def test_a_checkpoint_opens_and_has_no_reference(prompts, tmp_path):
    module = make_module(
        GRPOConfig(num_generations=G, beta=0.1), rewards=[ACCURACY], visual=VisualAttentionReward("log")
    )
    fit(module, prompts()).save_checkpoint(tmp_path / "one.ckpt")
    loaded = GRPOModule.load_from_checkpoint(tmp_path / "one.ckpt", map_location="cpu")
    assert (loaded.grpo, loaded.sampling, loaded.visual) == (module.grpo, module.sampling, module.visual)
    ours = module.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.model.state_dict().items())


def test_a_resumed_run_samples_and_learns_as_an_uninterrupted_one(prompts, tmp_path):
    whole = make_module()
    fit(whole, prompts(), steps=4)
    trainer = fit(make_module(), prompts(), steps=4, callbacks=[StopAfter(2)])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(12345)
    resumed = make_module()
    fit(resumed, prompts(), steps=4, ckpt_path=tmp_path / "half.ckpt")
    assert [row["id"] for row in resumed.rollouts.columns] == [row["id"] for row in whole.rollouts.columns]
    assert resumed.rollouts.texts == whole.rollouts.texts
    for name, tensor in resumed.model.state_dict().items():
        torch.testing.assert_close(tensor, whole.model.state_dict()[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("value", "message"),
    [(math.nan, "reward 'bad' gave nan"), (math.inf, "reward 'bad' gave inf"), (1e6, "beyond grpo.max_reward=10000")],
)
def test_rewards_that_make_no_sense_stop_the_run(prompts, value, message):
    module = make_module(rewards=[RewardConfig(lambda completions, **_: [value] * len(completions), name="bad")])
    with pytest.raises(ValueError, match=message):
        fit(module, prompts())


def test_a_gradient_that_is_not_finite_stops_the_run(prompts):
    module = make_module()
    module.configure_model()
    with torch.no_grad():
        next(iter(module.model.parameters()))[0] = math.inf
    module.engine = Fixed()
    with pytest.raises(ValueError, match=r"gradient's norm is nan in step 0"):
        fit(module, prompts())


def test_rewards_get_every_column_and_may_be_coroutines(prompts):
    seen = {}

    async def asked(completions, prompts, completion_ids, answer, task, id, **_):
        seen.update(prompts=prompts, answer=answer, task=task, id=id)
        return [None if number % 2 else 0.5 for number in range(len(completions))]

    module = make_module(rewards=[PARITY, RewardConfig(asked, weight=2.0, name="asked")])
    fit(module, prompts())
    assert seen["id"] == [column["id"] for column in module.rollouts.columns for _ in range(G)]
    assert seen["prompts"][0][0]["role"] == "system"
    parity = module.rollouts.rewards["parity"]
    assert module.rollouts.total == pytest.approx([p + (0.0 if n % 2 else 1.0) for n, p in enumerate(parity)])


def test_a_reward_of_trl_plugs_in(prompts):
    from trl import rewards

    module = make_module(rewards=[PARITY, RewardConfig(rewards.think_format_reward)])
    fit(module, prompts())
    assert set(module.rollouts.rewards["think_format"]) <= {0.0, 1.0}


def test_empty_and_truncated_completions(prompts):
    for mask_truncated in (False, True):
        watch = Watch()
        config = GRPOConfig(num_generations=G, mask_truncated=mask_truncated, loss_type="dapo", max_grad_norm=0.0)
        module = make_module(config, rollout=Fixed(empty=True))
        fit(module, prompts(), callbacks=[watch])
        assert watch.logged[0]["rollout/empty"] == pytest.approx(1 / G)
        assert watch.logged[0]["rollout/truncated"] == pytest.approx(2 / G)
        twin = make_module(config)
        twin.configure_model()
        twin.eval()
        rollouts = module.rollouts
        logps = one_by_one(twin.model, rollouts)
        counted = [len(row) > 0 and (done or not mask_truncated) for row, done in zip(logps, rollouts.finished)]
        total = sum(len(row) for row, counts in zip(logps, counted) if counts)
        loss = [-(row - row.detach()).exp().sum() * a for row, a, c in zip(logps, rollouts.advantages, counted) if c]
        (sum(loss) / total).backward()
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(watch.gradients[name], parameter.grad, rtol=1e-3, atol=2e-6, msg=name)


def test_a_foreign_sampler_is_corrected_for(prompts):
    watch, engine = Watch(), Fixed(logps=-2.0)
    module = make_module(GRPOConfig(num_generations=G, max_grad_norm=0.0, importance_cap=1.5), rollout=engine)
    fit(module, prompts(), steps=1, callbacks=[watch])
    twin = make_module()
    twin.configure_model()
    twin.eval()
    logps = one_by_one(twin.model, module.rollouts)
    parts = []
    for row, advantage in zip(logps, module.rollouts.advantages):
        weights = (row.detach() + 2.0).exp().clamp(max=1.5)
        parts.append((-(row - row.detach()).exp() * advantage * weights).mean() / len(logps))
    sum(parts).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(watch.gradients[name], parameter.grad, rtol=1e-3, atol=2e-6, msg=name)
    gap = torch.cat([(row.detach() + 2.0).abs() for row in logps]).mean()
    assert watch.logged[0]["rollout/sampler_mismatch"] == pytest.approx(float(gap), rel=1e-3)


def test_an_engine_is_brought_the_weights_before_it_samples(prompts):
    engine = Fixed()
    fit(make_module(rollout=engine), prompts(), steps=3)
    assert engine.synced == [0, 1, 2, "down"]


def test_autocast_learns_too(prompts):
    """Casts kept from the passes without gradients must not cut it."""
    watch, exact = Watch(), Watch()
    module = make_module(rollout=Fixed(), rewards=[ACCURACY], visual=VisualAttentionReward())
    fit(module, prompts(), precision="bf16-mixed", callbacks=[watch])
    fit(make_module(rollout=Fixed(), rewards=[ACCURACY], visual=VisualAttentionReward()), prompts(), callbacks=[exact])
    assert watch.gradients.keys() == exact.gradients.keys()
    one, two = (torch.cat([g.flatten() for g in w.gradients.values()]) for w in (watch, exact))
    assert float(torch.cosine_similarity(one, two, 0)) > 0.9


@pytest.mark.slow
def test_two_processes_learn_from_all_completions_as_one_would(prompts, tmp_path):
    """Each has its own prompts, and its own number of completions that are left out."""
    config = GRPOConfig(num_generations=G, micro_batch_size=3, max_grad_norm=0.0, loss_type="dapo")
    processes = {"strategy": "ddp_spawn", "devices": 2, "default_root_dir": tmp_path}
    module = make_module(config, rollout=Fixed(empty=True))
    trainer = fit(module, prompts(batch_size=2), callbacks=[Save(tmp_path)], **processes)
    assert trainer.world_size == 2
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    rollouts = [state["rollouts"] for state in states]
    assert len({column["id"] for part in rollouts for column in part.columns}) == 4
    twin = make_module(config)
    twin.configure_model()
    twin.eval()
    logps = [one_by_one(twin.model, part) for part in rollouts]
    total = sum(len(row) for part in logps for row in part)
    pairs = [pair for part, own in zip(rollouts, logps) for pair in zip(own, part.advantages)]
    sum(-((row - row.detach()).exp() * advantage).sum() / total for row, advantage in pairs).backward()
    for name, parameter in twin.named_parameters():
        for state in states:
            torch.testing.assert_close(state["gradients"][name], parameter.grad, rtol=1e-3, atol=2e-6, msg=name)
        assert torch.equal(states[0]["weights"][name], states[1]["weights"][name])


class Save(L.Callback):
    """Writes what each process had."""

    def __init__(self, folder):
        self.folder, self.watch = folder, Watch()

    def on_before_optimizer_step(self, *args):
        self.watch.on_before_optimizer_step(*args)

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = {
            "weights": dict(pl_module.named_parameters()),
            "gradients": self.watch.gradients,
            "rollouts": pl_module.rollouts,
        }
        torch.save(state, self.folder / f"{trainer.global_rank}.pt")


def test_sampling_is_reproducible_and_never_gives_a_placeholder(prompts):
    module = make_module(temperature=2.0)
    module.configure_model()
    forbidden = [module.processor.image_token_id, module.model.config.video_token_id]
    # By far the likeliest tokens, were they not suppressed.
    module.model.lm_head.register_forward_hook(lambda *a: a[2].index_fill(-1, torch.tensor(forbidden), 100.0))
    batch = next(iter(prompts().train_dataloader()))
    engine = HFRolloutEngine(batch_size=5)
    engine.setup(module.model, module.processor, SamplingConfig(max_new_tokens=8, temperature=2.0))
    asked = Prompts(batch["rows"], batch["messages"], batch["images"])
    one, same, other = (engine.generate(asked, G, seed=seed) for seed in (1, 1, 2))
    assert [ids.tolist() for ids in one.token_ids] == [ids.tolist() for ids in same.token_ids]
    assert [ids.tolist() for ids in one.token_ids] != [ids.tolist() for ids in other.token_ids]
    assert not set(forbidden) & {token for ids in one.token_ids for token in ids.tolist()}


def test_stop_tokens_end_a_completion_and_must_be_tokens(prompts):
    module = make_module()
    module.configure_model()
    config = SamplingConfig(max_new_tokens=400, temperature=5.0, stop_tokens=["</answer>", "<think>"])
    engine = HFRolloutEngine()
    engine.setup(module.model, module.processor, config)
    batch = next(iter(prompts().train_dataloader()))
    found = engine.generate(Prompts(batch["rows"], batch["messages"], batch["images"]), 2, seed=0)
    ends = set(config.end_ids(module.model, module.processor))
    assert len(ends) >= 3
    assert any(ids[-1].item() in ends for ids in found.token_ids)
    assert not any(token in ends for ids in found.token_ids for token in ids[:-1].tolist())
    with pytest.raises(ValueError, match=r"'two words', which is \d+ tokens"):
        SamplingConfig(stop_tokens=["two words"]).end_ids(module.model, module.processor)


def test_bad_configurations_are_refused(prompts):
    with pytest.raises(ValueError, match="none of the rewards"):
        make_module(rewards=[PARITY], visual=VisualAttentionReward())
    with pytest.raises(ValueError, match="expected different names"):
        make_module(rewards=[PARITY, PARITY])
    with pytest.raises(ValueError, match=r"grpo\.num_generations=1"):
        GRPOConfig(num_generations=1)
    with pytest.raises(ValueError, match=r"sampling\.temperature=0"):
        SamplingConfig(temperature=0)
    with pytest.raises(ValueError, match="cannot be loaded"):
        make_module(rewards=[RewardConfig("no.such.reward")])
    with pytest.raises(ValueError, match="train_prompts true"):
        fit(make_module(), prompts(train_prompts=False))
