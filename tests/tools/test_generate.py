"""Text in, text out: `inference.generate` and scripts/generate.py on a small Hugging Face folder; what is wrong is
refused in a line."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.builders.arrays import normal, place_case
from tests.builders.tokenizers import characters, save_tokenizer
from tsp_jax import inference
from tsp_jax.config import ModelConfig
from tsp_jax.errors import ConfigError
from tsp_jax.hf import weights as hf
from tsp_jax.hf.params import param_tree
from tsp_jax.hf.tensors import SINGLE
from tsp_jax.inspect import compiled_memory
from tsp_jax.tools.generate import GenerateOptions, generate_text

SCRIPT = Path(__file__).parents[2] / "scripts" / "generate.py"
CONFIG = ModelConfig(
    vocab_size=72, d_model=28, num_layers=2, num_heads=9, num_kv_heads=3, head_dim=10, d_ff=120, tie_embeddings=True
)
EOS = 2
PROMPT = "the quick brown fox"
KERNEL = "attention kernel xla"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Hugging Face folder of random weights."""
    folder, placement = tmp_path_factory.mktemp("models") / "small", place_case("single")
    tree = param_tree(CONFIG, placement)
    leaves, structure = jax.tree.flatten(tree)
    arrays = [normal(seed, *leaf.stored.shape, std=0.3) for seed, leaf in enumerate(leaves, start=40)]
    hf.save_params(folder, jax.tree.unflatten(structure, map(jax.numpy.asarray, arrays)), CONFIG, placement)
    save_tokenizer(folder, characters())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS]}))
    template = "{% for m in messages %}<s>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}!{% endif %}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "chat_template": template})
    )
    return folder


@pytest.fixture(scope="module")
def model(folder) -> inference.Model:
    return inference.load(folder, place_case("tsp8"))


# ------------------------------------------------------------------------------------------------ in Python


def test_every_layout_writes_the_same_text(folder, model):
    prompts = [PROMPT, "No", [5, 6, 7]]
    found = inference.generate(model, prompts, max_new_tokens=12)
    assert [len(one.tokens) for one in found] == [12, 12, 12]
    assert found[0].text == model.tokenizer.decode(found[0].tokens) != found[1].text
    for case in ("single", "data2_tsp4"):
        assert inference.generate(inference.load(folder, place_case(case)), prompts, max_new_tokens=12) == found


def test_texts_of_like_length_share_a_program(model):
    inference.generate(model, [PROMPT], max_new_tokens=12)
    before = len(model.programs)
    inference.generate(model, [PROMPT + "."], max_new_tokens=11)
    inference.generate(model, [PROMPT], max_new_tokens=12, chunk=4096)
    assert len(model.programs) == before


def test_a_text_ends_before_its_stop_token(model):
    tokens = inference.generate(model, [PROMPT], max_new_tokens=12)[0].tokens
    stopping = dataclasses.replace(model, stop_tokens=(tokens[4],))
    place = tokens.index(tokens[4])
    found = inference.generate(stopping, [PROMPT], max_new_tokens=12)[0]
    assert found == inference.Continuation(tokens[: place + 1], model.tokenizer.decode(tokens[:place]))
    assert inference.generate(stopping, [PROMPT], max_new_tokens=12, stop_tokens=())[0].tokens == tokens


def test_a_model_without_a_tokenizer_takes_and_gives_token_ids(model):
    bare = dataclasses.replace(model, tokenizer=None)
    found = inference.generate(bare, [model.encode(PROMPT)], max_new_tokens=12)[0]
    assert found == inference.Continuation(inference.generate(model, [PROMPT], max_new_tokens=12)[0].tokens, "")
    with pytest.raises(ConfigError, match="has no tokenizer"):
        inference.generate(bare, [PROMPT], max_new_tokens=1)


def test_weights_are_served_in_the_dtype_asked_for(folder):
    served = inference.load(folder, place_case("tsp4"), dtype="bfloat16")
    assert {array.dtype.name for array in jax.tree.leaves(served.params)} == {"bfloat16"}
    assert inference.load(folder, place_case("tsp4")).dtype == "float32", "as the folder says"
    with pytest.raises(ConfigError, match="dtype=float16 is unknown"):
        inference.load(folder, place_case("tsp4"), dtype="float16")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[72]]}, "prompts.0. has token id 72, which is unknown"),
        ({"prompts": [""]}, "prompts.0. is empty"),
        ({"capacity": 2**28}, r"capacity=268435456 .* bytes per device .* use at most [\d,]+$"),
        ({"max_new_tokens": 10**30}, "capacity=.* is too large; use at most 1073741824"),
        ({"stop_tokens": [2**40]}, "stop_tokens=1099511627776 is no token; use 0 to 71"),
        ({"chunk": -8}, "chunk=-8 must not be negative"),
        ({"chunk": 9}, "chunk=9 is not divisible by 8 over tsp; use 16"),
    ],
)
def test_generate_refuses_what_cannot_be(model, arguments, message):
    with pytest.raises(ConfigError, match=message):
        inference.generate(model, **{"prompts": [PROMPT], "max_new_tokens": 2, **arguments})


