"""A model under DeepSpeed: sharding of experts, optimizer, ZeRO, and a gradient norm that is exact everywhere."""

import contextlib
import io
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import distributed, nn

from phi35.outputs import CausalLMOutput
from phi35.registry import resolve
from phi35.training.acceleration import accelerate, fast_attention
from phi35.training.average import WeightAverage
from phi35.training.config import TrainingConfig
from phi35.training.deepspeed_config import handed_over, merge, to_deepspeed
from phi35.training.environment import Environment
from phi35.training.flat_layout import pieces_of
from phi35.training.gradient_norm import GradientNorm
from phi35.training.gradient_sum import sum_gradients
from phi35.training.loss import auxiliary_losses
from phi35.training.mixed_precision import MixedPrecisionAdamW, build_optimizer
from phi35.training.objective import TokenObjective
from phi35.training.optimizers import MuonWithAdamW
from phi35.training.parameter_groups import part_rates
from phi35.training.routing import BiasBalancer
from phi35.training.schedule import learning_rate_factor
from phi35.training.sequence import share_rows
from phi35.training.update_guard import UpdateGuard, is_applied, poisoned


@dataclass
class StepResult:
    """What one optimizer step gives, as tensors still on the device.

    Attributes:
        loss: this rank's share of the global mean loss per token (the ranks' shares add up to it).
        auxiliary: this rank's mean of each router loss over its micro-batches, unweighted.
        gradient_norm: global norm before clipping; a float where DeepSpeed computed it on the host. Where it is not
            finite, the step changed nothing.
        outputs: the model's outputs, one per micro-batch, without graphs.
        numbers: what the objective shows besides: ranks' mean is that over the global batch.
    """

    loss: torch.Tensor
    auxiliary: dict[str, torch.Tensor]
    gradient_norm: torch.Tensor | float | None
    outputs: list[CausalLMOutput]
    numbers: dict[str, torch.Tensor] = field(default_factory=dict)


