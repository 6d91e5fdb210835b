"""The peers in JAX: this repository, and the package mamba2-jax."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float, Int

from benchmarks.peers import DECODE_STEPS
from benchmarks.workload import Shape, build, published_weights
from eval.decode import taken_apart
from models.loss import chunked_cross_entropy
from runtime.optimizer import OptimConfig, make_optimizer
from runtime.schedule import ScheduleConfig
from runtime.state import init_state
from runtime.step import make_train_step


class JaxPeer:
    """What is the same for every model of the form ``apply(params, tokens, state) -> logits, state``."""

    params: Any
    shape: Shape

    def apply(self, params: Any, tokens: jax.Array, state: Any, last_only: bool) -> tuple[jax.Array, Any]:
        """Logits [B, L, V] (or [B, 1, V] of the last token) and the state, None for a ``state`` of None."""
        raise NotImplementedError

    def empty_state(self) -> Any:
        raise NotImplementedError

    def logits(self, tokens: Int[np.ndarray, "B L"]) -> Float[np.ndarray, "B L V"]:
        apply = jax.jit(lambda params, tokens: self.apply(params, tokens, None, False)[0])
        return np.asarray(apply(self.params, tokens))

    def prefill(self, tokens: Int[np.ndarray, "B L"]) -> Callable[[], Any]:
        run = self._forward()
        ids, state = jnp.asarray(tokens), self.empty_state()
        return lambda: run(self.params, ids, state)

    def decode(self, tokens: Int[np.ndarray, "B L"]) -> Callable[[], Any]:
        """As ``eval.decode`` does it: the steps of one call are one compiled scan."""

        def steps(prepared: Any, carry: Any) -> Any:
            step = functools.partial(self._step, prepared)
            return jax.lax.scan(lambda c, _: (step(c), c[0]), carry, None, length=DECODE_STEPS)

        run, prepared = jax.jit(steps, donate_argnums=1), self._prepared()
        return self._decoding(tokens, lambda carry: run(prepared, carry)[0])

    def decode_calls(self, tokens: Int[np.ndarray, "B L"]) -> Callable[[], Any]:
        """One call of a jitted function for each token."""
        run, prepared = jax.jit(self._step, donate_argnums=1), self._prepared()

        def steps(carry: Any) -> Any:
            for _ in range(DECODE_STEPS):
                carry = run(prepared, carry)
            return carry

        return self._decoding(tokens, steps)

    def carried_bytes(self) -> int:
        """Size of what is kept from token to token."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.empty_state()))

    def _forward(self) -> Callable[..., Any]:
        return jax.jit(lambda params, tokens, state: self.apply(params, tokens, state, True))

    def _prepared(self) -> Any:
        """Parameters, with what can be done once for many steps done."""
        return self.params

    def _step(self, prepared: Any, carry: Any) -> Any:
        token, state = carry
        logits, state = self.apply(prepared, token[:, None], state, True)
        return jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32), state

    def _decoding(self, tokens: np.ndarray, steps: Callable[[Any], Any], piece: int = 8192) -> Callable:
        """``steps`` going on from the state after ``tokens``, which are fed in pieces."""
        forward, state, logits = self._forward(), self.empty_state(), None
        for start in range(0, tokens.shape[1], piece):
            logits, state = forward(self.params, jnp.asarray(tokens[:, start : start + piece]), state)
        assert logits is not None
        carry = (jnp.argmax(logits[:, -1], axis=-1).astype(jnp.int32), state)

        def call() -> Any:
            nonlocal carry
            carry = steps(carry)
            return carry[0]

        return call


