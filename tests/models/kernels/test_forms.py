"""Law 7: every fast form equals the plain form beside it, in value and gradient; one row each.

`attend_by_lengths` has its rows in test_cudnn.py: JAX has no float64 of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_kernel.models.kernels.cached_attention import attend_to_cache, plain_attend_to_cache
from ppo_kernel.models.kernels.causal_attention import attend_causally, plain_attend_causally
from ppo_kernel.models.kernels.decode_matmul import (
    DecodeMatrix,
    decode_projection,
    plain_decode_product,
    plain_decode_projection,
)
from ppo_kernel.models.kernels.fused_projection import fused_projection, plain_fused_projection
from ppo_kernel.models.kernels.glu import glu, plain_glu
from ppo_kernel.models.kernels.matmul import matmul, plain_matmul
from ppo_kernel.models.kernels.products import (
    plain_wide_einsum,
    plain_wide_product,
    wide_einsum,
    wide_product,
)
from ppo_kernel.models.kernels.rotary import (
    Rotation,
    plain_rotate,
    plain_rotation_of,
    rotate,
    rotation_of,
)
from ppo_kernel.models.kernels.softmax_attention import attend, plain_attend
from ppo_kernel.models.kernels.unstack import plain_unstack, unstack

KERNELS = Path(__file__).parents[3] / "ppo_kernel/models/kernels"


@dataclass(frozen=True)
class Form:
    """A fast form, its plain form, and shapes of the float arguments that both take.

    Integer arguments, masks and settings are bound already. Gradients are taken by all arguments.
    """

    fast: Callable
    plain: Callable
    shapes: tuple


def drawn(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def pair(fast, plain, **settings):
    return partial(fast, **settings), partial(plain, **settings)


ROWS, HEADS, GROUP, SLOTS, HEAD = 2, 2, 2, 98, 6
SEEN = drawn((ROWS, SLOTS)) > -0.8
SEEN[:, 0] = True
ALLOWED = drawn((ROWS, SLOTS, SLOTS), 1) > 0.3
ALLOWED[1, 2] = False
QUERY, KEYS = (ROWS, HEADS, GROUP, SLOTS, HEAD), (ROWS, HEADS, SLOTS, HEAD)
SQUARE = QUERY, KEYS, KEYS
CACHE = (ROWS, HEADS, GROUP, HEAD), (ROWS, HEADS, HEAD, SLOTS), (ROWS, HEADS, SLOTS, HEAD)
LONE = (ROWS, GROUP, HEAD), (ROWS, HEAD, SLOTS), (ROWS, SLOTS, HEAD)
SCORES = {
    "": {},
    "-scaled": {"scale": 0.2},
    "-capped": {"softcap": 1.5},
    "-capped-scaled": {"softcap": 0.5, "scale": 2.0},
}
POSITIONS = np.array([[0, 1, 2], [0, 7, 1000]], np.int32)


def attending(fast, plain, mask, shapes, **settings):
    """By query, key and value, with the mask and the settings bound."""
    return Form(
        lambda *arrays: fast(*arrays, jnp.asarray(mask), **settings),
        lambda *arrays: plain(*arrays, jnp.asarray(mask), **settings),
        shapes,
    )


def projecting(function, *biases):
    """(x, two weights, biases) -> the products."""
    return lambda x, *parameters: function(
        x, parameters[:2], [parameters[2 + i] if i is not None else None for i in biases]
    )


def rotating(function):
    return lambda x, cos, sin: function(x, Rotation(cos, sin))


FORMS = {
    "matmul": Form(matmul, plain_matmul, ((7, 5), (5, 3))),
    "matmul-wide": Form(matmul, plain_matmul, ((7, 3), (3, 5))),
    "matmul-many-columns": Form(matmul, plain_matmul, ((7, 520), (520, 515))),
    "matmul-at-the-bound": Form(matmul, plain_matmul, ((7, 600), (600, 512))),
    **{
        f"fused_projection-{name}": Form(
            projecting(fused_projection, *places),
            projecting(plain_fused_projection, *places),
            ((5, 2, 6), (6, 4), (6, 3), *sizes),
        )
        for name, places, sizes in (
            ("no-bias", (None, None), ()),
            ("biases", (0, 1), ((4,), (3,))),
            ("one-bias", (None, 0), ((3,),)),
        )
    },
    **{
        f"glu-{activation.__name__}": Form(
            partial(glu, activation), partial(plain_glu, activation), ((4, 5), (4, 5))
        )
        for activation in (jax.nn.silu, jax.nn.gelu, jnp.tanh)
    },
    "rotation_of": Form(
        lambda x: tuple(rotation_of(jnp.asarray(POSITIONS), x)),
        lambda x: tuple(plain_rotation_of(jnp.asarray(POSITIONS), x)),
        ((3,),),
    ),
    "rotate": Form(rotating(rotate), rotating(plain_rotate), ((2, 3, 4, 6), (2, 3, 3), (2, 3, 3))),
    "rotate-partly": Form(
        rotating(rotate), rotating(plain_rotate), ((2, 3, 4, 6), (2, 3, 2), (2, 3, 2))
    ),
    "unstack": Form(
        lambda *arrays: tuple(unstack(arrays)),
        lambda *arrays: tuple(plain_unstack(arrays)),
        ((3, 4), (3, 2, 2)),
    ),
    "wide_einsum": Form(*pair(partial(wide_einsum, "rk,ok->ro"), partial(plain_wide_einsum, "rk,ok->ro")), ((4, 5), (3, 5))),  # noqa: E501
    "wide_product": Form(wide_product, plain_wide_product, ((4, 5), (3, 5))),
    "DecodeMatrix": Form(
        lambda x, weight: DecodeMatrix.of(weight)(x), plain_decode_product, ((4, 6), (5, 6))
    ),
    "decode_projection": Form(
        projecting(lambda x, *layers: decode_projection(*layers)(x), 0, None),
        projecting(lambda x, *layers: plain_decode_projection(*layers)(x), 0, None),
        ((5, 6), (6, 4), (6, 3), (4,)),
    ),
    **{f"attend{name}": attending(attend, plain_attend, ALLOWED, SQUARE, **settings)
       for name, settings in SCORES.items()},
    **{f"attend_to_cache{name}": attending(attend_to_cache, plain_attend_to_cache, SEEN, CACHE,
                                           **settings)
       for name, settings in SCORES.items()},
    "attend_to_cache-lone-head": attending(attend_to_cache, plain_attend_to_cache, SEEN, LONE),
    **{f"attend_causally{name}": attending(attend_causally, plain_attend_causally, SEEN, SQUARE,
                                           **settings)
       for name, settings in (SCORES | {
           "-window": {"window": 3}, "-window-capped": {"window": 60, "softcap": 0.7},
       }).items()},
}  # fmt: skip


def with_gradients(function, arrays):
    outputs, pullback = jax.vjp(function, *arrays)
    along = jax.tree.map(lambda x: jnp.asarray(drawn(x.shape, 9), x.dtype), outputs)
    return jax.tree.leaves((outputs, pullback(along)))


@pytest.mark.parametrize("name", FORMS)
def test_law_7_a_fast_form_equals_its_plain_form(name, float64):
    form = FORMS[name]
    arrays = [jnp.asarray(drawn(shape, seed)) for seed, shape in enumerate(form.shapes)]
    results = [jax.jit(partial(with_gradients, f))(arrays) for f in (form.fast, form.plain)]
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_every_form_has_a_row():
    plain = {
        line.split("def ")[1].split("(")[0]
        for path in KERNELS.glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def plain_")
    }
    here = Path(__file__).read_text()
    assert not {name for name in plain if here.count(name) < 2}
