"""Settings of every test. The shape checks come first: only later imports are checked."""

import os
import sys

from jaxtyping import install_import_hook

early = sorted({"ppo_kernel", "reference"} & {name.split(".")[0] for name in sys.modules})
if early:
    raise RuntimeError(f"{early} were imported before the shape checks were switched on.")
install_import_hook(["ppo_kernel", "reference"], "beartype.beartype")

# Read when JAX starts its backend: eight devices, so that CPU tests see shardings.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile far more than they run, so LLVM's optimiser is off.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

hypothesis.settings.register_profile(
    "ppo_kernel",
    deadline=None,  # an example that compiles takes a hundred times as long as one that does not
    derandomize="CI" in os.environ,
    max_examples=25,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("ppo_kernel")


@pytest.fixture
def float64():
    """The test runs with 64-bit types switched on."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_are_freed():
    """Each holds memory mappings, and a process may have some 65,000: the whole suite has more."""
    yield
    jax.clear_caches()
