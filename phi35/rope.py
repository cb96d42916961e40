"""Rotary position embeddings (arXiv 2104.09864) with LongRoPE's two factor sets (arXiv 2402.13753).

inv_freq_i = 1 / (factor_i * theta^(2i/d)); cos and sin are multiplied by the attention scaling. The long
factors serve sequences longer than the original length, the short ones all others, and the choice belongs
to each row of a batch (to each sample of a packed row): published implementations choose once for the whole
batch, which changes short rows that happen to stand beside a long one.
"""

import torch

from phi35.config import ModelConfig

CosSin = tuple[torch.Tensor, torch.Tensor]


class RotaryEmbedding:
    """cos and sin for positions, under the factor set of each row.

    Not a module: its tables follow from the config alone, so that no checkpoint, dtype cast or meta device
    can touch them.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.original_length = config.original_max_position_embeddings
        self.switches = config.rope_scaling is not None
        self.scaling = config.rope_attention_scaling
        half = config.attention_head_dim // 2
        scaling = config.rope_scaling
        self._factors = (
            [[1.0] * half] * 2 if scaling is None else [list(scaling.short_factor), list(scaling.long_factor)]
        )
        self._theta = config.rope_theta
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def tables(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Inverse frequencies (2, d/2) and scalings (2,), float32, for (short, long)."""
        if device not in self._tables:
            factors = torch.tensor(self._factors, dtype=torch.float32)
            half = factors.shape[1]
            exponents = torch.arange(0, 2 * half, 2, dtype=torch.int64).to(torch.float32) / (2 * half)
            inv_freq = 1.0 / (factors * self._theta**exponents)
            scaling = torch.tensor(self.scaling, dtype=torch.float32)
            self._tables[device] = (inv_freq.to(device), scaling.to(device))
        return self._tables[device]

    def choose_long(self, lengths: torch.Tensor) -> torch.Tensor:
        """Which rows, or tokens, take the long factors: lengths in tokens of any shape -> bool."""
        if not self.switches:
            return torch.zeros_like(lengths, dtype=torch.bool)
        return lengths > self.original_length

    def __call__(self, position_ids: torch.Tensor, use_long: torch.Tensor, dtype: torch.dtype) -> CosSin:
        """cos and sin.

        Args:
            position_ids: (B, T) int64.
            use_long: (B,) bool, rows under the long factors; or (B, T), tokens of samples under them.
            dtype: of the result; the angles are computed in float32.

        Returns:
            Two tensors (B, 1, T, d).
        """
        inv_freq, scaling = self.tables(position_ids.device)
        row = use_long.long().view(use_long.shape[0], -1)  # (B, 1) or (B, T)
        angles = position_ids[:, None, :, None].float() * inv_freq[row][:, None]
        angles = torch.cat((angles, angles), dim=-1)
        row_scaling = scaling[row][:, None, :, None]
        return (angles.cos() * row_scaling).to(dtype), (angles.sin() * row_scaling).to(dtype)


def apply_rotary(hidden_states: torch.Tensor, cos_sin: CosSin) -> torch.Tensor:
    """Rotate queries or keys (B, H, T, d): element i of the first half pairs with element i of the second."""
    cos, sin = cos_sin
    first, second = hidden_states.chunk(2, dim=-1)
    return hidden_states * cos + torch.cat((-second, first), dim=-1) * sin
