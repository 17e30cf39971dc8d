"""The reader of compiled programs: on a text in the TPU compiler's manner, and on programs compiled here."""

import inspect
import re
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from unclip_jax.errors import UserError
from unclip_jax.planning import hlo, traffic
from unclip_jax.planning.chips import CHIPS, parse_slices, parse_topology, slice_devices

# As libtpu writes it, shortened: a loop of 24 turns over a stack of weights, with a collective in each turn.
TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0:T(8,128)})->f32[8,128]{1,0}}

FileNames
1 "step.py"

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%inner (param_0: bf16[24,128,128], param_1: s32[]) -> bf16[1,128,128] {
  %param_0 = bf16[24,128,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  ROOT %slice = bf16[1,128,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1), dynamic_slice_sizes={1,128,128}
}

%fused (param_2: f32[8,128], param_3: bf16[24,128,128], param_4: s32[]) -> f32[8,128] {
  %param_2 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %param_3 = bf16[24,128,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %param_4 = s32[]{:T(128)} parameter(2)
  %weight = bf16[1,128,128]{2,1,0:T(8,128)(2,1)} fusion(%param_3, %param_4), kind=kLoop, calls=%inner
  ROOT %convolution = f32[8,128]{1,0:T(8,128)} convolution(%param_2, %weight), dim_labels=bf_io->bf
}

%stored (param_5: f32[24,8,128], param_6: f32[8,128], param_7: s32[]) -> f32[24,8,128] {
  %param_5 = f32[24,8,128]{2,1,0:T(8,128)} parameter(0)
  %param_6 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %param_7 = s32[]{:T(128)} parameter(2)
  %one = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%param_6)
  ROOT %update = f32[24,8,128]{2,1,0:T(8,128)} dynamic-update-slice(%param_5, %one, %param_7)
}

%body (arg: (s32[], f32[8,128], bf16[24,128,128], f32[24,8,128])) -> (s32[], f32[8,128]) {
  %arg = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}, /*index=2*/bf16[24,128,128]{2,1,0:T(8,128)(2,1)}, f32[24,8,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %stack = bf16[24,128,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %kept = f32[24,8,128]{2,1,0:T(8,128)} get-tuple-element(%arg), index=3
  %product = f32[8,128]{1,0:T(8,128)} fusion(%x, %stack, %i), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %all-reduce = f32[8,128]{1,0:T(8,128)} all-reduce(%product), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, to_apply=%sum, metadata={op_name="jit(step)/mean"}
  %keep = f32[24,8,128]{2,1,0:T(8,128)} fusion(%kept, %all-reduce, %i), kind=kLoop, calls=%stored
  ROOT %result = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%i, %all-reduce)
}

%condition (arg.1: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(24)
  %arg.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: f32[8,100], q: bf16[24,128,128]) -> f32[8,128] {
  %p = f32[8,100]{1,0:T(8,128)} parameter(0)
  %q = bf16[24,128,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %prefetch = (f32[8,100]{1,0:T(8,128)S(1)}, f32[8,100]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %near = f32[8,100]{1,0:T(8,128)S(1)} copy-done(%prefetch)
  %wide = f32[8,128]{1,0:T(8,128)} pad(%near), backend_config={"window_config":{"estimated_cycles":"7"}}
  %tuple = (s32[], f32[8,128]{1,0}) tuple(%wide, %q)
  %while = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%tuple), condition=%condition, body=%body
  %out = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while), index=1
  %rows = f32[32,128]{1,0:T(8,128)} all-gather(%out), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %moved = f32[32,128]{1,0:T(8,128)} collective-permute(%rows), source_target_pairs={{0,1},{1,0}}, metadata={op_name="jit(step)/roll"}
}
"""  # noqa: E501


def test_a_loop_runs_as_often_as_its_condition_says():
    program = hlo.parse(TEXT)
    assert list(program.computations) == ["sum", "inner", "fused", "stored", "body", "condition", "main"]
    assert program.runs == {"main": 1, "body": 24, "condition": 24}
    assert program.fused_runs["fused"] == program.fused_runs["inner"] == program.fused_runs["sum"] == 24
    assert sum(runs * operation.cycles for operation, runs, _ in program.launched()) == 24 * 1000 + 7


def test_a_known_trip_count_is_believed():
    known = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert hlo.parse(known).runs["body"] == 5


def test_a_kernel_says_what_it_takes():
    """As libtpu writes one."""
    line = (
        '  %attention.1 = bf16[4,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={'
        '"custom_call_config":{"body":"QUJD","cost_estimate":{"bytes_accessed":"272","flops":"708","transcendentals":"1"'
        '},"needs_layout_passes":true},"flag_configs":[]}'
    )
    program = hlo.parse("ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {\n" + line + "\n}\n")
    assert [operation.kernel_flops for operation, _, _ in program.launched()] == [708]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[8,128]{1,0:T(8,128)}", 8 * 128 * 4),
        ("bf16[3,100]{1,0:T(8,128)(2,1)}", 8 * 128 * 2),  # tiles are whole
        ("bf16[5,8,200]{2,1,0:T(8,128)(2,1)}", 5 * 8 * 256 * 2),
        ("bf16[200,8,5]{0,1,2:T(8,128)(2,1)}", 5 * 8 * 256 * 2),
        ("f32[1000]{0:T(1024)}", 4096),
        ("f32[8,128]{1,0:T(8,128)S(1)}", 0),  # on the chip
        ("(f32[2]{0}, /*index=1*/pred[3], token[])", 2 * 4 + 3),
        ("f8e4m3fn[10]{0}", 10),
        ("s32[]", 4),
    ],
)
def test_sizes(shape, expected):
    assert hlo.shape_bytes(shape) == expected


def test_memory_traffic_counts_what_is_taken_and_given():
    tile, weight, index = 8 * 128 * 4, 128 * 128 * 2, 4
    product = tile + weight + index + tile  # of the stack of weights, one
    keep = tile + index + 2 * tile  # of the array written into, what is written
    condition = 1 + 2 * index
    prefetch, pad = tile, tile  # to memory on the chip, which costs nothing there
    assert traffic.moved_bytes(hlo.parse(TEXT)) == 24 * (product + keep + condition) + prefetch + pad


def test_elements_of_a_loop_s_state_may_have_no_line_of_their_own():
    """As newer compilers write them: %arg#1 in place of %x."""
    short = re.sub(r"  %\S+ = \S+ get-tuple-element\(%arg(\.1)?\), index=\d\n", "", TEXT)
    for name, element in {"i": "arg#0", "x": "arg#1", "stack": "arg#2", "kept": "arg#3", "i.1": "arg.1#0"}.items():
        short = re.sub(rf"%{re.escape(name)}(?=[,)])", f"%{element}", short)
    assert short.count("#") > 6 and "%stack" not in short
    assert traffic.moved_bytes(hlo.parse(short)) == traffic.moved_bytes(hlo.parse(TEXT))


def test_collectives_send_what_a_ring_sends():
    reduce, permute, gather = traffic.collectives(hlo.parse(TEXT))  # the largest first
    tile = 8 * 128 * 4
    assert reduce == ("all-reduce", "jit(step)/mean", 24, 24 * 2 * tile * 3 / 4)
    assert gather == ("all-gather", "", 1, 3 * tile)
    assert permute == ("collective-permute", "jit(step)/roll", 1, 4 * tile)


def test_what_goes_to_other_slices_is_told_apart():
    """As libtpu writes a reduction over two slices: within each by a collective, between them by the host."""
    send = (
        "  %send.4 = (f32[32,128]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%rows, %after-all.4), channel_id=8, "
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}, metadata={op_name="jit(step)/psum"}\n'
    )
    text = TEXT.replace("  ROOT %moved", send + send.replace("megascale_runtime", "other") + "  ROOT %moved")
    found = {each.kind: each for each in traffic.collectives(hlo.parse(text))}
    assert found[traffic.BETWEEN_SLICES] == (traffic.BETWEEN_SLICES, "jit(step)/psum", 1, 32 * 128 * 4)
    assert found.keys() == {"all-reduce", "all-gather", "collective-permute", traffic.BETWEEN_SLICES}


