"""Error feedback against its definition, the store of codes, and calibrated conversions of tiny models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert import feedback, model_run, reference, search, search_torch  # noqa: E402
from convert.__main__ import main  # noqa: E402
from convert.calibrate import calibrate  # noqa: E402
from convert.checkpoint import Checkpoint  # noqa: E402
from convert.code_store import CodeStore, row_digests  # noqa: E402
from convert.codebook import codebook  # noqa: E402
from convert.errors import ConvertError  # noqa: E402
from convert.evaluate import bits_per_weight, load_transformers  # noqa: E402
from convert.format import ModuleSpec, default_block_size  # noqa: E402
from convert.layer_walk import LayerRun, head_inputs  # noqa: E402
from convert.reference import Encoded  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402

SPEC = ModuleSpec(4, 64, 200)  # pads to 256


def problem(tokens: int = 2000, seed: int = 0):
    """A rotated weight [40, 256], correlated inputs [tokens, 256] and their second moment."""
    generator = torch.Generator().manual_seed(seed)
    weight = feedback.rotate_rows(torch.randn(40, 200, generator=generator), 64)
    mixing = torch.randn(256, 256, generator=generator) * torch.logspace(0, -1.5, 256)
    inputs = torch.randn(tokens, 256, generator=generator) @ mixing / 16 + 0.05 * torch.randn(tokens, 256)
    return weight, inputs, inputs.T @ inputs / tokens


def nearest(weight, norms, spec) -> feedback.Rounding:
    """A rotated weight rounded to the nearest codes under given norms."""
    scaled = weight.reshape(len(weight), spec.blocks, -1) * (spec.block_size**0.5 / norms)[..., None]
    codes = torch.from_numpy(reference.nearest(scaled.numpy(), spec.bits)).reshape(weight.shape)
    return feedback.Rounding(codes.long(), norms.half().float(), spec)


def searched(weight, spec) -> torch.Tensor:
    """Norms of a rotated weight as the search encoder takes them."""
    return search_torch.best_norms(weight.reshape(-1, spec.block_size), spec.bits).reshape(len(weight), -1)


def output_error(state: feedback.Rounding, weight, hessian) -> float:
    difference = state.values() - weight
    return float(((difference @ hessian) * difference).sum())


def test_every_step_lowers_the_output_error():
    weight, _, hessian = problem()
    raised = feedback.damped(hessian)
    norms = searched(weight, SPEC)
    errors = [output_error(nearest(weight, norms, SPEC), weight, raised)]
    errors += [
        output_error(feedback.round_with_feedback(weight, hessian, norms, SPEC, r), weight, raised) for r in range(3)
    ]
    assert errors[1] < 0.6 * errors[0]  # error feedback alone; measured .39
    assert errors[3] < errors[2] < errors[1]


def test_without_correlation_feedback_is_plain_rounding():
    weight, _, _ = problem()
    norms = searched(weight, SPEC)
    state = feedback.round_with_feedback(weight, torch.eye(256), norms, SPEC, rounds=0)
    assert torch.equal(state.codes, nearest(weight, norms, SPEC).codes)


def test_row_errors_are_the_errors_of_the_outputs():
    weight, inputs, _ = problem(tokens=300)
    other = inputs + 0.1 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(1))
    values = weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    outputs = inputs @ weight.T
    found = feedback.row_errors(values, other.T @ other, outputs.T @ other)
    expected = (outputs - other @ values.T).square().sum(0) - outputs.square().sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)  # float32 sums of 300 x 256 products


def test_compensation_undoes_a_linear_change_of_the_inputs():
    weight, inputs, _ = problem()
    change = torch.eye(256) + 0.05 * torch.randn(256, 256, generator=torch.Generator().manual_seed(3))
    changed = inputs @ change
    target = feedback.compensated(weight, changed.T @ changed / 2000, weight @ inputs.T @ changed / 2000)
    before, after = ((inputs @ weight.T - changed @ each.T).square().mean() for each in (weight, target))
    assert after < (1 - feedback.COMPENSATION) ** 2 * 1.1 * before  # what is left shrinks in proportion


@pytest.mark.parametrize("hessian", [torch.zeros(256, 256), torch.full((256, 256), float("nan"))])
def test_singular_moment_is_refused(hessian):
    weight, _, _ = problem()
    with pytest.raises(feedback.SingularHessianError):
        feedback.round_with_feedback(weight, hessian, torch.ones(40, 4), SPEC, 1)


def test_dead_inputs_do_not_break_the_factorization():
    weight, inputs, _ = problem()
    inputs[:, 10:100] = 0
    state = feedback.round_with_feedback(weight, inputs.T @ inputs / 2000, torch.ones(40, 4), SPEC, 1)
    assert torch.isfinite(state.values()).all()


def test_store_finds_rows_under_any_name(tmp_path: Path):
    rng = np.random.default_rng(0)
    first, second, unknown = (rng.standard_normal((n, 200)).astype(np.float32) for n in (5, 7, 3))
    marked = [
        Encoded(np.full((len(w), 256), i, np.uint8), np.full((len(w), 4), i, np.float16))
        for i, w in ((1, first), (2, second))
    ]
    store = CodeStore(tmp_path / "store", "a")
    store.save("layer-0", [(row_digests(first), marked[0], SPEC)])
    store.save("layer-1", [(row_digests(second), marked[1], SPEC)])
    assert store.has("layer-1") and not store.has("layer-2")
    stacked = np.concatenate([second[::-1], unknown, first])  # joined and permuted, with rows nobody calibrated
    found = CodeStore(tmp_path / "store", "a").encoder()(stacked, SPEC)
    np.testing.assert_array_equal(found.norms[:, 0], [2] * 7 + [float(x) for x in found.norms[7:10, 0]] + [1] * 5)
    np.testing.assert_array_equal(found.codes[:7], 2)
    np.testing.assert_array_equal(found.codes[10:], 1)
    expected = search.encode(unknown, SPEC)
    np.testing.assert_array_equal(found.codes[7:10], expected.codes)
    np.testing.assert_array_equal(found.norms[7:10], expected.norms)
    with pytest.raises(ConvertError, match="calibration of another model, text or recipe"):
        CodeStore(tmp_path / "store", "b")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two disjoint texts of random words."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlu"), rng.integers(2, 8))) for _ in range(200)]
    root = tmp_path_factory.mktemp("texts")
    paths = {}
    for name, count in (("calibration", 3000), ("evaluation", 500)):
        paths[name] = root / f"{name}.txt"
        paths[name].write_text(" ".join(rng.choice(words, count)), encoding="utf-8")
    return paths


def run(source: Path, output: Path, *options: str) -> int:
    return main(["--model", str(source), "--output", str(output), "--target", "cuda", "--bits", "3", *options])


def divergence(directory: Path, source: Path, text: Path, capsys: pytest.CaptureFixture) -> float:
    capsys.readouterr()
    arguments = ["eval", str(directory), "--against", str(source), "--text", str(text), "--device", "cpu", "--json"]
    assert main([*arguments, "--max-tokens", "2048"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["kl"]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_calibrated_conversion_beats_search(family: str, texts: dict[str, Path], tmp_path: Path, capsys):
    source = tiny_model(family, tmp_path / "source", dtype="float32")
    assert run(source, tmp_path / "search") == 0
    assert (
        run(source, tmp_path / "calibrated", "--encoder", "calibrated", "--calibration", str(texts["calibration"])) == 0
    )
    said = capsys.readouterr().err
    assert re.search(r"[1-9]\d* matrices calibrated", said)
    assert not (tmp_path / "calibrated.calibration").exists()
    plain, found = (
        divergence(tmp_path / name, source, texts["evaluation"], capsys) for name in ("search", "calibrated")
    )
    assert found < 0.8 * plain
    first, second = (Checkpoint.open(tmp_path / name) for name in ("search", "calibrated"))
    assert first.quantization == second.quantization


def test_model_writes_its_own_calibration_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts, capsys):
    monkeypatch.setattr(model_run, "CALIBRATION_WINDOWS", 16)
    source = tiny_model("llama", tmp_path / "source", dtype="float32")
    assert run(source, tmp_path / "calibrated", "--encoder", "calibrated") == 0
    assert re.search(r"[1-9]\d* matrices calibrated", capsys.readouterr().err)


def test_too_short_calibration_text_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture):
    source = tiny_model("llama", tmp_path / "source", dtype="float32")
    (tmp_path / "short.txt").write_text("a" * 700, encoding="utf-8")
    options = ("--encoder", "calibrated", "--calibration", str(tmp_path / "short.txt"))
    assert run(source, tmp_path / "out", *options) == 1
    assert "at least 1024 are needed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt", "source"]


def specs_of(model) -> dict[int, ModuleSpec]:
    """3 bits for every matrix and every expert of the decoder layers."""
    found = {}
    for name, weight in model.named_parameters():
        if weight.ndim in (2, 3) and ".layers." in name and not name.endswith(".gate.weight"):
            rows = weight.detach().reshape(-1, weight.shape[-1])[:: weight.shape[-2]]
            spec = ModuleSpec(3, default_block_size(weight.shape[-1]), weight.shape[-1])
            found.update(dict.fromkeys(map(int, row_digests(rows.float().numpy())), spec))
    return found


def test_experts_with_few_tokens_fall_back_and_say_so(tmp_path: Path):
    model = load_transformers(tiny_model("qwen3_moe", tmp_path / "source", dtype="float32"), "auto")
    specs = specs_of(model)
    windows = np.random.default_rng(0).integers(0, 256, (8, 40))  # 4 windows of 40 tokens to fit, 4 to judge
    outcome = calibrate(model, windows, lambda d: specs.get(int(d[0])), CodeStore(tmp_path / "store", ""))
    assert outcome.accepted + len(outcome.fallbacks) == len(specs)
    few = [each for each in outcome.fallbacks if re.search(r"experts.* \d+ calibration tokens for \d+ inputs", each)]
    assert few


def test_finished_layers_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tiny_model("llama", tmp_path / "source", dtype="float32")
    windows = np.random.default_rng(0).integers(0, 256, (8, 128))
    specs = specs_of(load_transformers(source, "auto"))

    def codes(store: CodeStore) -> Encoded:
        calibrate(load_transformers(source, "auto"), windows, lambda d: specs.get(int(d[0])), store)
        weight = load_transformers(source, "auto").model.layers[1].mlp.down_proj.weight.detach().numpy()
        return store.encoder()(weight, ModuleSpec(3, default_block_size(weight.shape[-1]), weight.shape[-1]))

    whole = codes(CodeStore(tmp_path / "whole", ""))
    part = CodeStore(tmp_path / "part", "")
    codes(part)
    (tmp_path / "part" / "layer-00001.safetensors").unlink()  # as if the run had ended after the first layer
    stages = []
    original = LayerRun.stages
    monkeypatch.setattr(LayerRun, "stages", lambda run, hidden: stages.append(run) or original(run, hidden))
    resumed = codes(part)
    assert len(stages) == 1
    np.testing.assert_array_equal(resumed.codes, whole.codes)
    np.testing.assert_array_equal(resumed.norms, whole.norms)


def test_auto_recipe_beats_uniform_at_equal_size(texts: dict[str, Path], tmp_path: Path, capsys):
    source = tiny_model("llama", tmp_path / "source", dtype="float32")
    assert run(source, tmp_path / "uniform") == 0
    bits = bits_per_weight(tmp_path / "uniform")
    options = ("--recipe", "auto", "--target-bpw", str(bits), "--calibration", str(texts["calibration"]))
    assert run(source, tmp_path / "auto", *options) == 0
    assert bits_per_weight(tmp_path / "auto") <= bits
    uniform, auto = (divergence(tmp_path / name, source, texts["evaluation"], capsys) for name in ("uniform", "auto"))
    assert auto < uniform


def test_calibrated_auto_recipe_is_measured_with_calibrated_codes(texts: dict[str, Path], tmp_path: Path, capsys):
    """Its plan is better for calibrated codes than the one that search's codes lead to."""
    source = tiny_model("qwen3", tmp_path / "source", dtype="float32")
    text = ("--calibration", str(texts["calibration"]))
    auto = ("--recipe", "auto", "--target-bpw", "3.25", *text)
    assert run(source, tmp_path / "searched", *auto) == 0
    assert run(source, tmp_path / "auto", "--encoder", "calibrated", *auto) == 0
    plan = {name: spec.bits for name, spec in Checkpoint.open(tmp_path / "searched").quantization.modules.items()}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    options = ("--recipe", str(tmp_path / "plan.json"), "--encoder", "calibrated", *text)
    assert run(source, tmp_path / "replanned", *options) == 0
    assert bits_per_weight(tmp_path / "auto") <= 3.25
    assert not list(tmp_path.glob("*.probe"))
    ours, others = (divergence(tmp_path / name, source, texts["evaluation"], capsys) for name in ("auto", "replanned"))
    assert ours < others


