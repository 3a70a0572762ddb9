"""What is read from a compiled TPU module: kinds of instructions, bytes of collectives."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from walt_jax import config as config_lib
from walt_jax.errors import UserError
from walt_jax.models import DenoiserConfig
from walt_jax.parallel import MeshConfig, make_mesh
from walt_jax.rehearsal import attention_prices
from walt_jax.rehearsal.attention_prices import AttentionKernel
from walt_jax.rehearsal.chips import Topology
from walt_jax.rehearsal.collectives import _seconds
from walt_jax.rehearsal.estimate import _moved, too_large
from walt_jax.rehearsal.hlo import Instruction, Module
from walt_jax.rehearsal.report import Report, lines, read, room
from walt_jax.rehearsal.steps import batches, steps
from walt_jax.training.experiment import Experiment

CONFIGS = Path(__file__).parents[1] / "configs"


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


def test_a_fused_sum_and_slice_is_a_reduce_scatter():
    module = Module(
        "%all-reduce-scatter.1 (x: bf16[64,128]) -> bf16[16,128] {\n"
        "  %sum = bf16[64,128]{1,0:T(8,128)} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}\n"
        "  ROOT %part = bf16[16,128]{1,0} dynamic-slice(%sum, %i), dynamic_slice_sizes={16,128}\n"
        "}\n"
        "ENTRY %main (x: bf16[64,128]) -> bf16[16,128] {\n"
        "  ROOT %f = bf16[16,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1\n"
        "}\n"
    )
    (fusion,) = module.computations[module.entry]
    (found,) = (i for i in module.inside(fusion) if i.is_collective)
    assert (found.operation, found.bytes) == ("reduce-scatter", 16 * 128 * 2)


def test_kinds():
    module = Module(
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
    kinds = [module.kind(i) for i in module.computations[module.entry]]
    assert kinds == ["products", "copies", "kernels", "collectives", "the rest"]


def test_loops_multiply_and_relayouts_are_found():
    module = Module(
        "%turned (x: f32[8,16]) -> f32[16,8] {\n"
        "  ROOT %t = f32[16,8]{1,0} transpose(%x), dimensions={1,0}\n"
        "}\n"
        "%condition (s: (s32[])) -> pred[] {\n"
        "  %n = s32[] constant(12)\n"
        "  ROOT %less = pred[] compare(%i, %n), direction=LT\n"
        "}\n"
        "%body (s: (s32[])) -> (s32[]) {\n"
        '  %fusion.1 = f32[16,8]{1,0} fusion(%x), calls=%turned, "estimated_cycles":"100"\n'
        "}\n"
        "ENTRY %main (x: f32[8,16]) -> f32[8,16] {\n"
        "  %w = (s32[], f32[8,16]{1,0}) while(%x), condition=%condition, body=%body\n"
        "}\n"
    )
    ((fusion, times),) = module.counts().items()
    assert (times, fusion.cycles) == (12, 100)
    assert _moved(module, fusion) == 16 * 8 * 4


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("f32[8] all-reduce(%x), replica_groups={{0,2},{1,3}}", [0, 2]),
        ("f32[8] all-gather(%x), replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("f32[8] all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("f32[8] all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        (
            "f32[8] all-reduce(%x), replica_groups=mesh['a'=2,'b'=4], "
            "device_ids=([4,2]T(1,0)) {'a'}",
            [0, 1],
        ),
        (
            "f32[8] all-reduce(%x), replica_groups=mesh['a'=2,'b'=2], device_ids=(0,4,1,5) {'b'}",
            [0, 4],
        ),
        ("f32[8] collective-permute(%x), source_target_pairs={{0,3},{3,0}}", [0, 3]),
    ],
)
def test_groups_of_collectives(text, group):
    assert Instruction("x", text).group() == group


@pytest.mark.parametrize(
    ("topology", "slices", "chips"),
    [("v5e:1x1", 1, 1), ("v6e:16x16", 4, 1024), ("v5p:8x8x16", 1, 1024)],
)
def test_slices(topology, slices, chips):
    found = Topology.parse(topology, slices)
    assert found.chips == chips
    assert topology in str(found)


@pytest.mark.parametrize(
    ("topology", "slices", "words"),
    [
        ("v5e:32x16", 1, "largest slice of v5e has 256"),
        ("v5e:3x4", 1, "no slice that is rented out"),
        ("v5p:4x4", 1, "has 3 axes"),
        ("v5p:16x4x4", 1, "rising order"),
        ("h100:8", 1, "v5e, v5p, v6e"),
        ("v5e:4x4", 0, "at least 1"),
    ],
)
def test_slices_that_nobody_rents(topology, slices, words):
    with pytest.raises(UserError, match=words):
        Topology.parse(topology, slices)


STEP = (
    "%inner (x: bf16[8,8]) -> bf16[8,8] {\n"
    "  ROOT %d = bf16[8,8]{1,0} convolution(%x, %x), dim_labels=bf_io->bf, "
    'metadata={op_name="jit(step)/jvp()/while/body/mlp/dot_general"}\n'
    "}\n"
    "ENTRY %main (x: bf16[8,8]) -> bf16[8,8] {\n"
    "  %s = (bf16[8,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%x), "
    "replica_groups=[2,4]<=[8], dimensions={0}\n"
    '  %f.1 = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%inner, "estimated_cycles":"600"\n'
    "  %g = bf16[32,8]{1,0} all-gather-done(%s)\n"
    "  %r = f32[64]{0} all-reduce(%g), replica_groups=[4,2]<=[2,4]T(1,0)\n"
    "  %window_attention_1x8x8_grid.3 = bf16[2,5,64,256]{3,2,1,0} custom-call(%g), "
    'custom_call_target="tpu_custom_call"\n'
    "}\n"
)


def _read(price):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    return read(STEP, 131_072 * 500.0, Topology.parse("v5e:2x4"), mesh, price)


def test_a_report_says_where_time_and_bytes_go():
    found = _read(lambda kernels: {name: 400 for name in kernels})
    assert found["est_cycles"] == 1000 and found["est_mfu"] == pytest.approx(0.5)
    assert found["kinds"] == {"products": 600, "kernels": 400}
    assert found["rooms"] == {"mlp": 600, "others": 400}
    gather, reduce = sorted(found["collectives"], key=lambda c: c.operation)
    assert (gather.operation, gather.axes, gather.bytes) == ("all-gather", "fsdp", 512)
    assert (reduce.operation, reduce.axes, reduce.bytes) == ("all-reduce", "data", 256)
    assert found["collective_bytes"] == 768
    assert gather.seconds == pytest.approx(512 * 3 / 4 / 45e9)
    assert gather.exposed == 0 and reduce.exposed == reduce.seconds  # 600 cycles hide the first
    assert found["buffers"][0][0] == 2 * 5 * 64 * 256 * 2
    assert not found["unpriced"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("jit(step)/gradient/transpose(jvp(encoder))/res_block/mul", "encoder/res_block"),
        ("jit(step)/gradient/jvp(decoder)/level/res_block/conv", "decoder/res_block"),
        ("jit(step)/gradient/jvp(decoder)/level/reshape", "decoder/level"),
        ("jit(step)/gradient/jvp(discriminator)/conv", "discriminator"),
        ("jit(step)/gradient/jvp(layers)/while/body/cross_attention/dot", "cross_attention"),
        ("jit(step)/gradient/jvp(text)/dot_general", "text"),
        ("jit(step)/gradient/encode/add", "others"),
    ],
)
def test_rooms(source, name):
    text = f'f32[8]{{0}} add(%x, %x), metadata={{op_name="{source}"}}'
    assert room(Module(""), Instruction("add.1", text)) == name


def test_a_report_names_kernels_without_a_price():
    found = _read(lambda kernels: {})
    assert found["unpriced"] == ("window_attention_1x8x8_grid.3",)
    assert found["est_cycles"] == 600


def test_an_attention_kernel_is_known_by_its_instruction():
    instruction = Instruction(
        "transpose_jvp_window_attention_5x8x8_grid_16_more_gradient.7.remat",
        "(bf16[4,5,256,1024]{3,2,1,0}, bf16[4,5,256,1024]) custom-call(%x)",
    )
    kernel = AttentionKernel.of(instruction, (5, 16, 16))
    assert kernel == AttentionKernel((5, 8, 8), True, 16, (4, 5, 16, 16, 1024), True)
    assert kernel.windows == 16
    assert (
        AttentionKernel.of(Instruction("causal_conv.1", "f32[2] custom-call()"), (1, 1, 1)) is None
    )


def test_kernels_are_priced_on_few_videos(monkeypatch):
    """50 cycles once a kernel, 100 for each video of one window's height."""
    seen = []

    def cycles(kernel, *options):
        seen.append((kernel.shape, *options))
        return {"forward": 50 + 100 * kernel.shape[0], "gradient": None}

    monkeypatch.setattr(attention_prices, "_cycles", cycles)
    model = DenoiserConfig(num_layers=2, qk_norm=True)
    text = "bf16[16,5,16,16,1024]{4,3,2,1,0} custom-call(%x)"
    names = "window_attention_5x8x8_grid.1", "window_attention_5x8x8_grid_gradient.2"
    kernels = {name: Instruction(name, text) for name in names}
    found = attention_prices.AttentionPrices(model, "v5e")(kernels)
    assert found == {names[0]: 50 + 100 * 16 * 2}
    assert seen[0] == ((2, 5, 8, 16, 1024), 64, model.relative_bias, True, False, "v5e")


