"""Sums of squares of gradients, left on a parameter by the operation that makes its gradient.

A kernel that holds a gradient in registers can add up its squares there; whoever wants the norm of all gradients then
need not read them again. Nothing is left where nobody asked.
"""

import torch

ATTRIBUTE = "squares_of_gradient"


def ask(parameter: torch.Tensor) -> None:
    """Ask for the squares of the gradient that the next backward pass gives a parameter."""
    setattr(parameter, ATTRIBUTE, [])


def are_wanted(parameter: torch.Tensor) -> bool:
    """Whether ``ask`` was called; never while torch.compile traces."""
    return not torch.compiler.is_compiling() and getattr(parameter, ATTRIBUTE, None) is not None


def offer(parameter: torch.Tensor, squares: torch.Tensor) -> None:
    """Leave partial sums of the squares of one contribution to a gradient; of none, if the tensor is empty."""
    if squares.numel() and are_wanted(parameter):
        getattr(parameter, ATTRIBUTE).append(squares)


def take(parameter: torch.Tensor) -> torch.Tensor | None:
    """The sum of squares, a float32 scalar, and an end of asking; None where it is not known.

    Several contributions are no use: the square of their sum is another.
    """
    offers = getattr(parameter, ATTRIBUTE, None)
    setattr(parameter, ATTRIBUTE, None)
    return offers[0].sum() if offers and len(offers) == 1 else None
