"""Grouped-query attention: the equation, and how its queries meet whole sequences or a cache."""

from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Int

from .config import AttentionFunction, LayerSpec
from .kernels.cached_attention import attend_to_cache
from .kernels.rotary import Rotation, rotate
from .kv_cache import LayerCache, without_lone_head
from .linear import Linear, Project, fused
from .norm import Norm


@runtime_checkable
class Mix(Protocol):
    """How queries meet keys and values: returns the mixed values, and what a cache keeps."""

    def __call__(
        self,
        query: Float[Array, "*batch K group E"],
        key: Float[Array, "*batch K E"],
        value: Float[Array, "*batch K E"],
    ) -> tuple[Float[Array, "*rest width"], Any]: ...


class Attention(eqx.Module):
    """y = mix(R n(x W_q), R n(x W_k), x W_v) W_o: n the q/k norm, if any, R the rotation.

    Source: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    num_kv_heads: int = eqx.field(static=True)
    head_dim: int = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "*batch D"], rotation: Rotation | None, mix: Mix
    ) -> tuple[Float[Array, "*rest D"], Any]:
        return self.by(fused)(x, rotation, mix)

    def by(self, project: Project):
        """The same, its linear maps computed by `project`."""
        inputs, output = project(self.query, self.key, self.value), project(self.output)

        @jax.named_scope("attention")
        def apply(
            x: Float[Array, "*batch D"], rotation: Rotation | None, mix: Mix
        ) -> tuple[Float[Array, "*rest D"], Any]:
            heads = [y.reshape(*y.shape[:-1], -1, self.head_dim) for y in inputs(x)]
            query, key, value = heads
            if self.query_norm is not None and self.key_norm is not None:
                query, key = self.query_norm(query), self.key_norm(key)
            if rotation is not None:
                query, key = rotate(query, rotation), rotate(key, rotation)
            grouped = query.reshape(*query.shape[:-2], self.num_kv_heads, -1, self.head_dim)
            mixed, cached = mix(grouped, key, value)
            return output(mixed)[0], cached

        return apply


class MixSequences(eqx.Module):
    """Causal attention over whole sequences; a cache keeps the keys and values of all slots.

    Attributes:
        attention: computes it.
        spec: settings of the layer.
        mask: which slots hold a token.
        start: the first slot whose result is read.
    """

    attention: AttentionFunction
    spec: LayerSpec
    mask: Bool[Array, "B S"]
    start: int

    def __call__(
        self,
        query: Float[Array, "B S K group E"],
        key: Float[Array, "B S K E"],
        value: Float[Array, "B S K E"],
    ) -> tuple[
        Float[Array, "B rest width"], tuple[Float[Array, "B S K E"], Float[Array, "B S K E"]]
    ]:
        spec = self.spec
        mixed = self.attention(
            query.transpose(0, 2, 3, 1, 4), key.swapaxes(1, 2), value.swapaxes(1, 2), self.mask,
            scale=spec.scale, softcap=spec.softcap, window=spec.window,
        )  # fmt: skip
        mixed = mixed[:, :, :, self.start :].transpose(0, 3, 1, 2, 4)
        return mixed.reshape(*mixed.shape[:2], -1), (key, value)


class MixCache(eqx.Module):
    """One token per row against the cache of a layer, which then holds its key and value too.

    Attributes:
        entry: keys and values of the layer.
        spec: settings of the layer.
        seen: which slots each row sees, the one of this token among them.
        slot: where this token goes.
    """

    entry: LayerCache
    spec: LayerSpec
    seen: Bool[Array, "B S"]
    slot: Int[Array, ""]

    def __call__(
        self,
        query: Float[Array, "B K group E"],
        key: Float[Array, "B K E"],
        value: Float[Array, "B K E"],
    ) -> tuple[Float[Array, "B width"], LayerCache]:
        dtype, rows = query.dtype, query.shape[0]
        query, key, value = map(without_lone_head, (query, key, value))
        entry = self.entry.write(key, value, self.slot)
        mixed = attend_to_cache(
            query, entry.keys.astype(dtype), entry.values.astype(dtype), self.seen,
            scale=self.spec.scale, softcap=self.spec.softcap,
        )  # fmt: skip
        return mixed.reshape(rows, -1), entry