def test_logits_that_are_not_finite_draw_nothing(model):
    """Else the likeliest of them is token 0."""
    broken = dataclasses.replace(model, params=jax.tree.map(lambda array: array * np.nan, model.params))
    for sampling in (inference.Sampling(), inference.Sampling(temperature=1.0)):
        with pytest.raises(ConfigError, match=r"logits of prompts\[0\] are not finite; use intact weights"):
            inference.generate(broken, [PROMPT], max_new_tokens=12, sampling=sampling)


# ------------------------------------------------------------------------------------------------ the script


class Written(list):
    """A stream that keeps what is written, piece by piece."""

    write = list.append

    def flush(self) -> None:
        self.append("flush")


def test_text_comes_as_it_is_written(folder, model):
    """Prefilled in three chunks, too."""
    out, notes = Written(), Written()
    stats = generate_text(
        str(folder), GenerateOptions(prompt=PROMPT, max_new_tokens=12, mesh="tsp=8", chunk=8), out, notes
    )
    found = inference.generate(model, [PROMPT], max_new_tokens=12)[0]
    assert "".join(piece for piece in out if piece != "flush") == found.text + "\n"
    assert [piece for piece in out if piece][:4] == [found.text[0], "flush", found.text[1], "flush"]
    assert (stats.prompt_tokens, stats.new_tokens, stats.decoded_tokens) == (len(PROMPT), 12, 11)
    assert notes[0].startswith(f"tsp (data=1,tsp=8), {KERNEL}: prefill 19 tokens, ")
    assert notes[0].count("tokens/s") == 2


@pytest.mark.parametrize("flags", [[], ["--layout", "tp"]], ids=["free", "tp"])
def test_a_planned_layout_writes_the_same_text(folder, model, monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["generate.py", str(folder), *flags])
    out, notes = Written(), Written()
    options = GenerateOptions(prompt=PROMPT, max_new_tokens=12, plan="fastest", layout="tp" if flags else "tsp")
    generate_text(str(folder), options, out, notes)
    found = inference.generate(model, [PROMPT], max_new_tokens=12)[0]
    assert "".join(piece for piece in out if piece != "flush") == found.text + "\n"
    said = "".join(notes)
    assert said.startswith("plan=fastest: tp data=1,model=8, chunks of " if flags else "plan=fastest: ")


def test_peak_is_that_of_the_larger_program(model):
    inference.generate(model, [PROMPT], max_new_tokens=12)
    program = next(iter(model.programs.values()))
    peaks = [compiled_memory(step).peak_bytes for step in (program.prefill, program.decode)]
    weights = sum(array.nbytes for array in jax.tree.leaves(model.params)) / 8
    assert program.peak_bytes == max(peaks) > weights


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs scripts/generate.py in this process; returns (exit code, stdout, stderr)."""

    def call(*arguments: str):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        code = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return call


def test_script_continues_a_file_after_the_chat_template(script, folder, model, tmp_path):
    (tmp_path / "prompt.txt").write_text("Why?")
    flags = ["--prompt-file", str(tmp_path / "prompt.txt"), "--chat", "--max-new-tokens", "5"]
    code, out, err = script(str(folder), *flags, "--temperature", "0.7", "--top-k", "9", "--seed", "3")
    sampling = inference.Sampling(temperature=0.7, top_k=9, seed=3)
    found = inference.generate(model, ["<s>Why?</s>!"], max_new_tokens=5, sampling=sampling)[0]
    assert (code, out) == (0, found.text + "\n")
    assert err.startswith(f"tsp (data=1,tsp=8), {KERNEL}: prefill 7 tokens, ")


def test_script_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 60


@pytest.fixture
def broken(folder, tmp_path):
    """A copy of the folder to break."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def edit_config(folder: Path, **changes) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def edit_weights(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / SINGLE)
    save_file({**tensors, name: change(tensors.get(name))}, folder / SINGLE)


