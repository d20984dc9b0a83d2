"""Keys and values of the tokens read so far."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .kernels.causal_attention import positions_of


class LayerCache(eqx.Module):
    """Keys and values of one layer, S slots of each.

    Keys are [E, S], values [S, E]: both are then contiguous right operands of the products that
    read them. A single head has no axis K. XLA would drop an axis of one for those products, and
    write and copy the buffers in both shapes.

    Attributes:
        keys, values: in the cache's type; the keys are rotated already.
    """

    keys: Float[Array, "B *K E S"]
    values: Float[Array, "B *K S E"]

    def write(
        self,
        key: Float[Array, "B *K E"],
        value: Float[Array, "B *K E"],
        slot: Int[Array, ""],
    ) -> "LayerCache":
        """One more key and value per row, which XLA writes in place inside a loop.

        Args:
            key, value: of the tokens that are read now; cast to the type of the cache.
            slot: where they go.

        Returns:
            The buffers with this slot written.
        """
        write, keys, values = jax.lax.dynamic_update_slice_in_dim, self.keys, self.values
        key, value = key[..., None].astype(keys.dtype), value[..., None, :].astype(values.dtype)
        return LayerCache(
            write(keys, key, slot, axis=keys.ndim - 1),
            write(values, value, slot, axis=values.ndim - 2),
        )

    def grown(self, more: int) -> "LayerCache":
        """The buffers with `more` slots at their end."""
        return LayerCache(_pad(self.keys, -1, more), _pad(self.values, -2, more))


class KVCache(eqx.Module):
    """An entry per layer, filled slot by slot; the same slot for every row.

    The slots after the prompt are a ring: the first of them follows the last slot of all. A row
    takes no more steps than the ring has slots, so it never overwrites its own tokens. Attention
    does not depend on where in the ring a row began.

    Attributes:
        layers: keys and values. Each layer has its own arrays, so that a decode step writes in
            place.
        mask: which slots hold a token.
        positions: of those tokens; a window is counted in positions.
        lengths: tokens per row, the position of its next one.
        slot: the next one to be written.
        prompt_width: P, the first slot of the ring.
    """

    layers: tuple[LayerCache, ...]
    mask: Bool[Array, "B S"]
    positions: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    slot: Int[Array, ""]
    prompt_width: int = eqx.field(static=True)

    @classmethod
    def from_prefill(
        cls,
        layers: list[tuple[Float[Array, "B P K E"], Float[Array, "B P K E"]]],
        mask: Bool[Array, "B P"],
        capacity: int,
    ) -> "KVCache":
        """The cache after a prompt, with room for `capacity` slots in all.

        Args:
            layers: keys and values of each, rotated already, in the cache's type.
            mask: valid slots of the prompt.
            capacity: at least P; S is the next multiple of 16.

        Returns:
            The next free slot is the first after the prompt.

        Raises:
            ValueError: the prompt does not fit.
        """
        length = mask.shape[1]
        if capacity < length:
            raise ValueError(f"a prompt of {length} slots does not fit a cache of {capacity}.")

        more = _whole_vectors(capacity) - length
        entries = [
            LayerCache(
                without_lone_head(keys.transpose(0, 2, 3, 1)),
                without_lone_head(values.swapaxes(1, 2)),
            )
            for keys, values in layers
        ]
        return cls(
            layers=tuple(entry.grown(more) for entry in entries),
            mask=_pad(mask, -1, more),
            positions=_pad(positions_of(mask), -1, more),
            lengths=jnp.sum(mask, axis=1, dtype=jnp.int32),
            slot=jnp.asarray(length, jnp.int32),
            prompt_width=length,
        )

    def grown(self, capacity: int) -> "KVCache":
        """The cache with room for `capacity` slots; where it was full, it goes on there.

        Only before any slot is written a second time.

        Raises:
            ValueError: it has more slots already.
        """
        before = self.mask.shape[1]
        more = _whole_vectors(capacity) - before
        if more < 0:
            raise ValueError(f"a cache of {before} slots cannot grow to {capacity}.")
        return replace(
            self,
            layers=tuple(entry.grown(more) for entry in self.layers),
            mask=_pad(self.mask, -1, more),
            positions=_pad(self.positions, -1, more),
            slot=jnp.where(jnp.any(self.mask[:, -1]), before, self.slot),
        )

    def open_slot(self) -> "KVCache":
        """The cache with its next slot marked as holding each row's next token."""
        write = jax.lax.dynamic_update_slice_in_dim
        opened = jnp.ones((self.mask.shape[0], 1), bool)
        return replace(
            self,
            mask=write(self.mask, opened, self.slot, axis=1),
            positions=write(self.positions, self.lengths[:, None], self.slot, axis=1),
        )

    def seen(self, window: int | None) -> Bool[Array, "B S"]:
        """Which slots the token in the open slot sees: all, or those of the last `window` tokens.

        Args:
            window: tokens, itself the last of them; None for no bound.

        Returns:
            True for a slot that it sees.
        """
        if window is None:
            return self.mask
        return self.mask & (self.lengths[:, None] - self.positions < window)

    def close_slot(self, layers: list[LayerCache]) -> "KVCache":
        """The cache after every layer has written its slot.

        Args:
            layers: the entries, with the slot written.

        Returns:
            The next slot is the following one of the ring.
        """
        last = self.slot == self.mask.shape[1] - 1
        return replace(
            self, layers=tuple(layers), lengths=self.lengths + 1,
            slot=jnp.where(last, self.prompt_width, self.slot + 1),
        )  # fmt: skip


def without_lone_head(x: Float[Array, "B K *rest"]) -> Float[Array, "B *some"]:
    """`x`, without its axis of heads where there is one head."""
    return jnp.squeeze(x, axis=1) if x.shape[1] == 1 else x


def _whole_vectors(slots: int) -> int:
    """`slots` rounded up to a multiple of 16, so that CPUs read keys in whole vectors."""
    return -(-slots // 16) * 16


def _pad(x: Array, axis: int, more: int) -> Array:
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(-x.ndim, 0)])
