"""The peers in torch: Hugging Face transformers, and a plain chunked SSD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from benchmarks.machine import cores
from benchmarks.peers import DECODE_STEPS
from benchmarks.torch_ssd import Mamba2LM
from benchmarks.workload import Shape, Weights, published_weights


class TorchPeer:
    """What is the same for every model of the form ``apply(tokens, state) -> logits, state``."""

    model: torch.nn.Module

    def __init__(self, shape: Shape):
        torch.set_num_threads(cores())
        self.shape = shape
        self.model = self.make(published_weights(shape))

    def make(self, weights: Weights) -> torch.nn.Module:
        raise NotImplementedError

    def apply(self, tokens: torch.Tensor, state: Any, last_only: bool) -> tuple[torch.Tensor, Any]:
        """Logits [B, L, V] (or [B, 1, V] of the last token), and the state after it."""
        raise NotImplementedError

    def logits(self, tokens: Int[np.ndarray, "B L"]) -> Float[np.ndarray, "B L V"]:
        with torch.inference_mode():
            return self.apply(_ids(tokens), None, False)[0].numpy()

    def train(self, tokens: Int[np.ndarray, "B L+1"]) -> Callable[[], Any]:
        ids = _ids(tokens)
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

        def call() -> float:
            self.model.train()
            logits, _ = self.apply(ids[:, :-1], None, False)
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return call

    def prefill(self, tokens: Int[np.ndarray, "B L"]) -> Callable[[], Any]:
        ids = _ids(tokens)

        def call() -> None:
            self.model.eval()
            with torch.inference_mode():
                self.apply(ids, None, True)

        return call

    def decode(self, tokens: Int[np.ndarray, "B L"]) -> Callable[[], Any]:
        self.model.eval()
        with torch.inference_mode():
            logits, state = self.apply(_ids(tokens), None, True)

        def call() -> None:
            nonlocal logits, state
            with torch.inference_mode():
                for _ in range(DECODE_STEPS):
                    logits, state = self.apply(logits[:, -1].argmax(-1, keepdim=True), state, True)

        return call


class PlainTorch(TorchPeer):
    """``benchmarks/torch_ssd.py``."""

    def make(self, weights: Weights) -> torch.nn.Module:
        return Mamba2LM(self.shape, weights)

    def apply(self, tokens: torch.Tensor, state: Any, last_only: bool) -> tuple[torch.Tensor, Any]:
        return self.model(tokens, state, last_only)


class Transformers(TorchPeer):
    """``transformers.Mamba2ForCausalLM`` without compiled kernels, which exist for CUDA only."""

    def make(self, weights: Weights) -> torch.nn.Module:
        from transformers import Mamba2Config, Mamba2ForCausalLM

        shape = self.shape
        config = Mamba2Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.d_model,
            num_heads=shape.heads,
            head_dim=shape.headdim,
            state_size=shape.d_state,
            num_hidden_layers=shape.n_layers,
            expand=shape.expand,
            conv_kernel=shape.d_conv,
            n_groups=1,
            chunk_size=shape.chunk_size,
            layer_norm_epsilon=shape.norm_eps,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
        model = Mamba2ForCausalLM(config)
        named = {"backbone.embeddings.weight": "embedding", "backbone.norm_f.weight": "norm"}
        for i in range(shape.n_layers):
            named |= {f"backbone.layers.{i}.{theirs}": f"{i}.{ours}" for theirs, ours in _NAMES.items()}
        tensors = {theirs: torch.tensor(weights[ours]) for theirs, ours in named.items()}
        for name in tensors:
            if name.endswith("conv1d.weight"):
                tensors[name] = tensors[name][:, None]
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"]
        model.load_state_dict(tensors)
        return model

    def apply(self, tokens: torch.Tensor, state: Any, last_only: bool) -> tuple[torch.Tensor, Any]:
        out = self.model(tokens, cache_params=state, use_cache=last_only, logits_to_keep=int(last_only))
        return out.logits, out.cache_params


_NAMES = {
    "norm.weight": "norm",
    "mixer.in_proj.weight": "in_proj",
    "mixer.conv1d.weight": "conv_weight",
    "mixer.conv1d.bias": "conv_bias",
    "mixer.dt_bias": "dt_bias",
    "mixer.A_log": "A_log",
    "mixer.D": "D",
    "mixer.norm.weight": "gate_norm",
    "mixer.out_proj.weight": "out_proj",
}


def _ids(tokens: np.ndarray) -> torch.Tensor:
    return torch.tensor(tokens, dtype=torch.int64)
