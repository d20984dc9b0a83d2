"""Keys and values of the tokens read so far."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KVCache(eqx.Module):
    """One pair of buffers a layer, filled slot by slot; the same slot for every row.

    The slots after the prompt are a ring: the last one is followed by the first of them. A row
    that keeps within the capacity never meets its own tokens there, and attention does not mind
    where in the ring they begin.

    `keys[l]` and `values[l]` are separate arrays, so that a decode step writes each in place. Both
    lie as the products that read them want their right operand: the axis that is summed over first.
    A single head has no axis: XLA would drop it for those products, and write and copy the buffers
    in both shapes. `mask` says which slots hold a token, `positions` is the position of each row's
    next token, `slot` the index of the next free slot, `prompt_width` the first one of the ring.
    """

    keys: tuple[Float[Array, "B *K E S"], ...]
    values: tuple[Float[Array, "B *K S E"], ...]
    mask: Bool[Array, "B S"]
    positions: Int[Array, " B"]
    slot: Int[Array, ""]
    prompt_width: int = eqx.field(static=True)

    @classmethod
    def from_prefill(
        cls,
        keys: Float[Array, "L B P K E"],
        values: Float[Array, "L B P K E"],
        mask: Bool[Array, "B P"],
        capacity: int,
    ) -> "KVCache":
        """The cache after a prompt, with room for `capacity` slots in all.

        Args:
            keys, values: of every layer, rotated already, in the cache's type.
            mask: valid slots of the prompt.
            capacity: at least P; S is the next multiple of 16.

        Returns:
            The next free slot is the first after the prompt.

        Raises:
            ValueError: the prompt does not fit.
        """
        layers, _, length = keys.shape[:3]
        if capacity < length:
            raise ValueError(f"a prompt of {length} slots does not fit a cache of {capacity}.")

        more = _whole_vectors(capacity) - length
        return cls(
            keys=tuple(
                _pad(without_lone_head(keys[i].transpose(0, 2, 3, 1)), -1, more)
                for i in range(layers)
            ),
            values=tuple(
                _pad(without_lone_head(values[i].swapaxes(1, 2)), -2, more) for i in range(layers)
            ),
            mask=_pad(mask, -1, more),
            positions=jnp.sum(mask, axis=1, dtype=jnp.int32),
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
            keys=tuple(_pad(x, -1, more) for x in self.keys),
            values=tuple(_pad(x, -2, more) for x in self.values),
            mask=_pad(self.mask, -1, more),
            slot=jnp.where(jnp.any(self.mask[:, -1]), before, self.slot),
        )

    def open_slot(self) -> "KVCache":
        """The cache with its next slot marked as holding a token."""
        opened = jnp.ones((self.mask.shape[0], 1), bool)
        mask = jax.lax.dynamic_update_slice_in_dim(self.mask, opened, self.slot, axis=1)
        return replace(self, mask=mask)

    def close_slot(
        self, keys: list[Float[Array, "B *K E S"]], values: list[Float[Array, "B *K S E"]]
    ) -> "KVCache":
        """The cache after every layer has written its slot."""
        last = self.slot == self.mask.shape[1] - 1
        return replace(
            self, keys=tuple(keys), values=tuple(values), positions=self.positions + 1,
            slot=jnp.where(last, self.prompt_width, self.slot + 1),
        )  # fmt: skip


def write_slots(
    keys: Float[Array, "B *K E S"],
    values: Float[Array, "B *K S E"],
    key: Float[Array, "B *K E"],
    value: Float[Array, "B *K E"],
    slot: Int[Array, ""],
) -> tuple[Float[Array, "B *K E S"], Float[Array, "B *K S E"]]:
    """The buffers of a layer with one more entry, which XLA writes in place inside a loop.

    Args:
        keys, values: the buffers.
        key, value: of the tokens that are read now; cast to the type of the cache.
        slot: where they go.

    Returns:
        (keys, values)
    """
    write = jax.lax.dynamic_update_slice_in_dim
    return (
        write(keys, key[..., None].astype(keys.dtype), slot, axis=keys.ndim - 1),
        write(values, value[..., None, :].astype(values.dtype), slot, axis=values.ndim - 2),
    )


def without_lone_head(x: Float[Array, "B K *rest"]) -> Float[Array, "B *some"]:
    """`x`, without its axis of heads where there is one head."""
    return jnp.squeeze(x, axis=1) if x.shape[1] == 1 else x


def _whole_vectors(slots: int) -> int:
    """`slots` rounded up to a multiple of 16: keys of other lengths are read in broken vectors."""
    return -(-slots // 16) * 16


def _pad(x: Array, axis: int, more: int) -> Array:
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(-x.ndim, 0)])
