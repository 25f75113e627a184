"""GRPO with visual-anchored reward shaping, as a LightningModule."""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from avar_lightning.attention import observe_attention
from avar_lightning.data.collate import SampleEncoder, has_image
from avar_lightning.grpo.config import GRPOConfig
from avar_lightning.grpo.policy import completion_batch, completion_logps
from avar_lightning.grpo.rollouts import Rollouts, padded
from avar_lightning.grpo.trend import Trend
from avar_lightning.losses import group_advantages, grpo_loss, importance_weights
from avar_lightning.model import VLMConfig
from avar_lightning.module import OptimizerConfig, VLMModule, as_config
from avar_lightning.processing import padding_id, tokenizer_of
from avar_lightning.rewards import RewardConfig, VisualAttentionReward, call_rewards, total_reward
from avar_lightning.roles import Role
from avar_lightning.rollout import HFRolloutEngine, Prompts, RolloutEngine, SamplingConfig
from avar_lightning.rollout.hf_engine import evaluating
from avar_lightning.scoring import ScoringConfig
from avar_lightning.sharding import clip_gradients
from avar_lightning.vas import visual_attention_score

DEFAULT_REWARDS = (
    RewardConfig("avar_lightning.rewards.accuracy_reward", 1.0),
    RewardConfig("avar_lightning.rewards.format_reward", 0.1),
)
# Batches in a row without a group to learn from after which a warning is due.
PATIENCE = 10