def test_groups_are_read_in_every_notation():
    for groups, count in (("{{0,1,2,3},{4,5,6,7}}", 4), ("[4,2]<=[8]", 2), ("mesh['a'=2,'b'=4] {'a','b'}", 8),
                          ("mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'a'}", 2)):  # fmt: skip
        text = TEXT.replace("[2,4]<=[8]", groups)
        sent = {each.kind: each.sent_bytes for each in traffic.collectives(hlo.parse(text))}
        assert sent["all-gather"] == (count - 1) * 8 * 128 * 4


def compiled(function, *arguments):
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def test_programs_compiled_here_are_read():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def argument(*lengths, by):
        return jax.ShapeDtypeStruct(lengths, jnp.float32, sharding=NamedSharding(mesh, by))

    def step(w, x):
        whole = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
        return jax.lax.with_sharding_constraint(jnp.sum(jnp.tanh(x @ whole)), NamedSharding(mesh, P()))

    found = traffic.collectives(
        compiled(step, argument(64, 32, by=P("fsdp")), argument(16, 64, by=P(("data", "fsdp"))))
    )
    sent = {each.kind: each.sent_bytes for each in found}
    assert sent == {"all-gather": 64 * 32 * 4 * 3 / 4, "all-reduce": 2 * 4 * 7 / 8}


