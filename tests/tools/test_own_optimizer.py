"""A configuration file's own optimizer reaches every command; flags that it would ignore are refused."""

import jax
import numpy as np
import optax
import pytest

from tests.builders.runs import small_config, write_config
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.targets import parse_target
from tsp_jax.plan.compile import compile_step
from tsp_jax.tools import cli
from tsp_jax.tools.inspect import StepOptions
from tsp_jax.training.step import make_program

pytestmark = pytest.mark.usefixtures("optax_promotes")


@pytest.fixture
def file(tmp_path):
    path = write_config(small_config(tmp_path, layout="tsp", mesh="data=1,tsp=8", remat="full"), tmp_path / "mine.py")
    path.write_text(f"import optax\n{path.read_text()}optimizer = optax.chain(optax.clip(1.0), optax.lion(1e-3))\n")
    return str(path)


@pytest.mark.parametrize("options", [lambda config: config, lambda config: StepOptions(config=config)])
def test_flags_that_it_would_ignore_are_refused(options, file):
    name, _, optimizer = cli.parse([file, "--optimizer.zero1", "--seed", "3"], options)
    assert name == "mine"
    assert isinstance(optimizer, optax.GradientTransformation)
    with pytest.raises(ConfigError, match=r"^optimizer.learning_rate=0.5 has no effect.*change `optimizer`"):
        cli.parse([file, "--optimizer.learning-rate", "0.5"], options)


def test_memory_of_its_state_is_what_a_compiled_step_holds(file):
    """Lion has one moment, AdamW two; both have other arrays of a few bytes."""
    config, optimizer = cli.load_config_file(file)
    target = parse_target("cpu:8")
    lion, adamw = (compile_step(config, target, optimizer=each) for each in (optimizer, None))
    program = make_program(config, lion.placement, optimizer)
    params = jax.tree.leaves(program.abstract_state.params)
    moment_bytes = sum(4 * np.prod(array.sharding.shard_shape(array.shape)) for array in params)
    held = [step.compiled.memory_analysis().argument_size_in_bytes for step in (lion, adamw)]
    assert abs(held[1] - held[0] - moment_bytes) < 100
