"""A decoder-only Transformer: one trunk for policies, critics and reward models."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from ..ops.dtypes import promote_types
from .attention import MixCache, MixSequences
from .block import Block, init_norm
from .config import LayerSpec, TransformerConfig
from .kernels.causal_attention import positions_of
from .kernels.rotary import Rotation, rotation_of
from .kernels.unstack import unstack
from .kv_cache import KVCache
from .norm import LayerNorm, Norm, RMSNorm
from .protocol import Cache, DecodeStep
from .rotary import Rope


class Transformer(eqx.Module):
    """A decoder-only trunk, tokens -> hidden states.

    Attributes:
        embedding: one row per token id.
        blocks: every leaf has a leading axis of layers, which the forward pass scans.
        norm: of the last hidden states.
        config: sizes, settings and types; static.
        position_embedding: one row per position; None where positions are not learned.
    """

    embedding: Float[Array, "V D"]
    blocks: Block
    norm: Norm
    config: TransformerConfig = eqx.field(static=True)
    position_embedding: Float[Array, "positions D"] | None = None

    @classmethod
    def init(cls, key: Key[Array, ""], config: TransformerConfig) -> "Transformer":
        """Random weights of `config.param_dtype`; consumes `key`."""
        block_key, embedding_key = jax.random.split(key)
        blocks = jax.vmap(lambda k: Block.init(k, config))(
            jax.random.split(block_key, config.num_layers)
        )
        width, positions = config.hidden_size, None
        embedding = 0.02 * jax.random.normal(embedding_key, (config.vocab_size, width))
        if config.learned_positions:
            position_key = jax.random.fold_in(embedding_key, 1)
            positions = 0.02 * jax.random.normal(position_key, (config.max_positions, width))
        model = cls(embedding, blocks, init_norm(config, width), config, positions)
        return cast_floating(model, config.param_dtype)

    def logical_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Field -> its logical axes, for `sharding`."""
        return {"embedding": ("vocab", "embed"), "position_embedding": (None, "embed")}

    def __call__(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], start: int = 0
    ) -> Float[Array, "B rest D"]:
        """Final hidden states of slots `start` to S - 1, compute type."""
        return self._forward(tokens, mask, start)[0]

    def prefill(
        self, tokens: Int[Array, "N P"], mask: Bool[Array, "N P"], capacity: int
    ) -> tuple[Float[Array, "N D"], Cache]:
        """Hidden state of the last slot, and the cache; arguments as in `Policy`."""
        self.check_positions(capacity)
        hidden, layers = self._forward(tokens, mask, tokens.shape[1] - 1)
        dtype = self.config.cache_dtype
        layers = [(keys.astype(dtype), values.astype(dtype)) for keys, values in layers]
        return hidden[:, 0], KVCache.from_prefill(layers, mask, capacity)

    def decoder(self) -> DecodeStep:
        """The decode step, over layers unstacked once so that the loop copies no weights."""
        # Cast once: every use casts to the type of the activations. A norm may compute in a wider
        # one, so its parameters stay.
        config = self.config
        blocks = [
            _cast_outside_norms(block, config.compute_dtype) for block in unstack(self.blocks)
        ]
        layers = [(config.spec_of(i), block.decoder()) for i, block in enumerate(blocks)]

        def step(tokens: Int[Array, " B"], cache: KVCache):
            x, rotations = self._embed(tokens, cache.lengths), self._rotations(cache.lengths)
            cache, entries = cache.open_slot(), []
            for (spec, block), entry in zip(layers, cache.layers, strict=True):
                mix = MixCache(entry, spec, cache.seen(spec.window), cache.slot)
                x, entry = block(x, rotations[spec.rope], mix)
                entries.append(entry)
            return self.norm(x), cache.close_slot(entries)

        return step

    def check_positions(self, slots: int) -> None:
        """Refuse more slots than there are learned positions.

        Raises:
            ValueError: names both.
        """
        table = self.position_embedding
        if table is not None and slots > len(table):
            raise ValueError(
                f"{slots} slots, but the model has learned {len(table)} positions "
                "(max_positions): shorten prompts or responses."
            )

    def _forward(self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"], start: int):
        """(hidden states from `start` on, keys and values of each layer)."""
        self.check_positions(tokens.shape[1])
        config, positions = self.config, positions_of(mask)
        rotations = self._rotations(positions)

        def layer(spec: LayerSpec, start: int):
            def apply(x: Float[Array, "B S D"], block: Block):
                mix = MixSequences(config.attention, spec, mask, start)
                return block(x, rotations[spec.rope], mix, start)

            if config.remat is None:
                return apply
            # The steps of a scan are apart. Within one, XLA may merge what is computed again with
            # the first time and keep it: where memory matters, `unroll` stays at 1.
            return jax.checkpoint(apply, policy=config.remat, prevent_cse=False)

        x, count, period = self._embed(tokens, positions), config.num_layers, config.period
        # One function for all layers of equal settings, so that it is traced once.
        layers = {spec: layer(spec, 0) for spec in period}
        steps = [layers[config.spec_of(i)] for i in range(count)]
        whole = count - count % len(period)
        if whole and (start == 0 or config.unroll < count):
            # All layers, the last one too: to leave it out of the scan, the matrices of the others
            # would be copied out of their stack.
            x, cached = _scan_periods(steps[: len(period)], x, self._periods(whole), config.unroll)
            rest = unstack(jax.tree.map(lambda y: y[whole:], self.blocks)) if whole < count else []
            steps, end = steps[whole:], start
        else:
            rest, cached, end = unstack(self.blocks), [], 0
            steps[-1] = layer(config.spec_of(count - 1), start)
        for step, block in zip(steps, rest, strict=True):
            x, keys_and_values = step(x, block)
            cached.append(keys_and_values)
        return self.norm(x[:, end:]), cached

    def _periods(self, whole: int) -> Block:
        """The first `whole` layers, every leaf [periods, layers per period, ...]."""
        size = len(self.config.period)
        if size == 1:
            return self.blocks
        return jax.tree.map(
            lambda x: x[:whole].reshape(whole // size, size, *x.shape[1:]), self.blocks
        )

    def _embed(
        self, tokens: Int[Array, "*batch"], positions: Int[Array, "*batch"]
    ) -> Float[Array, "*batch D"]:
        x = self.embedding[tokens].astype(self.config.compute_dtype)
        if self.config.embedding_scale is not None:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.position_embedding is None:
            return x
        return x + self.position_embedding[positions].astype(x.dtype)

    def _rotations(self, positions: Int[Array, "*batch"]) -> dict[Rope | None, Rotation | None]:
        """One rotation for all layers whose rotary embeddings are equal."""
        dtype = promote_types(self.config.compute_dtype, jnp.float32)
        ropes = dict.fromkeys(spec.rope for spec in self.config.period)
        return {
            rope: None
            if rope is None
            else rotation_of(positions, jnp.asarray(rope.frequencies(self.config.head_dim), dtype))
            for rope in ropes
        }


def _scan_periods(steps, x: Float[Array, "B S D"], blocks: Block, unroll: int):
    """The layers of whole periods: (hidden states, keys and values of each layer).

    One scan step is one period, whose layers may have settings of their own.
    """

    def period(x: Float[Array, "B S D"], group: Block):
        cached = []
        for step, block in zip(steps, [group] if len(steps) == 1 else unstack(group), strict=True):
            x, keys_and_values = step(x, block)
            cached.append(keys_and_values)
        return x, cached

    x, stacked = jax.lax.scan(period, x, blocks, unroll=max(1, unroll // len(steps)))
    periods = len(jax.tree.leaves(blocks)[0])
    return x, [(keys[i], values[i]) for i in range(periods) for keys, values in stacked]


def cast_floating(tree, dtype: str):
    """`tree` with its inexact arrays in `dtype`."""
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


def _cast_outside_norms(block: Block, dtype: str) -> Block:
    def is_norm(x) -> bool:
        return isinstance(x, RMSNorm | LayerNorm)

    return jax.tree.map(
        lambda x: x if is_norm(x) else cast_floating(x, dtype), block, is_leaf=is_norm
    )
