"""What is read from a compiled TPU program: kinds of instructions, bytes of collectives."""

import pytest

from benchmarks.tpu_estimate import Instruction, _Program


@pytest.mark.parametrize(
    ("text", "operation", "moved"),
    [
        ("bf16[4,8]{1,0} all-gather(bf16[1,8] %x)", "all-gather", 64),
        ("(f32[16], f32[8], f32[2]{0}) all-reduce(%a, %b, %c)", "all-reduce", 104),
        ("(bf16[1,8]{1,0}, bf16[4,8]{1,0}) all-gather-start(%x)", "all-gather-start", 64),
        (
            "(f32[6], f32[6], u32[], u32[]) collective-permute-start(%x)",
            "collective-permute-start",
            24,
        ),
    ],
)
def test_bytes_of_collectives(text, operation, moved):
    instruction = Instruction("x", text)
    assert (instruction.operation, instruction.bytes) == (operation, moved)


def test_kinds():
    program = _Program(
        "%inside (x: f32[8]) -> f32[8] {\n"
        "  ROOT %c = f32[8]{0} convolution(%x, %x), dim_labels=b0f_0io->b0f\n"
        "}\n"
        "ENTRY %main (x: f32[8]) -> f32[8] {\n"
        "  %fusion.1 = f32[8]{0} fusion(%x), kind=kOutput, calls=%inside\n"
        "  %copy.2 = f32[8]{0} copy(%fusion.1)\n"
        '  %k.3 = f32[8]{0} custom-call(%copy.2), custom_call_target="tpu_custom_call"\n'
        "  %done = f32[8]{0} all-gather-done(%k.3)\n"
        "  ROOT %add.4 = f32[8]{0} add(%done, %x)\n"
        "}\n"
    )
    kinds = [program.kind(i) for i in program.computations[program.entry]]
    assert kinds == ["products", "copies", "kernels", "collectives", "the rest"]
