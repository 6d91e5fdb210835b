"""A plain Mamba-2 language model in torch: the equations of arXiv:2405.21060, section 6, chunk by chunk.

What a careful user would write for a CPU without further tuning: C.B is computed once per chunk for all heads
(one group), the masked decays in one block per chunk, and the states pass from chunk to chunk in a loop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workload import Shape, Weights

State = list[tuple[Tensor, Tensor]]  # by layer: last inputs of the convolution [B, C, K-1], S [B, H, P, N]


class Mamba2LM(nn.Module):
    """``logits, state = lm(tokens, state)``; ``state`` None starts from nothing."""

    def __init__(self, shape: Shape, weights: Weights):
        super().__init__()
        self.shape = shape
        # torch does not allow dots in names of parameters.
        named = {name.replace(".", "/"): torch.tensor(value) for name, value in weights.items()}
        self.weights = nn.ParameterDict({name: nn.Parameter(value) for name, value in named.items()})

    def forward(
        self, tokens: Tensor, state: State | None = None, last_only: bool = False
    ) -> tuple[Tensor, State]:
        """tokens [B, L] to logits [B, L, V] (or [B, 1, V]) and the state after the last token."""
        x, after = self.weights["embedding"][tokens], []
        for i in range(self.shape.n_layers):
            y, layer_state = self._mix(i, self._norm(x, f"{i}/norm"), None if state is None else state[i])
            x = x + y
            after.append(layer_state)
        x = self._norm(x[:, -1:] if last_only else x, "norm")
        return x @ self.weights["embedding"].T, after

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[name], self.shape.norm_eps)

    def _mix(self, i: int, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple]:
        s, w = self.shape, {name: self.weights[f"{i}/{name}"] for name in _LAYER}
        batch, length, _ = x.shape
        z, xBC, dt = (x @ w["in_proj"].T).split([s.d_inner, s.d_inner + 2 * s.d_state, s.heads], dim=-1)
        xBC = xBC.transpose(1, 2)
        if state is None:
            past, S = xBC.new_zeros(batch, xBC.shape[1], s.d_conv - 1), None
        else:
            past, S = state
        extended = torch.cat([past, xBC], dim=2)
        xBC = F.silu(F.conv1d(extended, w["conv_weight"][:, None], w["conv_bias"], groups=xBC.shape[1]))
        u, B, C = xBC.transpose(1, 2).split([s.d_inner, s.d_state, s.d_state], dim=-1)
        u = u.reshape(batch, length, s.heads, s.headdim)
        dt = F.softplus(dt + w["dt_bias"])
        S = u.new_zeros(batch, s.heads, s.headdim, s.d_state) if S is None else S
        y, S = ssd(u * dt[..., None], dt * -torch.exp(w["A_log"]), B, C, S, s.chunk_size)
        y = (y + u * w["D"][:, None]).reshape(batch, length, s.d_inner)
        y = self._norm(y * F.silu(z), f"{i}/gate_norm")
        return y @ w["out_proj"].T, (extended[:, :, length:], S)


_LAYER = ("in_proj", "conv_weight", "conv_bias", "dt_bias", "A_log", "D", "out_proj")


def ssd(u: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, S: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay_t) S_{t-1} + u_t B_t^T, y_t = S_t C_t, in chunks.

    Args:
        u: [B, L, H, P], log_decay: [B, L, H], B, C: [B, L, N], S: state before the first token [B, H, P, N].

    Returns:
        y [B, L, H, P] and the state after the last token.
    """
    if u.shape[1] == 1:
        S = torch.exp(log_decay[:, 0])[..., None, None] * S + u[:, 0, :, :, None] * B[:, 0, None, None, :]
        return (S @ C[:, 0, None, :, None]).squeeze(-1)[:, None], S
    outputs = []
    for one in zip(*(t.split(chunk, dim=1) for t in (u, log_decay, B, C))):
        y, S = _chunk(S, *one)
        outputs.append(y)
    return torch.cat(outputs, dim=1), S


def _chunk(S: Tensor, u: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`ssd` of Q tokens at once, whose masked decays are [B, H, Q, Q]."""
    alpha = log_decay.cumsum(1).transpose(1, 2)  # [B, H, Q]
    later = torch.ones(alpha.shape[-1:] * 2, dtype=torch.bool).triu(1)
    within = (alpha[..., :, None] - alpha[..., None, :]).masked_fill(later, -torch.inf).exp()
    u = u.transpose(1, 2)  # [B, H, Q, P]
    y = ((C @ B.transpose(1, 2))[:, None] * within) @ u
    y = y + alpha.exp()[..., None] * (C[:, None] @ S.transpose(2, 3))
    to_end = (alpha[..., -1:] - alpha).exp()[..., None]
    S = alpha[..., -1].exp()[..., None, None] * S + (u * to_end).transpose(2, 3) @ B[:, None]
    return y.transpose(1, 2), S
