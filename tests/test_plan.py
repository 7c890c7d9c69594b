"""plan.py: sizes, totals, and the split over devices, from names and shapes alone."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from convert.errors import ConvertError
from convert.format import ModuleSpec
from convert.plan import READER_POWER, TIED_POWER, column_power, legal_tensor_parallel, make_plan
from convert.recipe import make_recipe
from convert.target import Kind, OutputTensor

BF16 = np.dtype(ml_dtypes.bfloat16)


def tensor(name: str, shape: tuple[int, ...], kind: Kind | None = Kind.LINEAR, dtype: np.dtype = BF16) -> OutputTensor:
    return OutputTensor(name, shape, dtype, "file", kind, "" if kind else "small")


def test_tensors_bytes_and_bits():
    plan = make_plan([tensor("a.weight", (64, 256)), tensor("n.weight", (100,), None)], make_recipe("uniform", 4))
    assert [(stored.name, stored.dtype.name, stored.shape) for stored in plan.tensors[0].stored] == [
        ("a.weight_codes", "uint32", (64, 32)),
        ("a.weight_norms", "float16", (64, 2)),
    ]
    assert plan.tensors[1].stored[0].name == "n.weight"
    assert plan.nbytes == 64 * (128 + 4) + 200
    assert (plan.weights, plan.quantized_weights) == (64 * 256 + 100, 64 * 256)
    assert plan.bits_per_weight == 8 * plan.nbytes / plan.weights


def test_stacks_keep_their_leading_dimensions():
    plan = make_plan([tensor("m.experts.down_proj", (3, 64, 96), Kind.EXPERTS)], make_recipe("uniform", 3))
    assert plan.quantized[0].spec == ModuleSpec(3, 32, 96)
    assert [stored.shape for stored in plan.quantized[0].stored] == [(3, 64, 9), (3, 64, 3)]


def test_the_summary_is_that_of_the_most_weights():
    tensors = [
        tensor("a.weight", (64, 128)),
        tensor("b.weight", (64, 576)),
        tensor("e.weight", (9, 128), Kind.EMBEDDING),
    ]
    quantization = make_plan(tensors, make_recipe("uniform", 4, embed_bits=8)).quantization()
    assert (quantization.bits, quantization.block_size) == (4, 64)
    assert set(quantization.codebooks) == {4, 8} and set(quantization.modules) == {"a", "b", "e"}


def test_block_size_and_dtype_can_be_asked_for():
    tensors = [
        tensor("a.weight", (64, 256)),
        tensor("n.weight", (9,), None),
        tensor("i", (9,), None, np.dtype(np.int32)),
    ]
    plan = make_plan(tensors, make_recipe("uniform"), block_size=32, dtype=np.dtype(np.float32))
    assert plan.tensors[0].spec == ModuleSpec(4, 32, 256)
    assert [planned.dtype.name for planned in plan.tensors[1:]] == ["float32", "int32"]


def test_a_plan_without_quantized_modules_is_refused():
    with pytest.raises(ConvertError, match="nothing to quantize"):
        make_plan([tensor("n.weight", (100,), None)], make_recipe("uniform"))


def test_a_recipe_that_splits_fused_layers_is_refused(tmp_path):
    (tmp_path / "r.json").write_text('{"*.q_proj": 5}')
    with pytest.raises(ConvertError, match="engines fuse them into one matrix"):
        make_plan(
            [tensor("a.q_proj.weight", (64, 128)), tensor("a.k_proj.weight", (64, 128))],
            make_recipe(str(tmp_path / "r.json")),
        )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "down", "block", "degrees"),
    [
        (32, 8, (4096, 14336), None, [1, 2, 4, 8, 16]),  # Llama 3.1 8B: 112 blocks of 128
        (32, 8, (4096, 14336), 32, [1, 2, 4, 8, 16]),
        (9, 3, (576, 1536), None, [1]),  # SmolLM2: 9 heads
        (32, 8, (4096, 128 * 12), None, [1, 2, 4]),  # 12 blocks
        (32, 8, (4096, 200), None, [1]),  # padded rows cannot be cut
        (8, 2, (1024, 2048), None, [1, 2, 4, 8]),  # key-value heads are copied when there are fewer than devices
    ],
)
def test_legal_tensor_parallel(heads: int, kv_heads: int, down: tuple, block: int | None, degrees: list[int]):
    tensors = [
        tensor("l.mlp.down_proj.weight", down),
        tensor("l.mlp.up_proj.weight", (14336, 4096)),
        tensor("model.embed_tokens.weight", (259, 4096), Kind.EMBEDDING),
    ]
    plan = make_plan(tensors, make_recipe("uniform"), block)
    assert legal_tensor_parallel(plan, {"num_attention_heads": heads, "num_key_value_heads": kv_heads}) == degrees
    assert legal_tensor_parallel(plan, {"text_config": {"num_attention_heads": heads, "num_key_value_heads": kv_heads}})


def test_outputs_limit_tensor_parallel():
    plan = make_plan([tensor("l.mlp.up_proj.weight", (300, 4096))], make_recipe("uniform"))
    assert legal_tensor_parallel(plan, {"num_attention_heads": 32}) == [1, 2, 4]


def test_the_guard_is_an_empty_tensor_at_one_linear_layer():
    tensors = [
        tensor("embed_tokens.weight", (100, 64), Kind.EMBEDDING),
        tensor("mlp.experts.0.up_proj.weight", (64, 64)),
        tensor("q_proj.weight", (64, 64)),
        tensor("o_proj.weight", (64, 64)),
    ]
    plan = make_plan(tensors, make_recipe("uniform"))
    names = {stored.name for planned in plan.tensors for stored in planned.stored}
    added = [stored for planned in plan.guarded().tensors for stored in planned.stored if stored.name not in names]
    assert [(stored.name, stored.shape) for stored in added] == [("q_proj.weight", (0,))]
    assert plan.guarded().nbytes == plan.nbytes


def test_inputs_count_by_what_a_matrix_reads():
    names = ("layers.0.self_attn.q_proj", "layers.0.mlp.down_proj", "layers.0.linear_attn.out_proj")
    tensors = [tensor(f"{name}.weight", (64, 256)) for name in names]
    tensors += [
        tensor("layers.0.mlp.experts.gate_up_proj", (3, 64, 256), Kind.EXPERTS),
        tensor("embed_tokens.weight", (300, 256), Kind.EMBEDDING),
    ]
    powers = [planned.power for planned in make_plan(tensors, make_recipe("uniform", 4)).quantized]
    assert powers == [READER_POWER, 0.0, 0.0, READER_POWER, TIED_POWER]
    untied = make_plan([*tensors, tensor("lm_head.weight", (300, 256), Kind.HEAD)], make_recipe("uniform", 4))
    assert [planned.power for planned in untied.quantized[-2:]] == [0.0, 0.0]
    assert column_power("self_attn.v_proj.weight") == column_power("mlp.experts.gate_up_proj[3]") == READER_POWER
    assert column_power("mlp.experts.down_proj[3]") == column_power("self_attn.o_proj.weight") == 0.0
