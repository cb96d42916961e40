"""Build a model of the family with random weights, run a batch, compute a loss, and save it in published form."""

import sys
import tempfile

import torch

import phi35
from phi35.parameter_count import count_parameters


def main(folder: str) -> None:
    """The tiny twin of Phi-3.5-MoE; the same lines work with "phi-3.5-moe" where 84 GB are at hand."""
    counts = count_parameters(phi35.create("phi-3.5-moe", device="meta"))
    print(f"phi-3.5-moe: {counts.total:,} parameters, {counts.active:,} active per token")
    model = phi35.create("tiny-phi-3.5-moe", device="cpu", dtype="float32", seed=0)
    ids = torch.randint(0, 1000, (2, 12), generator=torch.Generator().manual_seed(0))
    output = model(input_ids=ids, labels=ids)
    experts = output.router_outputs[0].expert_indices[0].tolist()
    print(f"loss {output.loss.item():.3f}; experts of the first token: {experts}")
    phi35.save(model, None, folder)
    again, _ = phi35.load(folder, device="cpu", dtype="float32")
    print("same logits after save and load:", torch.equal(again.eval()(ids).logits, model.eval()(ids).logits))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