DOWN = "model.layers.1.mlp.down_proj.weight"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json does not exist"]),
    "unknown architecture": (lambda f: edit_config(f, architectures=["MambaForCausalLM"]), ["Mamba", "use Llama"]),
    "quantized": (
        lambda f: edit_config(f, quantization_config={"quant_method": "awq"}),
        ['quantization_config.quant_method="awq" is not supported', "use a model that is not quantized"],
    ),
    "no weights": (lambda f: (f / SINGLE).unlink(), ["holds neither model.safetensors nor"]),
    "cut weights": (lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-40]), ["not an intact safetensors"]),
    "no safetensors": (lambda f: (f / SINGLE).write_text("version https://git-lfs"), ["not an intact safetensors"]),
    "other sizes": (lambda f: edit_config(f, intermediate_size=128), ["has shape", "the model needs [28, 128]"]),
    "wrong shape": (lambda f: edit_weights(f, DOWN, lambda a: a[:, :-1].copy()), [DOWN, "has shape [28, 119]"]),
    "wrong dtype": (
        lambda f: edit_weights(f, DOWN, lambda a: a.astype(np.int8)),
        [DOWN, "is I8", "use weights in F32"],
    ),
    "unknown tensor": (lambda f: edit_weights(f, "model.bias", lambda _: np.zeros(3, np.float32)), ["model.bias"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json does not exist"]),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), ["tokenizer.json is not a tokenizer"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused_in_a_line(case, broken, script):
    change, words = BROKEN[case]
    change(broken)
    check_refused(script, broken, [], words)


FLAGS = {
    "empty prompt": (["--prompt", ""], ["prompt='' is empty"]),
    "empty file": (["--prompt", "", "--prompt-file", "/dev/null"], ["/dev/null is empty"]),
    "no file": (["--prompt", "", "--prompt-file", "no.txt"], ["prompt_file=no.txt cannot be read"]),
    "both prompts": (["--prompt-file", "no.txt"], ["both prompt and prompt_file"]),
    "prompt longer than the cache": (["--capacity", "20"], ["capacity=20", "19 tokens", "use capacity=83"]),
    "unknown tokens": (["--prompt", "fox \u00fc"], ["has no token for '\u00fc'"]),
    "no new tokens": (["--max-new-tokens", "0"], ["max_new_tokens=0", "use 1"]),
    "negative temperature": (["--temperature", "-1"], ["temperature=-1.0", "use 0"]),
    "no temperature": (["--temperature", "nan"], ["temperature=nan", "use 0"]),
    "seed of 33 bits": (["--seed", "4294967296"], ["seed=4294967296", "4294967295"]),
    "no end of memory": (["--capacity", "1000000000"], ["capacity=1000000000", "use at most"]),
    "no end of a file": (["--prompt", "", "--prompt-file", "/dev/zero"], ["/dev/zero has more than"]),
    "top p": (["--top-p", "1.5"], ["top_p=1.5"]),
    "unknown layout": (["--layout", "tps"], ["layout=tps", "tp_sp"]),
    "layout that cannot serve": (
        ["--layout", "dp(batch=data+node,weights=data)", "--mesh", "data=2,node=2"],
        ["layout=dp(batch=data+node,weights=data): batch=data+node must name", "use batch=node+data"],
    ),
    "unknown axis": (["--mesh", "model=2"], ["'model'", "tsp"]),
    "mesh larger than the devices": (["--mesh", "tsp=16"], ["there are 8", "--cpu-devices 16"]),
    "indivisible chunk": (["--chunk", "9"], ["chunk=9", "use 16"]),
    "unknown flag": (["--temprature", "1"], ["--temprature"]),
    "unknown dtype": (["--dtype", "float16"], ["float16", "bfloat16"]),
}


@pytest.mark.parametrize("case", FLAGS)
def test_bad_flags_are_refused_in_a_line(case, broken, script):
    flags, words = FLAGS[case]
    check_refused(script, broken, flags, words)


def test_a_folder_without_a_chat_template_is_refused(broken, script):
    (broken / "tokenizer_config.json").unlink()
    check_refused(script, broken, ["--chat"], ["has no chat template", "without --chat"])


def check_refused(script, folder: Path, flags: list[str], words: list[str]) -> None:
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    prompt = [] if "--prompt" in flags else ["--prompt", PROMPT]
    code, out, err = script(str(folder), *prompt, *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("arguments", "words"), [([], "a model comes first"), (["nowhere"], "nowhere")])
def test_a_model_that_is_not_there_is_refused(arguments, words, script):
    code, out, err = script(*arguments, *(["--prompt", "x"] if arguments else []))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