@pytest.mark.parametrize(
    ("group", "seconds"),
    [
        ([0, 1], 2 * 1e9 / 2 / 45e9),  # within a slice: an open row of links
        ([0, 4], 2 * 1e9 / 2 / 3.125e9),  # the same chip of two slices
        ([0, 1, 4, 5], 2 * 1e9 / 2 / 45e9 + 2 * 1e9 / 2 / 2 / 3.125e9),  # each chip its half
    ],
)
def test_what_slices_share_crosses_the_network_in_parts(group, seconds):
    devices = np.array([SimpleNamespace(slice_index=i // 4) for i in range(8)])
    mesh = SimpleNamespace(devices=devices, size=8)
    text = f"u8[1000000000] all-reduce(%x), replica_groups={{{{{','.join(map(str, group))}}}}}"
    found = _seconds(Instruction("x", text), Topology.parse("v5e:2x2", 2), mesh)
    assert found == pytest.approx(seconds)


def test_a_permute_sends_all_of_its_bytes():
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(slice_index=0)] * 4), size=4)
    text = "u8[45000000] collective-permute(%x), source_target_pairs={{0,1},{1,2},{2,3}}"
    found = _seconds(Instruction("x", text), Topology.parse("v5e:2x2"), mesh)
    assert found == pytest.approx(1e-3)