class Longspan(JaxPeer):
    """Our model; training is the program's own step: clipping, norms of everything, a check for NaN."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.model, self.params = build(shape)

    def apply(self, params: Any, tokens: jax.Array, state: Any, last_only: bool) -> tuple[jax.Array, Any]:
        lm = self.model.bind(params)
        hidden, state, _ = lm(tokens, state)
        return lm.logits(hidden[:, -1:] if last_only else hidden), state

    def _prepared(self) -> Any:
        """As ``eval.decode`` does."""
        return self.params, taken_apart(self.model, self.params)

    def _step(self, prepared: Any, carry: Any) -> Any:
        lm = self.model.bind(prepared[0])
        lm.backbone.put_apart(prepared[1])
        hidden, state, _ = lm(carry[0][:, None], carry[1])
        return jnp.argmax(lm.logits(hidden[:, -1]), axis=-1).astype(jnp.int32), state

    def empty_state(self) -> Any:
        return self.model.bind(self.params).init_state(self.shape.batch, 1)

    def train(self, tokens: Int[np.ndarray, "B L+1"]) -> Callable[[], Any]:
        model = self.model
        config = OptimConfig(schedule=ScheduleConfig(kind="constant"))
        tx = make_optimizer(config, model.roles, model.axes, model.shapes, total_steps=1000)

        def loss(params: Any, batch: Any, carry: Any, key: jax.Array) -> Any:
            lm = model.bind(params)
            hidden, _, _ = lm(batch["tokens"])
            nll, _ = chunked_cross_entropy(lm, hidden, batch["targets"])
            return (nll.sum(), jnp.float32(nll.size)), (None, {})

        step = make_train_step(loss, tx, config, total_steps=1000)
        state = init_state(jax.tree.map(jnp.copy, self.params), tx, config)
        batch = {"tokens": jnp.asarray(tokens[:, :-1]), "targets": jnp.asarray(tokens[:, 1:])}

        def call() -> jax.Array:
            nonlocal state
            state, metrics = step(state, batch)
            return metrics["loss"]

        return call


class Mamba2Jax(JaxPeer):
    """github.com/jax-state-spaces/mamba2-jax: its modules, split and jitted with donation."""

    def __init__(self, shape: Shape):
        import mamba2_jax

        self.shape, self._package = shape, mamba2_jax
        self.config = mamba2_jax.Mamba2Config(
            vocab_size=shape.vocab_size,
            hidden_size=shape.d_model,
            state_size=shape.d_state,
            head_dim=shape.headdim,
            chunk_size=shape.chunk_size,
            expand=shape.expand,
            conv_kernel=shape.d_conv,
            num_hidden_layers=shape.n_layers,
            layer_norm_epsilon=shape.norm_eps,
        )
        model = mamba2_jax.Mamba2ForCausalLM(self.config, rngs=nnx.Rngs(0))
        self._fill(model)
        self.graphdef, self.params = nnx.split(model)

    def _fill(self, model: Any) -> None:
        weights = published_weights(self.shape)
        model.backbone.embedder.embedding[...] = weights["embedding"]
        model.backbone.final_norm.weight[...] = weights["norm"]
        for i, block in enumerate(model.backbone.layers):
            mixer = block.mixer
            targets = {
                "norm": (block.norm.weight, None),
                "in_proj": (mixer.in_proj.kernel, np.transpose),
                "conv_weight": (mixer.conv1d.conv.kernel, lambda w: w.T[:, None, :]),
                "conv_bias": (mixer.conv1d.conv.bias, None),
                "dt_bias": (mixer.dt_bias, None),
                "A_log": (mixer.A_log, None),
                "D": (mixer.D, None),
                "gate_norm": (mixer.norm.weight, None),
                "out_proj": (mixer.out_proj.kernel, np.transpose),
            }
            for name, (variable, layout) in targets.items():
                value = weights[f"{i}.{name}"]
                variable[...] = jnp.asarray(value if layout is None else layout(value))

    def apply(self, params: Any, tokens: jax.Array, state: Any, last_only: bool) -> tuple[jax.Array, Any]:
        # The package has no way to ask for the last logits only.
        out = nnx.merge(self.graphdef, params)(tokens, cache=state)
        return (out["logits"][:, -1:] if last_only else out["logits"]), out["cache"]

    def empty_state(self) -> Any:
        return self._package.create_empty_cache(self.config, self.shape.batch)

    def train(self, tokens: Int[np.ndarray, "B L+1"]) -> Callable[[], Any]:
        tx = optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1)
        inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])

        def loss(params: Any) -> jax.Array:
            logits, _ = self.apply(params, inputs, None, False)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: Any, opt_state: Any) -> tuple[Any, Any, jax.Array]:
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, value

        params = jax.tree.map(jnp.copy, self.params)
        opt_state = tx.init(params)

        def call() -> jax.Array:
            nonlocal params, opt_state
            params, opt_state, value = step(params, opt_state)
            return value

        return call
