"""What calibration knows of a layer: how much tokens count, which matrices write to the stream, and their targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from convert import feedback  # noqa: E402
from convert.evaluate import load_transformers  # noqa: E402
from convert.layer_walk import LayerRun, decoder_layers, enter, record_calls, show_experts, watch  # noqa: E402
from convert.moments import Moments, gather  # noqa: E402
from convert.token_weights import gradient_squares, token_weights  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402

WINDOWS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 40)))


def model_of(family: str, directory: Path):
    model = load_transformers(tiny_model(family, directory, dtype="float32"), "auto")
    show_experts(model)
    return model


def test_gradients_are_those_of_autograd(tmp_path: Path):
    model = model_of("llama", tmp_path / "source")
    found = gradient_squares(model, decoder_layers(model), WINDOWS)
    generator = torch.Generator().manual_seed(0)  # as gradient_squares draws
    linears = {name: module for name, module in model.model.layers.named_modules() if hasattr(module, "in_features")}
    assert sum(map(len, found)) == len(linears) == 14
    for number, window in enumerate(WINDOWS):
        outputs: dict[str, Any] = {}
        handles = [
            module.register_forward_hook(lambda _, __, output, name=name, to=outputs: to.update({name: output}))
            for name, module in linears.items()
        ]
        model.get_input_embeddings().weight.requires_grad_(True)
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = -logits.log_softmax(-1)[torch.arange(40), drawn].sum()
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for handle in handles:
            handle.remove()
        for name, gradient in zip(outputs, gradients, strict=True):
            index, _, rest = name.partition(".")
            torch.testing.assert_close(
                found[int(index)][f"{rest}.weight"][number], gradient[0].square().sum(-1), rtol=1e-3, atol=1e-6
            )


def test_weights_of_matrices_that_share_their_input_are_of_both_gradients():
    first, second = torch.rand(3, 5), 100 * torch.rand(3, 5)
    found = token_weights({"a": first, "b": second}, ["a", "b"])
    assert found is not None
    torch.testing.assert_close(found, (first + second).sqrt() / (first + second).sqrt().mean())
    assert token_weights({"a": first}, ["a", "b"]) is None
    assert token_weights({"a": torch.zeros(3, 5)}, ["a"]) is None


def test_experts_have_no_weights_and_routers_have(tmp_path: Path):
    model = model_of("qwen3_moe", tmp_path / "source")
    found = gradient_squares(model, decoder_layers(model), WINDOWS)
    assert all("self_attn.q_proj.weight" in layer and not any(".experts" in name for name in layer) for layer in found)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_writers_are_recognized(family: str, tmp_path: Path):
    """In Llama what o and down give is added as it is; in Gemma a norm stands between."""
    model = model_of(family, tmp_path / "source")
    layers = decoder_layers(model)
    with torch.no_grad():
        (hidden,) = enter(model, layers, [WINDOWS])
        run = LayerRun(layers[0], record_calls(model, layers, WINDOWS)[0], "cpu")
        stages = [[name for group in stage for name in group] for stage in run.stages(hidden)]
        found = {}
        for number, stage in enumerate(stages):
            later = [name for following in stages[number + 1 :] for name in following]
            found |= {name.split(".")[1]: run.writes(name, later, hidden) for name in stage}
    assert {name for name, writes in found.items() if writes} == (
        {"o_proj", "down_proj"} if family == "llama" else set()
    )


def test_writers_aim_at_the_stream_of_the_unquantized_model(tmp_path: Path):
    """The outputs that o_proj is fitted to, added to the quantized stream, give the unquantized one behind it."""
    model = model_of("llama", tmp_path / "source")
    layers = decoder_layers(model)
    counts = 0.5 + torch.rand(WINDOWS.shape, generator=torch.Generator().manual_seed(1))
    name, later = "self_attn.o_proj.weight", [f"mlp.{each}_proj.weight" for each in ("gate", "up", "down")]
    with torch.no_grad():
        (exact,) = enter(model, layers, [WINDOWS])
        hidden = exact + 0.1 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(2))
        run = LayerRun(layers[0], record_calls(model, layers, WINDOWS)[0], "cpu")
        run.weights()["self_attn.v_proj.weight"].mul_(1.1)
        fit, judge = gather(run, [name], later, [(hidden, exact)] * 2, [False, True], [counts, counts])
        weight = feedback.rotate_rows(run.weights()[name], 64)
        hessian, wanted = fit[name].rotated(weight, 64)
        inputs, exact_inputs = run.inputs(hidden, [name])[name], run.inputs(exact, [name], exact=True)[name]
        stream = exact.flatten(0, 1) + exact_inputs @ run.weights()[name].T  # behind o_proj, which is untouched yet
        outputs = stream - hidden.flatten(0, 1)
        weighted = feedback.rotate_rows(inputs * counts.reshape(-1, 1), 64) / counts.sum()
        torch.testing.assert_close(hessian, feedback.rotate_rows(inputs, 64).T @ weighted, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(wanted, outputs.T @ weighted, rtol=1e-3, atol=1e-3)
    assert judge[name].tokens == fit[name].tokens == WINDOWS.numel()


def test_readers_aim_at_the_outputs_of_the_unquantized_model():
    generator = torch.Generator().manual_seed(0)
    inputs, exact, weight = (torch.randn(shape, generator=generator) for shape in ((50, 128), (50, 128), (7, 128)))
    moments = Moments()
    moments.add(inputs, exact)
    _, wanted = moments.rotated(feedback.rotate_rows(weight, 64), 64)
    expected = (exact @ weight.T).T @ feedback.rotate_rows(inputs, 64) / 50
    torch.testing.assert_close(wanted, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_silent_matrices_give_their_bias(bias: bool):
    module, inputs = torch.nn.Linear(4, 3, bias=bias), torch.rand(2, 5, 4)
    with torch.no_grad(), watch({module.weight.data_ptr(): "a"}, silent=["a"]):
        found = module(inputs)
    assert torch.equal(found, module.bias.expand(2, 5, 3) if bias else torch.zeros(2, 5, 3))