def _transfer(number, operation, sent, received):
    """A send, its recv and their ends, as the compiler writes what hosts of slices do."""
    about = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="'
        f'{operation}.{number}_0",_xla_megascale_target="{{1,2,3,4}}x{{0:3}}",'
        f'_xla_megascale_transfer_type="{operation.upper().replace("-", "_")}"}}\n'
    )
    return (
        f"  %send.{number} = ({sent}, u32[], token[]) send(%x, %a.{number}), {about}",
        f"  %recv.{number} = ({received}, u32[], token[]) recv(%a.{number}), {about}",
        f"  %recv-done.{number} = ({received}, token[]) recv-done(%recv.{number})\n",
    )


@pytest.mark.parametrize("cycles", [0, 1_500_000, 30_000_000])
def test_what_hosts_of_slices_send_is_counted(cycles):
    """A sum and a gather of 25 MB each, 12 and 6 ms of a v5e's network; one waits for the other."""
    sum_, gather = (
        _transfer(1, "all-reduce", "f32[6250000]{0}", "f32[6250000]{0}"),
        _transfer(10, "all-gather", "f32[1562500]{0}", "f32[6250000]{0}"),
    )
    work = f'  %f.1 = f32[8]{{0}} fusion(%x), "estimated_cycles":"{cycles}"\n'
    lines_ = (sum_[0], gather[0], *sum_[1:2], gather[1], work, gather[2], sum_[2])
    text = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n{''.join(lines_)}}}\n"
    mesh = make_mesh(MeshConfig(data=8))
    found = read(text, 0.0, Topology.parse("v5e:2x2", 4), mesh, lambda kernels: {})
    by_name = {(c.operation, c.axes): c for c in found["collectives"]}
    sum_, gather = (by_name[o, "data (DCN)"] for o in ("all-reduce", "all-gather"))
    assert (sum_.bytes, gather.bytes, sum_.count) == (25e6, 25e6, 1)
    assert sum_.seconds == pytest.approx(2 * 25e6 * 3 / 4 / 3.125e9)
    assert gather.seconds == pytest.approx(25e6 * 3 / 4 / 3.125e9)
    assert found["collective_bytes"] == 50e6
    hidden = cycles / 1.5e9
    assert found["exposed_seconds"] == pytest.approx(max(0.0, 0.018 - hidden))
    assert gather.exposed == pytest.approx(max(0.0, 0.018 - hidden)) and sum_.exposed == 0


