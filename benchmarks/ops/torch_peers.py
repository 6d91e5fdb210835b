"""The ops in torch. What needs a GPU is written from its documentation and has not been run here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import torch_ssd

Tensors = dict[str, Tensor]
Shape = dict[str, int]


def ssd(tensors: Tensors, shape: Shape) -> Tensor:
    """One group of B and C."""
    if shape["G"] != 1:
        raise NotImplementedError(f"G = {shape['G']}: only one group of B and C")
    x, dt = tensors["x"], tensors["dt"]
    B, C = tensors["B"][:, :, 0], tensors["C"][:, :, 0]
    start = x.new_zeros(x.shape[0], shape["H"], shape["P"], shape["N"])
    y, _ = torch_ssd.ssd(dt[..., None] * x, dt * tensors["A"], B, C, start, shape["Q"])
    return y + tensors["D"][:, None] * x


def mamba_ssm_ssd(tensors: Tensors, shape: Shape) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    inputs = [tensors[name] for name in ("x", "dt", "A", "B", "C")]
    return mamba_chunk_scan_combined(*inputs, chunk_size=256, D=tensors["D"])


def fla_ssd(tensors: Tensors, shape: Shape) -> Tensor:
    """SSD as gated linear attention: queries C, keys B, values dt x, gates dt A."""
    from fla.ops.simple_gla import chunk_simple_gla

    x, dt = tensors["x"], tensors["dt"]
    heads = shape["H"] // shape["G"]
    B, C = (tensors[name].repeat_interleave(heads, dim=2) for name in ("B", "C"))
    values = (dt[..., None] * x).to(x.dtype)
    y, _ = chunk_simple_gla(C, B, values, dt * tensors["A"], scale=1.0)
    return y + (tensors["D"][:, None] * x).to(y.dtype)


def mamba_ssm_selective_scan(tensors: Tensors, shape: Shape) -> Tensor:
    """Time is the last axis there."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt, B, C = (tensors[name].transpose(1, 2).contiguous() for name in ("x", "dt", "B", "C"))
    return selective_scan_fn(x, dt.to(x.dtype), tensors["A"], B, C, tensors["D"]).transpose(1, 2)


def causal_conv1d(tensors: Tensors, shape: Shape) -> Tensor:
    x, weight = tensors["x"].transpose(1, 2), tensors["weight"].T[:, None]
    padded = F.pad(x, (shape["K"] - 1, 0))
    return F.silu(F.conv1d(padded, weight, tensors["bias"], groups=shape["C"])).transpose(1, 2)


def attention(tensors: Tensors, shape: Shape) -> Tensor:
    q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def long_conv(tensors: Tensors, shape: Shape) -> Tensor:
    u, k, size = tensors["u"], tensors["k"], 2 * shape["L"]
    spectrum = torch.fft.rfft(u, size, dim=1) * torch.fft.rfft(k, size, dim=1).T
    return torch.fft.irfft(spectrum, size, dim=1)[:, : shape["L"]]