class GRPOModule(VLMModule):
    """Fine-tune a Hugging Face vision-language model on prompts, by the rewards of its own completions.

    Batches are prompts (`ShardDataModule` with `train_prompts`). Each is answered `grpo.num_generations` times; rewards
    are compared within these groups, and the policy is updated once or several times. The visual reward is measured in
    the pass over the completions that gives their log-probabilities.

    Logs `reward/<part>`, `reward/total`, `rollout/…` (length, truncated, empty, groups_without_variance, vas,
    sampler_mismatch), `train/…` (loss, kl, entropy, clip_fraction_low, clip_fraction_high, grad_norm, …) and `time/…`
    (seconds of each stage); in validation `val/loss` of reference responses and `val/accuracy` of greedy answers.

    Args:
        vlm: Which model, and how to load it; usually the Hugging Face folder that SFT wrote.
        grpo: Groups, updates and the policy loss.
        sampling: How completions are sampled.
        rewards: Parts of the reward and their weights; accuracy (1) and format (0.1) when unset. Each function is given
            the completions and `prompts` as chat messages, `completion_ids`, and every column of the data set.
        visual: The visual part (VARS), 0 for answers that the part `accuracy` does not find right; none when unset.
        rollout: What samples completions; the model itself when unset. Not kept in checkpoints.
        optimizer: AdamW and its schedule.
        max_new_tokens: Longest greedy answer in validation to measure `val/accuracy`; 0 generates nothing.
        scoring: How log-probabilities are computed without holding all logits.
    """

    stage = "grpo"

    def __init__(
        self,
        vlm: VLMConfig | None = None,
        grpo: GRPOConfig | None = None,
        sampling: SamplingConfig | None = None,
        rewards: list[RewardConfig] | None = None,
        visual: VisualAttentionReward | None = None,
        rollout: RolloutEngine | None = None,
        optimizer: OptimizerConfig | None = None,
        max_new_tokens: int = 0,
        scoring: ScoringConfig | None = None,
    ) -> None:
        super().__init__(vlm, optimizer, max_new_tokens, scoring)
        self.automatic_optimization = False
        self.grpo = as_config(GRPOConfig, grpo)
        self.sampling = as_config(SamplingConfig, sampling)
        self.rewards = [as_config(RewardConfig, reward) for reward in rewards or DEFAULT_REWARDS]
        self.visual = None if visual is None else as_config(VisualAttentionReward, visual)
        self.engine: RolloutEngine = rollout or HFRolloutEngine()
        self.functions = {reward.name: reward.load() for reward in self.rewards}
        self.weights = {reward.name: reward.weight for reward in self.rewards}
        if len(self.functions) < len(self.rewards) or {"visual", "total"} & self.functions.keys():
            raise ValueError(
                f"rewards are named {[reward.name for reward in self.rewards]}, expected different names, none of them "
                "'visual' or 'total'; give them a `name`."
            )
        if self.visual is not None:
            if "accuracy" not in self.functions:
                raise ValueError(
                    f"visual rewards right answers only, and none of the rewards {sorted(self.functions)} is named "
                    "'accuracy'; add it, or name yours so."
                )
            self.weights["visual"] = self.visual.weight
        self.save_configuration(
            grpo=asdict(self.grpo),
            sampling=asdict(self.sampling),
            rewards=[reward.as_plain for reward in self.rewards],
            visual=None if self.visual is None else asdict(self.visual),
        )
        self.rollouts: Rollouts | None = None
        """Of the last batch; for callbacks."""
        self._synced: int | None = None  # the step whose weights the engine has
        self._idle = 0  # batches in a row without a group to learn from
        self._trend = Trend()
        # In a list, which hides it from checkpoints: it is loaded again from where it came from.
        self._reference: list[nn.Module] = []
        self.seed = self.sampling.seed

    # Set-up

    def configure_model(self) -> None:
        """Load the policy, and beside it a frozen copy where the KL needs one."""
        super().configure_model()
        if self.grpo.beta and self.vlm.lora is None and not self._reference:
            self._reference = [self._frozen_copy()]

    def _frozen_copy(self) -> nn.Module:
        if self.device_mesh is None:
            return copy.deepcopy(self.model).eval().requires_grad_(False)
        reference: nn.Module = self.load().eval().requires_grad_(False)  # what FSDP2 shares cannot be copied whole
        with torch.no_grad():
            for theirs, ours in zip(reference.parameters(), self.model.parameters(), strict=True):
                theirs.copy_(ours)
        return reference

    def on_fit_start(self) -> None:
        """Set the engine up, and refuse what manual optimisation cannot do."""
        if isinstance(self.trainer.strategy, FSDPStrategy):
            raise ValueError(
                "trainer.strategy is FSDPStrategy (FSDP1), which cannot go through several forwards and backwards in "
                "one step; use fsdp2, or ddp."
            )
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            raise ValueError("trainer.precision is 16-mixed, expected bf16-mixed, bf16-true or 32-true for GRPO.")
        if any(p.requires_grad and p.dtype != torch.float32 for p in self.model.parameters()):
            rank_zero_warn(
                "Weights that train are not float32, so updates as small as those of reinforcement learning are "
                "rounded away; set vlm.dtype to float32 and trainer.precision to bf16-mixed."
            )
        if self.device_mesh is None:
            for reference in self._reference:
                reference.to(self.device)
        self.engine.setup(self.model, self.processor, self.sampling)

    def on_fit_end(self) -> None:
        """Let the engine go."""
        self.engine.teardown()

    def on_exception(self, exception: BaseException) -> None:
        """Let the engine go."""
        self.engine.teardown()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was watched."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["watched"] = {"idle": self._idle, "first": self._trend.first, "last": list(self._trend.last)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what was watched."""
        super().on_load_checkpoint(checkpoint)
        watched = checkpoint.get("watched", {})
        self._idle, self._trend.first = watched.get("idle", 0), watched.get("first", [])
        self._trend.last.extend(watched.get("last", []))

    @property
    def updates_per_batch(self) -> int:
        """Several."""
        return self.grpo.updates_per_batch

    def num_optimizer_steps(self) -> float:
        """Updates of the whole training, several a batch."""
        steps, limit = super().num_optimizer_steps() * self.updates_per_batch, self.trainer.max_steps
        return min(steps, limit) if limit > 0 else steps

    @property
    def trend(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means of `reward/…` and `rollout/…` over the first and over the last batches of this training."""
        return self._trend.means()

    # One batch of prompts

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Sample, reward, score and learn from the completions of one batch of prompts."""
        if "rows" not in batch:
            raise ValueError(
                f"A training batch has {sorted(batch)}, expected prompts (rows, columns, messages, images); set "
                "--data.init_args.train_prompts true."
            )
        self._seconds: dict[str, float] = {}
        with self._timed("rollout"):
            rollouts = self._sample(Prompts(batch["rows"], batch["messages"], batch["images"]), batch["columns"])
        with self._timed("reward"):
            rollouts.rewards = self._judge(rollouts)
        with self._timed("score"):
            self._measure(rollouts, measure_vas=self._is_due(batch_idx))
        self._compare(rollouts)
        with self._timed("update"):
            logs = self._learn(rollouts)
        self.rollouts = rollouts
        described = self._describe(rollouts)
        self._trend.add(described)
        logs |= {f"time/{name}_s": value for name, value in self._seconds.items()}
        size = len(rollouts.prompts)
        self.log_dict(logs, batch_size=size, sync_dist=True)
        # Already the same in every process.
        self.log("reward/total", described["reward/total"], prog_bar=True, batch_size=size)
        others = {name: value for name, value in described.items() if name != "reward/total" and math.isfinite(value)}
        self.log_dict(others, batch_size=size)

    def _sample(self, prompts: Prompts, columns: Sequence[Mapping[str, Any]]) -> Rollouts:
        if self._synced != self.global_step:
            self.engine.sync(self.global_step)
            self._synced = self.global_step
        count = self.grpo.num_generations
        completions = self.engine.generate(prompts, count, seed=self.rng.getrandbits(31))
        texts = tokenizer_of(self.processor).batch_decode(completions.token_ids, skip_special_tokens=True)
        return Rollouts.of(prompts, columns, count, completions, texts)

    def _judge(self, rollouts: Rollouts) -> dict[str, list[float]]:
        # Prompts are chats, and completions of chats are messages, as TRL hands them over.
        completions = [[{"role": "assistant", "content": text}] for text in rollouts.texts]
        return call_rewards(self.functions, completions, rollouts.by_column())

    @torch.no_grad()
    def _measure(self, rollouts: Rollouts, *, measure_vas: bool) -> None:
        """One pass over the completions: log-probabilities where a later update or a sampler needs them, attention."""
        observing = rollouts.observed = measure_vas or self.visual is not None
        needs_old = self.grpo.updates_per_batch > 1 or rollouts.sampling_logps is not None
        if observing or needs_old:
            scored = self._pass_over(rollouts, self.model, observing=observing)
            rollouts.old_logps = scored if needs_old else None
        if self.grpo.beta:
            with self._as_reference() as reference:
                rollouts.ref_logps = self._pass_over(rollouts, reference, observing=False)

    def _pass_over(self, rollouts: Rollouts, model: Any, *, observing: bool) -> list[Tensor]:
        logps: list[Tensor] = [torch.zeros(0)] * len(rollouts)
        layers = None if self.visual is None else self.visual.layers
        with evaluating(model):
            for chunk in self._chunks(rollouts, range(len(rollouts))):
                batch = self._batch(rollouts, chunk)
                watch: AbstractContextManager[Any] = nullcontext()
                if observing:
                    watch = observe_attention(model, batch.role_ids, queries=(Role.RESPONSE,), layers=layers)
                with watch as record:
                    values, _ = completion_logps(
                        model, batch, temperature=self.sampling.temperature, scoring=self.scoring
                    )
                for index, row, mask in zip(chunk, values, batch.completion_mask):
                    logps[index] = row[mask]
                if observing:
                    masses = record.mass_of(Role.IMAGE), record.mass_of(Role.SYSTEM), record.query_mask(Role.RESPONSE)
                    found = [visual_attention_score(*masses, reduction="ratio_of_means").tolist()]
                    found.append(found[0] if self.visual is None else self.visual.measure(*masses).tolist())
                    for index, vas, attention in zip(chunk, *found):
                        rollouts.vas[index], rollouts.attention[index] = vas, attention
        return logps

    @contextmanager
    def _as_reference(self) -> Iterator[Any]:
        """The starting model: the frozen copy, or the policy without its adapters."""
        if self.vlm.lora is None:
            yield self._reference[0]
        else:
            adapted: Any = self.model
            with adapted.disable_adapter():
                yield adapted

    def _compare(self, rollouts: Rollouts) -> None:
        """Add up rewards, stop where they make no sense, and compare within groups."""
        if self.visual is not None:
            rollouts.rewards["visual"] = self.visual(
                rollouts.texts,
                accuracy=rollouts.rewards["accuracy"],
                visual_attention=rollouts.attention,
                num_generations=rollouts.num_generations,
            )
        rollouts.total = total_reward(rollouts.rewards, self.weights)
        worst = max(rollouts.total, key=abs)
        if not abs(worst) <= self.grpo.max_reward:
            parts = {name: values[rollouts.total.index(worst)] for name, values in rollouts.rewards.items()}
            raise ValueError(
                f"A total reward is {worst:g} (parts {parts}), beyond grpo.max_reward={self.grpo.max_reward:g}; bound "
                "the reward (visual.transform: share), lower its weight, or raise max_reward."
            )
        rollouts.advantages, rollouts.differ = group_advantages(
            torch.tensor(rollouts.total), rollouts.num_generations, scale=self.grpo.scale_advantages
        )
        self._idle = 0 if rollouts.differ.any() else self._idle + 1
        if self._idle == PATIENCE:
            rank_zero_warn(
                f"No group of {PATIENCE} batches in a row had completions of different reward (mean "
                f"{sum(rollouts.total) / len(rollouts):.3g}), so nothing was learned; raise sampling.temperature or "
                "grpo.num_generations, or choose prompts that are neither too easy nor too hard."
            )

    # Updates

    def _learn(self, rollouts: Rollouts) -> dict[str, float]:
        """All updates of one batch; gives the means over them of what is watched."""
        logs: dict[str, list[float]] = defaultdict(list)
        for _ in range(self.grpo.num_epochs):
            order = self.rng.sample(range(len(rollouts)), len(rollouts))
            for part in range(self.grpo.num_minibatches):
                for name, value in self._update(rollouts, order[part :: self.grpo.num_minibatches]).items():
                    logs[name].append(value)
        return {f"train/{name}": sum(values) / len(values) for name, values in logs.items()}

    def _update(self, rollouts: Rollouts, indices: Sequence[int]) -> dict[str, float]:
        """One optimizer step on some of the completions."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        # Without a KL a completion whose advantage is 0 adds exactly nothing, so it is not computed.
        kept = [i for i in indices if (self.grpo.beta or rollouts.advantages[i] != 0) and self._counts(rollouts, i)]
        # Gradients are averaged over processes, so sums are divided by the mean number of what they are sums of.
        sizes = [len(indices), sum(len(rollouts.token_ids[i]) for i in indices if self._counts(rollouts, i))]
        num_completions, num_tokens = self._over_processes(sizes, "mean")
        chunks = self._chunks(rollouts, kept)
        logs: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        for number, chunk in enumerate(chunks):
            filled = self._filled(chunk)
            batch = self._batch(rollouts, chunk)
            logps, entropy = completion_logps(
                self.model, batch, temperature=self.sampling.temperature, with_entropy=True, scoring=self.scoring
            )
            assert entropy is not None
            # Without the row that is there for its image alone.
            logps, entropy, mask = logps[: len(filled)], entropy[: len(filled)], batch.completion_mask[: len(filled)]
            old = logps.detach() if rollouts.old_logps is None else padded(_at(rollouts.old_logps, filled), logps)
            out = grpo_loss(
                logps,
                old,
                rollouts.advantages[filled].to(logps.device) * bool(chunk),
                mask,
                loss_type=self.grpo.loss_type,
                clip_low=self.grpo.clip_low,
                clip_high=self.grpo.clip_high,
                beta=self.grpo.beta,
                ref_per_token_logps=None if not rollouts.ref_logps else padded(_at(rollouts.ref_logps, filled), logps),
                weights=self._weights(rollouts, filled, old, mask),
                num_completions=num_completions,
                num_tokens=num_tokens,
                max_length=self.sampling.max_new_tokens,
            )
            with self._without_sync(number + 1 < len(chunks)):
                self.manual_backward(out.loss)
            logs["loss"] += out.loss.detach()
            logs["entropy"] += (entropy * mask).sum()
            logs["tokens"] += out.num_tokens
            for name in ("kl", "clip_fraction_low", "clip_fraction_high"):
                logs[name] += getattr(out, name) * out.num_tokens
        # Of all processes, which have different numbers of tokens, and perhaps none.
        values = dict(zip(logs, self._over_processes([float(value.detach()) for value in logs.values()], "sum")))
        tokens, loss = values.pop("tokens", 0.0), values.pop("loss", 0.0)
        values = {name: value / max(tokens, 1.0) for name, value in values.items()}
        values["loss"] = loss / self.trainer.world_size
        values["grad_norm"] = self._step(optimizer)
        return values

    def _step(self, optimizer: Any) -> float:
        """Clip and apply the gradients; gives their norm."""
        trained = (parameter for parameter in self.parameters() if parameter.requires_grad)
        value = clip_gradients(trained, self.trainer.strategy.model, self.grpo.max_grad_norm or math.inf)
        if not math.isfinite(value):
            raise ValueError(
                f"The gradient's norm is {value} in step {self.global_step}, expected a finite one; lower optimizer.lr "
                "or the rewards' weights, and resume from the last checkpoint."
            )
        optimizer.step()
        schedule: Any = self.lr_schedulers()
        schedule.step()
        # Casts that autocast keeps of the old weights must not serve the next forward of this step.
        torch.clear_autocast_cache()
        return value

    def _weights(self, rollouts: Rollouts, chunk: Sequence[int], old: Tensor, mask: Tensor) -> Tensor | None:
        if rollouts.sampling_logps is None:
            return None
        theirs = padded(_at(rollouts.sampling_logps, chunk), old)
        return importance_weights(old, theirs, mask, level=self.grpo.importance, cap=self.grpo.importance_cap)

    def _counts(self, rollouts: Rollouts, index: int) -> bool:
        """Whether a completion is learned from."""
        return bool(len(rollouts.token_ids[index])) and (rollouts.finished[index] or not self.grpo.mask_truncated)

    # Forwards of some completions, equally many in every process

    def _chunks(self, rollouts: Rollouts, indices: Sequence[int]) -> list[list[int]]:
        size = self.grpo.micro_batch_size
        (most,) = self._over_processes([math.ceil(len(indices) / size)], "max")
        return rollouts.chunks(indices, size, int(most))

    def _batch(self, rollouts: Rollouts, chunk: Sequence[int]) -> Any:
        """The chunk as a batch; an empty one is the first completion with nothing that counts."""
        indices = self._filled(chunk)
        tokens = _at(rollouts.token_ids, indices)
        rows = [rollouts.row(index) for index in indices]
        # The others' forwards go through the vision tower, and wait for this one there.
        fills = self.trainer.world_size > 1 and not any(map(has_image, rows))
        if fills:
            rows, tokens = [*rows, self._filler], [*tokens, tokens[0][:0]]
        batch = completion_batch(rows, tokens, pad_token_id=padding_id(self.processor), device=self.device)
        if fills:
            batch.role_ids[-1] = int(Role.OTHER)
        if not chunk:
            batch.completion_mask = torch.zeros_like(batch.completion_mask)
        return batch

    @cached_property
    def _filler(self) -> Mapping[str, Tensor]:
        return SampleEncoder(self.processor, prompt_only=True).filler().prompt_row

    @staticmethod
    def _filled(chunk: Sequence[int]) -> list[int]:
        return list(chunk) or [0]

    def _over_processes(self, values: Sequence[float], how: str) -> list[float]:
        tensor = torch.tensor(list(values), dtype=torch.float64 if self.device.type == "cpu" else torch.float32)
        return self.over_processes(tensor.to(self.device), how).tolist()

    def _without_sync(self, yes: bool) -> AbstractContextManager[Any]:
        """Keep gradients to this process until the last part of an update."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return block() if yes and block is not None else nullcontext()

    # What is said about a batch

    def _describe(self, rollouts: Rollouts) -> dict[str, float]:
        """Means over the completions of all processes, of what is known of each; NaN where nothing is."""
        values = rollouts.values()
        known = [[value for value in own if math.isfinite(value)] for own in values.values()]
        sums = self._over_processes([math.fsum(own) for own in known], "sum")
        counts = self._over_processes([len(own) for own in known], "sum")
        return {name: total / count if count else math.nan for name, total, count in zip(values, sums, counts)}

    def _is_due(self, batch_idx: int) -> bool:
        return self.grpo.vas_every > 0 and batch_idx % self.grpo.vas_every == 0

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[stage] = time.perf_counter() - start


def _at(values: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
    return [values[index] for index in indices]