@pytest.mark.parametrize(
    ("said", "gib", "shown"),
    [
        ("RESOURCE_EXHAUSTED: ... Used 33.50G of 15.75G hbm.", 33.5, "33.50 of 16.00 GiB"),
        (
            "RESOURCE_EXHAUSTED: ... required for HLO temporaries (24.75G) exceeds available HBM",
            24.75,
            "24.75 of 16.00 GiB",
        ),
        ("RESOURCE_EXHAUSTED: no number", 0, "more than 16.00 GiB"),
    ],
)
def test_what_a_program_that_does_not_fit_needs(said, gib, shown):
    needed = too_large(jax.errors.JaxRuntimeError(said))
    assert needed == gib * 2**30
    report = Report("step", "v5e:1x1", {}, False, needed, 16 * 2**30, 1.0)
    assert f"TOO MUCH, {shown}" in lines(report)[1] and len(lines(report)) == 2
    assert too_large(jax.errors.JaxRuntimeError("INTERNAL: Used 1G of 2G")) is None


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ("walt_ucf101.py:debug", ["8 x latents 2x4x4"]),
        ("walt_t2v.py:debug", ["8 x latents 2x4x4 and 8 x latents 1x4x4"]),
        ("walt_sr1.py:debug", ["8 x 5x64x64"]),
        ("tokenizer_t2v.py:debug", ["8 x 5x32x32 and 8 x 1x32x32"]),
    ],
)
def test_batches_of_a_config(config, names):
    found = list(batches(_experiment(config)))
    assert [name for name, _ in found] == names
    assert all(x.shape[0] == 8 for _, shapes in found for x in shapes.values())


def test_a_published_text_encoder_is_rehearsed_without_its_files():
    (_, cached), *_ = batches(_experiment("walt_t2v.py"))
    assert cached["text_embeddings"].shape == (512, 128, 2048) and "text" not in cached
    experiment = _experiment("walt_sr1.py")
    (_, run), *_ = batches(experiment)
    assert run["text"].shape == (512, 128) and run["text"].dtype == np.int32
    frozen = experiment.task.stand_in()
    assert sum(leaf.size for leaf in jax.tree.leaves(frozen.text)) == 1_223_527_424
    assert _experiment("walt_t2v.py").task.stand_in().text is None


@pytest.mark.parametrize(
    ("config", "job"),
    [
        ("walt_ucf101.py:debug", "train"),
        ("walt_k600.py:debug", "sample"),
        ("tokenizer_ucf101.py:debug", "encode"),
    ],
)
def test_a_job_lowers_without_data_or_weights(config, job):
    experiment, mesh = _experiment(config), make_mesh(MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        (step,) = steps(experiment, mesh, job)
        assert "sharding" in step.lower().as_text()
    assert step.flops() > 0


def test_jobs_that_a_config_has_not():
    mesh = make_mesh(MeshConfig())
    with pytest.raises(UserError, match="needs the config of a denoiser"):
        steps(_experiment("tokenizer_ucf101.py:debug"), mesh, "sample")
    with pytest.raises(UserError, match="needs the config of a tokenizer"):
        steps(_experiment("walt_ucf101.py:debug"), mesh, "encode")


def _experiment(config):
    return config_lib.build(Experiment, config_lib.load(f"{CONFIGS / config}"))
