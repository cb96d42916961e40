"""A loss or gradient that is not finite on one rank: no rank's weights, moments or step counts change."""

import dataclasses

import pytest
import torch
from distributed import run_distributed
from stepped_engines import build_engine, make_steps, state_of

MOE = {"model": "tiny-phi-3.5-moe", "router_aux_loss_coef": 0.01, "router_bias_update_rate": 0.01}


def infinite_loss(engine):
    """From now on the loss is infinite; its gradient is not."""

    def spoil(module, inputs, result):
        loss, output = result
        return loss, dataclasses.replace(output, loss=output.loss + torch.inf)

    return engine.model.register_forward_hook(spoil)


def infinite_gradient(engine):
    """From now on one element of the gradient of the last experts (or of the head) is infinite."""
    parameters = dict(engine.model.named_parameters())
    name = next((name for name in reversed(parameters) if "experts" in name), "lm_head.weight")

    def spoil(grad):
        grad = grad.clone()
        grad.view(-1)[-1] = torch.inf
        return grad

    return parameters[name].register_hook(spoil)


def with_and_without_the_bad_step(rank, world_size, changes):
    """State after steps of which the second is spoilt on rank 1, and after the same steps without the second."""
    other = build_engine(changes)
    make_steps(rank, other, left_out=(1,))
    good, found = state_of(other), []
    for spoil in (infinite_loss, infinite_gradient):
        engine = build_engine(changes)
        norms = []

        def spoilt_step(*arguments, engine=engine, step=engine.step, norms=norms, spoil=spoil):
            hook = spoil(engine) if len(norms) == 1 and rank == 1 else None
            result = step(*arguments)
            norms.append(float(result.gradient_norm))
            if hook is not None:
                hook.remove()
            engine.note_skipped(int(len(norms) == 2))
            return result

        engine.step = spoilt_step
        make_steps(rank, engine)
        bad = state_of(engine)
        found.append((norms, [name for name in good if not torch.equal(bad[name], good[name])]))
    return found, len(good)


CASES = {
    "zero0": {"zero_stage": 0},
    "zero0-unclipped": {"zero_stage": 0, "gradient_clipping": 0.0},
    "zero0-bf16": {"zero_stage": 0, "dtype": "bfloat16"},
    "zero0-bf16-state": {"zero_stage": 0, "dtype": "bfloat16", "optimizer_dtype": "bfloat16"},
    "zero0-muon-bf16": {"zero_stage": 0, "optimizer": "muon", "dtype": "bfloat16"},
    "zero1-bf16": {"zero_stage": 1, "dtype": "bfloat16"},
    "zero2-offload": {"zero_stage": 2, "offload": "optimizer"},
    "zero3-bf16": {"zero_stage": 3, "dtype": "bfloat16"},
    "zero0-ep2": {**MOE, "zero_stage": 0, "ep_size": 2},
    "zero2-ep2-bf16": {**MOE, "zero_stage": 2, "ep_size": 2, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_step_leaves_no_trace(case):
    for found, count in run_distributed(with_and_without_the_bad_step, 2, CASES[case]):
        assert count > 20 and len(found) == 2
        for norms, different in found:
            assert different == []
            finite = torch.isfinite(torch.tensor(norms)).tolist()
            assert finite == [True, False, True, True]