def test_impossible_target_is_refused_before_the_model_is_loaded(tmp_path: Path, monkeypatch, capsys):
    source = tiny_model("llama", tmp_path / "source", dtype="float32")
    monkeypatch.setattr(model_run.SourceModel, "load", lambda *_: pytest.fail("loaded"))
    capsys.readouterr()  # a progress bar of transformers, where no test before has switched it off
    assert run(source, tmp_path / "out", "--recipe", "auto", "--target-size", "1kB") == 1
    error = capsys.readouterr().err
    assert "cannot be met: 2 bits everywhere take" in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_head_is_rounded_against_what_it_reads(tmp_path: Path):
    """Tied and not: with the head alone quantized, calibration leaves the model closer to itself than search."""
    windows = np.random.default_rng(0).integers(0, 256, (16, 128))
    for family in ("llama", "qwen3"):
        source = tiny_model(family, tmp_path / family, dtype="float32")
        model = load_transformers(source, "auto")
        head = model.get_output_embeddings().weight
        spec = ModuleSpec(3, default_block_size(head.shape[1]), head.shape[1])
        first = int(row_digests(head[:1].detach().numpy())[0])
        specs = {first: spec}
        store = CodeStore(tmp_path / f"{family}-store", "")
        before = model.get_input_embeddings().weight.clone()
        outcome = calibrate(model, windows, lambda d, specs=specs: specs.get(int(d[0])), store)
        assert outcome.accepted == 1 and not outcome.fallbacks
        assert torch.equal(model.get_input_embeddings().weight, before)
        weight = head.detach().numpy()
        inputs = head_inputs(model, model.get_output_embeddings(), torch.from_numpy(windows[::-1, ::-1].copy()))
        errors = []
        for encoded in (store.encoder()(weight, spec), search.encode(weight, spec)):
            difference = torch.from_numpy(reference.decode(encoded, spec, codebook(3), np.float32) - weight)
            errors.append(float((inputs.detach() @ difference.T).square().mean()))
        assert errors[0] < 0.95 * errors[1], family


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--encoder", "calibrated", "--calibration", "no/such/file"), "--calibration no/such/file: No such file"),
        (("--calibration", "self"), "--calibration serves --encoder calibrated and --recipe auto"),
        (("--recipe", "auto"), "--recipe auto needs --target-bpw or --target-size"),
        (("--target-bpw", "4"), "--target-bpw and --target-size serve --recipe auto"),
    ],
)
def test_bad_options_are_one_sentence(texts, tmp_path: Path, capsys, options: tuple[str, ...], message: str):
    source = tiny_model("llama", tmp_path / "source", dtype="float32")
    assert run(source, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