class Engine:
    """DeepSpeed's engine around a ``CausalLM``, driven one optimizer step at a time.

    Args:
        model: whole model on this rank, with frozen parameters marked and weights loaded.
        config: resolved training config.
        environment: this process's place.
        deepspeed_file: additions from a ready DeepSpeed JSON file.

    Attributes:
        learning_rates: present rate of every part of the model that is trained.
        average: of the weights, where the config asks for one.
        objective: what is minimised: the label tokens' mean cross-entropy, or what takes its place.

    Raises:
        ValueError: if the DeepSpeed file contradicts the config.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        environment: Environment,
        deepspeed_file: dict[str, Any] | None = None,
    ) -> None:
        import deepspeed

        self.config, self.environment, self.model = config, environment, model
        self.objective: Any = TokenObjective()
        self.sequence_parallel = share_rows(model, config, environment)
        self.deepspeed_config = to_deepspeed(config, environment.world_size, environment.device.type)
        if deepspeed_file:
            self.deepspeed_config = merge(self.deepspeed_config, deepspeed_file)
        model.to(environment.device)
        accelerate(model, config, environment.device)
        optimizer = build_optimizer(model, config, environment.world_size)
        if config.zero_stage == 3:
            _gather_whole_sparse_layers(model)
        # A tuple is what DeepSpeed looks into for the tensors whose gradients announce the backward pass.
        model.register_forward_hook(lambda module, _, output: (output.loss, output) if module.training else output)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory reports that nobody asked for
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                config=handed_over(self.deepspeed_config),
                dist_init_required=False,
            )
        self.base_optimizer = optimizer
        if isinstance(optimizer, MuonWithAdamW) and config.zero_stage:
            optimizer.attach(pieces_of(self.optimizer, config.zero_stage, optimizer), environment.device)
        if config.zero_stage == 0:
            self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            # DeepSpeed's own clipping averages the ranks' norms of the experts.
            self.deepspeed.clip_fp32_gradients = lambda: None
            self._norm = GradientNorm(self._trained, ahead=environment.world_size == 1)
            self._guard = UpdateGuard(optimizer, self._trained, config.gradient_clipping, self._norm)
            self.deepspeed.zero_grad = self._zero_grad
            self.deepspeed.enable_backward_allreduce = False  # it would copy every gradient twice
        self.average: WeightAverage | None = None
        if config.ema_decay:
            assert config.zero_stage is not None
            pieces = pieces_of(self.optimizer, config.zero_stage, optimizer)
            self.average = WeightAverage(pieces, self.optimizer, config.zero_stage, optimizer, config.ema_decay)
        self._peaks = part_rates(model, config)
        self.learning_rates = dict(self._peaks)
        self.balancer = BiasBalancer(model, config.router_bias_update_rate, environment.world_size)
        model.train()

    def set_learning_rate(self, step: int) -> float:
        """Applies the schedule to every group; returns the decoder's rate, or the first group's."""
        config = self.config
        factor = learning_rate_factor(
            step,
            schedule=config.schedule,
            total_steps=config.max_steps,
            warmup_steps=config.warmup_steps,
            decay_steps=config.decay_steps,
            floor=config.min_lr_ratio,
        )
        for group in self.base_optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.learning_rates = {part: peak * factor for part, peak in self._peaks.items()}
        return config.learning_rate * factor

    def step(
        self, batches: list[dict[str, torch.Tensor]], num_tokens: list[int], global_num_tokens: torch.Tensor | int
    ) -> StepResult:
        """Forward and backward over this rank's micro-batches, then one update.

        A token weighs the same wherever it stands: a micro-batch's mean counts with its part of the global
        batch's tokens, so that the gradient depends neither on the micro-batch size nor on the number of ranks.

        Args:
            batches: micro-batches on the device, ``gradient_accumulation_steps`` of them.
            num_tokens: label tokens (or whatever the objective counts) of each.
            global_num_tokens: those of the global batch over all ranks, at least 1.
        """
        world_size, count = self.environment.world_size, len(batches)
        config = self.config
        weights = {"balance": config.router_aux_loss_coef or 0.0, "z": config.router_z_loss_coef}
        total: torch.Tensor | None = None
        auxiliary: dict[str, torch.Tensor] = {}
        numbers: dict[str, torch.Tensor] = {}
        outputs: list[CausalLMOutput] = []
        for batch, tokens in zip(batches, num_tokens, strict=True):
            # Around the backward pass too: a recomputed layer must take the kernel whose outputs were kept.
            with fast_attention(self.environment.device):
                batch = self.objective.prepare(self.model, batch)
                self.objective.start(self.model)
                _, output = self.deepspeed(**self.objective.inputs(batch))
                mean, shown = self.objective.loss(output, batch)
                share = mean * (tokens / global_num_tokens)
                for name, value in shown.items():
                    part = value.detach() * (tokens * world_size / global_num_tokens)
                    numbers[name] = numbers.get(name, 0.0) + part
                # DeepSpeed averages gradients over ranks, so that the ranks' shares need the factor to add up.
                objective = share * world_size
                group = distributed.group.WORLD if world_size > 1 else None
                losses = auxiliary_losses(output, batch.get("attention_mask"), process_group=group, **weights)
                for name, value in losses.items():
                    objective = objective + value * (weights[name] / count)
                    auxiliary[name] = auxiliary.get(name, 0.0) + value.detach() / count
                if config.zero_stage == 0:
                    objective = objective / world_size  # gradients are added, not averaged
                    if len(outputs) == count - 1:
                        self._norm.watch()
                self.deepspeed.backward(poisoned(objective), scale_wrt_gas=False)
            if config.zero_stage == 0 and world_size > 1 and self.deepspeed.is_gradient_accumulation_boundary():
                sum_gradients(self._trained)
            self.deepspeed.step()
            total = share.detach() if total is None else total + share.detach()
            outputs.append(_detached(output))
        assert total is not None
        norm = self._gradient_norm()
        if self.average is not None:
            self.average.update()
        self.balancer.update(outputs, [batch.get("attention_mask") for batch in batches], is_applied(norm))
        return StepResult(total, auxiliary, norm, outputs, numbers)

    def note_skipped(self, num_steps: int) -> None:
        """Takes steps that changed nothing out of the step counts that are kept on the host."""
        if isinstance(self.base_optimizer, MixedPrecisionAdamW):
            self.base_optimizer.take_back(num_steps)

    def _gradient_norm(self) -> torch.Tensor | float | None:
        if self.config.zero_stage == 0:
            return self._guard.gradient_norm
        return getattr(self.deepspeed, "_global_grad_norm", None)

    def _zero_grad(self) -> None:
        """DeepSpeed's own walks over the whole module tree at every step."""
        for parameter in self._trained:
            parameter.grad = None


def _gather_whole_sparse_layers(model: Any) -> None:
    """ZeRO-3 fetches a sparse layer as one unit: which experts run, and in what order, differs from rank to rank."""
    from deepspeed.utils import set_z3_leaf_modules

    classes = {type(model.model.layers[layer].mlp) for layer in model.config.sparse_layers}
    if classes:
        set_z3_leaf_modules(model, list(classes))


def shard_experts(model: nn.Module, config: TrainingConfig) -> None:
    """Leaves this rank its part of the experts (``ep_size`` > 1), in place."""
    if config.ep_size is not None and config.ep_size > 1:
        resolve("moe.expert_parallel:shard")(model, config.ep_size, config.ep_chunks)


def _detached(output: CausalLMOutput) -> CausalLMOutput:
    """Routing without graphs and without the (B, T, D) states, for the metrics."""
    routing = tuple(
        type(one)(one.logits.detach(), one.expert_indices, one.expert_weights.detach()) for one in output.router_outputs
    )
    return CausalLMOutput(router_outputs=routing)
