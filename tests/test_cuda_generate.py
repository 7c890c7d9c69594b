"""Text generation against transformers' own, and the command line."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import hlwq_cuda  # noqa: E402
from convert.checkpoint import Checkpoint  # noqa: E402
from hlwq_cuda import decode, generate  # noqa: E402
from hlwq_cuda.__main__ import main  # noqa: E402
from hlwq_cuda.decode import HostSampler, Sampling  # noqa: E402
from tests.hlwq_models import compare_greedy, converted, random_ids  # noqa: E402
from tests.tiny_models import FAMILIES  # noqa: E402

NEW = 24
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def llama(root: Path) -> hlwq_cuda.LanguageModel:
    return hlwq_cuda.load(converted("llama", root), device="cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str, root: Path):
    compare_greedy(converted(family, root), "cpu", "exact", bound=2**-8)


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_5"])
def test_fused_step_and_device_sampler_in_the_loop(family: str, root: Path, tmp_path: Path, monkeypatch):
    """What a GPU would run, but for the graph: here the small kernels run in Triton's interpreter.

    The step stacks weights that read the same row; what is saved afterwards is still what was loaded.
    """
    pytest.importorskip("triton")
    monkeypatch.setattr(decode, "make_step", decode.FusedModelStep)
    monkeypatch.setattr(decode, "make_sampler", decode.DeviceSampler)
    directory = converted(family, root)
    model = compare_greedy(directory, "cpu", "exact", bound=2**-6, new=5, prompts=[random_ids(9)], least=4)
    model.model.save_pretrained(tmp_path)
    loaded, saved = Checkpoint.open(directory), Checkpoint.open(tmp_path)
    assert saved.quantization.modules.keys() == loaded.quantization.modules.keys()
    for name in saved.tensors:  # Qwen3.5's causal language model has no vision tower
        assert loaded.tensor(name).tobytes() == saved.tensor(name).tobytes(), name


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_on_the_gpu(family: str, root: Path):
    """exact multiplies in fp16, which moves these logits by .0033 of their size, five times that through DeltaNet."""
    compare_greedy(converted(family, root), "cuda", "exact", bound=0.04 if family == "qwen3_5" else 2**-7)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_int8_greedy_equals_transformers_on_the_gpu(family: str, root: Path):
    """Two random layers move logits by up to .14 of their size; random routers and states of DeltaNet by any amount."""
    compare_greedy(converted(family, root), "cuda", "int8", bound=0.28, least=4)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_captured(family: str, root: Path, recwarn):
    model = hlwq_cuda.load(converted(family, root), device="cuda")
    list(model.generate_tokens([1, 2, 3], 4))
    assert not [warning for warning in recwarn if "CUDA graph" in str(warning.message)]
    fused = family in ("llama", "qwen3", "qwen3_5")
    assert model.description.endswith("fused step" if fused else "transformers module")


def test_an_answer_is_its_pieces(llama):
    pieces = list(llama.stream("Hello", max_new_tokens=NEW))
    assert "".join(pieces) == llama.generate("Hello", max_new_tokens=NEW)
    tokens = list(llama.generate_tokens(llama.encode("Hello"), NEW))
    assert "".join(pieces) == llama.tokenizer.decode(tokens, skip_special_tokens=True)
    assert llama.timing.prompt_tokens == len(llama.encode("Hello"))
    assert llama.timing.new_tokens == NEW and llama.timing.peak_bytes > 2**20


def test_pieces_keep_the_spaces_between_words():
    """With a tokenizer of Llama's kind, which drops the first space of a text; and bytes that make one letter."""
    from tokenizers import Tokenizer, decoders, models

    words = ["\u2581The", "\u2581sea", "\u2581is", "<0xC3>", "<0xB6>", "de", "</s>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert list(generate.text_pieces(fast, [0, 1, 2, 3, 4, 5, 1])) == ["The", " sea", " is", "\u00f6", "de", " sea"]
    assert list(generate.text_pieces(fast, [])) == []
    assert "".join(generate.text_pieces(fast, [0, 3])) == "The\ufffd"  # the text ends within a letter


def test_an_answer_fills_the_context_at_most(root: Path):
    """Unless a number of tokens is asked for, which must fit."""
    model = hlwq_cuda.load(converted("llama", root), device="cpu")
    model.tokenizer.eos_token_id = model.model.generation_config.eos_token_id = None
    model.model.config.eos_token_id = None
    assert sum(1 for _ in model.generate_tokens([5] * 500)) == 12
    with pytest.raises(generate.PromptError, match="500 tokens and 13 new ones are asked for"):
        next(model.generate_tokens([5] * 500, 13))
    with pytest.raises(generate.PromptError, match="the prompt has 512 tokens"):
        next(model.generate_tokens([5] * 512))


def test_the_chat_template_is_used(llama):
    text = "<|user|>Hi<|end|><|assistant|>"
    assert llama.tokenizer.decode(llama.encode("Hi")) == text
    assert llama.encode([{"role": "user", "content": "Hi"}]) == llama.encode("Hi")


def test_seeds_repeat_and_differ(llama):
    answers = [list(llama.generate_tokens([1, 2], NEW, Sampling(2.0, 0.9, seed))) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_prompt_after_a_longer_one(llama):
    """The cache is reused, and nothing of the last prompt is left in it."""
    expected = list(llama.generate_tokens([5, 6, 7], NEW))
    list(llama.generate_tokens(list(range(100)), NEW))
    assert list(llama.generate_tokens([5, 6, 7], NEW)) == expected
    list(llama.generate_tokens(list(range(250)), NEW))  # a new cache
    assert list(llama.generate_tokens([5, 6, 7], NEW)) == expected


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_5"])
def test_a_conversation_goes_on_from_its_cache(family: str, root: Path):
    """Equal to reading the whole conversation anew; what the last answer computed beyond its end does not count."""
    model = hlwq_cuda.load(converted(family, root), device="cpu")
    ids = random_ids(30)[0].tolist()
    answer = list(model.generate_tokens(ids, 12))
    assert model.timing.cached_tokens == 0
    for following in (
        [*ids, *answer, 7, 8, 9],
        [*ids, *answer[:5], 11],
    ):  # the second goes back
        found = list(model.generate_tokens(following, 12))
        cached = model.timing.cached_tokens
        assert cached == (0 if family == "qwen3_5" else len(ids) + min(len(following) - len(ids) - 1, 11))
        assert found == list(hlwq_cuda.LanguageModel(model.model, model.tokenizer).generate_tokens(following, 12))


def test_the_fused_step_goes_on_from_its_cache(root: Path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(decode, "make_step", decode.FusedModelStep)
    model = hlwq_cuda.load(converted("llama", root), device="cpu")
    ids = random_ids(30)[0].tolist()
    answer = list(model.generate_tokens(ids, 4))
    following = [*ids, *answer, 7, 8]
    found = list(model.generate_tokens(following, 4))
    assert model.timing.cached_tokens == len(ids) + 3
    assert found == list(hlwq_cuda.LanguageModel(model.model, model.tokenizer).generate_tokens(following, 4))


def test_room_for_tokens():
    assert [generate.cache_length(tokens) for tokens in (1, 256, 257, 640, 4096)] == [256, 256, 512, 1024, 4096]
    assert [generate.cache_length(tokens) for tokens in (4097, 8192, 8193)] == [8192, 8192, 12288]


def test_the_host_sampler_keeps_the_nucleus():
    logits, token = torch.tensor([0.0, 2.0, 1.0, -3.0]), torch.zeros(1, dtype=torch.int64)
    sampler = HostSampler()
    sampler.set(Sampling(temperature=1.0, top_p=0.8))  # probabilities .09 .66 .24 .004: the two best reach .9
    drawn = []
    for position in range(200):
        sampler.choose(logits, torch.tensor([position]), token)
        drawn.append(int(token))
    assert set(drawn) == {1, 2}
    assert 0.62 < drawn.count(1) / 200 < 0.84  # .731, three standard errors of .031


def test_generate_on_the_command_line(root: Path, capsys):
    arguments = ["generate", "--model", str(converted("llama", root)), "--prompt", "Hi", "--max-new-tokens", "6"]
    assert main([*arguments, "--temperature", "0.7", "--top-p", "0.9", "--seed", "3", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "tokens/s" in err and "peak memory" in err and "CPU, exact" in err


def test_a_closed_pipe_is_no_error(root: Path):
    """`generate ... | head -c 1`."""
    command = [
        sys.executable,
        "-m",
        "hlwq_cuda",
        "generate",
        "--model",
        str(converted("llama", root)),
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        [*command, "--prompt", "Hi"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 0 and "Traceback" not in err and "BrokenPipe" not in err


def test_chat_remembers_the_turns(root: Path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("One\nTwo\n\n"))
    assert main(["chat", "--model", str(converted("llama", root)), "--max-new-tokens", "4", "--device", "cpu"]) == 0
    timings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prompt:")]
    first, second = (int(line.split()[1]) for line in timings)
    assert second > 2 * first - 4  # the second prompt holds the first and its answer


def test_without_a_gpu_it_says_so(root: Path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["generate", "--model", str(converted("llama", root)), "--prompt", "Hi", "--max-new-tokens", "2"]) == 0
    assert "running on the CPU" in capsys.readouterr().err