def test_a_loop_compiled_here_is_counted_as_often_as_it_runs():
    x, w = jax.ShapeDtypeStruct((8, 64), jnp.float32), jax.ShapeDtypeStruct((30, 64, 64), jnp.float32)
    once = compiled(lambda x, w: jnp.tanh(x @ w[0]), x, w)
    loop = compiled(lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0], x, w)
    assert 30 in loop.runs.values()
    # Each turn takes its own weights, not all thirty.
    assert 1.0 <= traffic.moved_bytes(loop) / (30 * traffic.moved_bytes(once)) < 2.0


def test_cycles_that_the_compiler_cannot_tell_are_none():
    line = "  %x = f32[8]{0} scatter(%a), backend_config={\"estimated_cycles\":\"9223372036854775807\"}"
    (operation,) = hlo.parse(f"ENTRY %main () -> f32[8] {{\n{line}\n}}\n").computations["main"]
    assert operation.opcode == "scatter" and operation.cycles == 0


@pytest.mark.parametrize(
    ("name", "slices", "kind", "chips"),
    [("v5p:4x4x4", 1, "v5p", 64), ("2xv5p:4x4x4", 2, "v5p", 128), ("16xv6e:8x8", 16, "v6e", 1024)],
)
def test_topologies_may_be_several_slices(name, slices, kind, chips):
    assert parse_slices(name)[:2] == (slices, kind)
    assert parse_topology(name) == (CHIPS[kind], chips)


@pytest.mark.parametrize("name", ["2xh100:8", "0xv5p:4x4x4", "xv5p:4x4x4", "2x:4x4x4"])
def test_other_counts_of_slices_are_refused(name):
    with pytest.raises(UserError, match="topology"):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("v5p:4x4x4", dict(topology_name="v5p:4x4x4")),
        ("2xv5p:4x4x4", dict(topology_name="v5p:4x4x4", kwargs=dict(num_slices=2))),
        ("2xv4:2x2x2", dict(topology_name="v4:2x2x2", kwargs=dict(num_slices=2, chip_config_name="megacore"))),
    ],
)
def test_jax_is_asked_for_the_slices_by_its_own_names(name, asked, monkeypatch):
    signature, calls = inspect.signature(topologies.get_topology_desc), []

    def played(*args, **kwargs):
        calls.append(signature.bind(*args, **kwargs).arguments)
        return topologies.TopologyDescription(["chip"])

    monkeypatch.setattr(topologies, "get_topology_desc", played)
    monkeypatch.setitem(sys.modules, "libtpu", types.ModuleType("libtpu"))
    monkeypatch.setattr("unclip_jax.planning.chips.LIBTPU_ENVIRONMENT", {})
    assert slice_devices(name) == ["chip"]
    assert calls == [asked | dict(platform="tpu")]
