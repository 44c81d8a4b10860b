"""What the rules of eager mode share: see ``rules``."""

from __future__ import annotations

import torch
from torch import Tensor


class Whole(Exception):
    """A call that no rule takes apart: it stays ATen's, for the reason that this tells."""


def wide(x: Tensor) -> Tensor:
    """x in the dtype that ATen adds it up in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
