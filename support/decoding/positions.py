"""What the position adds or turns, for every position of a text at once.

Shapes: S positions, D d_model, hd head_dim
"""

import inspect

import torch
from torch import Tensor, nn

Angles = tuple[Tensor, Tensor]  # cosines and sines of the angles by which queries and keys are turned


def position_tables(model: nn.Module, longest: int) -> tuple[Tensor | None, Angles | None]:
    """(what is added to the embedding at each position, (S, D); cosines and sines, (S, hd/2) twice), for the
    first `longest` positions. One of the two is None."""
    # model.py is above this room and cannot be imported here. But the model knows which file it is from.
    functions = inspect.getmodule(type(model))
    c, weight = model.config, model.embed_tokens.weight
    positions = torch.arange(longest, device=weight.device)
    if c.position == "rope":
        return None, functions.rope_tables(positions, c.head_dim, c.rope_theta)
    if c.position == "learned":
        return model.embed_positions.weight[:longest], None
    if c.position == "sinusoidal":
        return functions.sinusoidal_table(positions, c.d_model).to(weight.dtype), None
    raise ValueError(f"position={c.position!r} is unknown to position_tables in {__name__}")
