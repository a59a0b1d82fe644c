"""Excerpts of what each compiler writes, shortened."""

CPU = """HloModule jit_f, is_scheduled=true, num_partitions=8

%region_2.1 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[] parameter(0), metadata={op_name="while/body/psum"}
  %b.1 = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a.1, %b.1)
}

%body (param: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %param = (s32[], f32[8,16]{1,0}) parameter(0)
  %one = s32[] constant(1)
  %n = s32[] get-tuple-element(%param), index=0
  %x = f32[8,16]{1,0} get-tuple-element(%param), index=1
  %all_gather.3 = f32[8,64]{0,1} all-gather(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={1}, \
use_global_device_ids=true, metadata={op_name="jit(f)/while/body/tsp/mlp/bucket/all_gather" stack_frame_id=46}
  %psum.2 = f32[8,16]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
use_global_device_ids=true, to_apply=%region_2.1
  %next = s32[] add(%n, %one)
  ROOT %tuple.1 = (s32[], f32[8,16]{1,0}) tuple(%next, %psum.2)
}

%wrapped_compare_computation (p.0: s32[], p.1: s32[]) -> pred[] {
  %p.0 = s32[] parameter(0)
  %p.1 = s32[] parameter(1)
  ROOT %lt.6 = pred[] compare(%p.0, %p.1), direction=LT
}

%condition (param.1: (s32[], f32[8,16])) -> pred[] {
  %param.1 = (s32[], f32[8,16]{1,0}) parameter(0)
  %limit = s32[] constant(5)
  %m = s32[] get-tuple-element(%param.1), index=0
  ROOT %wrapped_compare = pred[] fusion(%m, %limit), kind=kLoop, calls=%wrapped_compare_computation
}

ENTRY %main (x.1: f32[8,16]) -> f32[8,16] {
  %x.1 = f32[8,16]{1,0} parameter(0), sharding={devices=[2,4]<=[8]}, metadata={op_name="x"}
  %zero = s32[] constant(0)
  %copy.1 = s32[] copy(%zero)
  %tuple.2 = (s32[], f32[8,16]{1,0}) tuple(%copy.1, %x.1)
  %while.1 = (s32[], f32[8,16]{1,0}) while(%tuple.2), condition=%condition, body=%body, \
metadata={op_name="jit(f)/while" source_file="f.py" source_line=12}, backend_config={"known_init_step":{"init":"0"}}
  %y = f32[8,16]{1,0} get-tuple-element(%while.1), index=1
  %c = f32[2,2]{1,0} constant({ { 1, 2 }, { 3, 4 } })
  %s.0 = f32[4,16]{1,0} slice(%y), slice={[0:4], [0:16]}
  %s.1 = f32[4,16]{1,0} slice(%y), slice={[4:8], [0:16]}
  %all-to-all = (f32[4,16]{1,0}, f32[4,16]{1,0}) all-to-all(%s.0, %s.1), replica_groups={{0,4},{1,5},{2,6},{3,7}}
  ROOT %z = f32[4,16]{1,0} get-tuple-element(%all-to-all), index=1
}
"""

_GPU_CONFIG = '"operation_queue_id":"0","collective_backend_config":{"is_sync":%s,"is_pipelined":false}'

CUDA = """HloModule jit_f, is_scheduled=true, num_partitions=8, \
frontend_attributes={fingerprint_before_lhs="044cd40710e2bfe01def99d1cf9564c1"}

%region_6.6 (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add = bf16[] add(%a, %b)
}

ENTRY %main (x: bf16[256,256], y: bf16[1024,256], p: f32[], q: f32[4]) -> (bf16[256,256]) {
  %x = bf16[256,256]{1,0} parameter(0), metadata={op_name="x" scheduling_name="x"}
  %y = bf16[1024,256]{1,0} parameter(1)
  %p = f32[] parameter(2)
  %q = f32[4]{0} parameter(3)
  %all-gather-start = (bf16[256,256]{1,0}, bf16[256,1024]{1,0}) all-gather-start(%x), channel_id=1, \
replica_groups=[2,4]<=[8], dimensions={1}, use_global_device_ids=true, \
frontend_attributes={trivially_pipelineable=""}, \
metadata={op_name="jit(f)/tsp/mlp/bucket/all_gather" scheduling_name="all-gather-start"}, backend_config={SYNC}
  %all-gather-done = bf16[256,1024]{1,0} all-gather-done(%all-gather-start), metadata={op_name="jit(f)/all_gather"}
  %collective-permute-start = (bf16[256,256]{1,0}, bf16[256,256]{1,0}) collective-permute-start(%x), channel_id=1, \
source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}, backend_config={ASYNC}
  %reduce-scatter-start = ((bf16[1024,256]{1,0}), bf16[256,256]{1,0}) reduce-scatter-start(%y), channel_id=1, \
replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true, dimensions={0}, to_apply=%region_6.6, \
backend_config={ASYNC}
  %collective-permute-done = bf16[256,256]{1,0} collective-permute-done(%collective-permute-start)
  %reduce-scatter-done = bf16[256,256]{1,0} reduce-scatter-done(%reduce-scatter-start)
  %all-reduce-start = bf16[256,256]{1,0} all-reduce-start(%reduce-scatter-done), channel_id=1, \
replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%region_6.6, backend_config={ASYNC}
  %all-reduce-done = bf16[256,256]{1,0} all-reduce-done(%all-reduce-start), backend_config={SYNC}
  %all-reduce-start.1 = (f32[], f32[4]{0}) all-reduce-start(%p, %q), replica_groups={{0,1,2,3,4,5,6,7}}, \
to_apply=%region_6.6, backend_config={ASYNC}
  %all-reduce-done.1 = (f32[], f32[4]{0}) all-reduce-done(%all-reduce-start.1)
  %gemm = (bf16[256,1024]{1,0}, s8[4096]{0}) custom-call(%x, %all-gather-done), custom_call_target="__cublas$gemm"
  ROOT %tuple = (bf16[256,256]{1,0}) tuple(%all-reduce-done)
}
""".replace("{SYNC}", "{" + _GPU_CONFIG % "true" + "}").replace("{ASYNC}", "{" + _GPU_CONFIG % "false" + "}")

# The generic async-start is XLA's long spelling of what this compiler writes as reduce-scatter-start.
ROCM = """HloModule jit_step, is_scheduled=true, input_output_alias={ {}: (1, {}, may-alias) }, \
num_partitions=8

%region_1 (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %add = bf16[] add(%a, %b)
}

%async_wrapped (p: bf16[2048,2048]) -> bf16[512,2048] {
  %p = bf16[2048,2048]{1,0} parameter(0)
  ROOT %reduce-scatter.7 = bf16[512,2048]{1,0} reduce-scatter(%p), channel_id=2, replica_groups=[2,4]<=[8], \
dimensions={0}, to_apply=%region_1, metadata={op_name="jit(step)/tsp/mlp/gradient/reduce_scatter"}
}, execution_thread="parallel"

ENTRY %main (x: bf16[512,2048], y: bf16[512,2048], z: bf16[2048,2048]) -> bf16[512,2048] {
  %x = bf16[512,2048]{1,0} parameter(0)
  %y = bf16[512,2048]{1,0} parameter(1)
  %z = bf16[2048,2048]{1,0} parameter(2)
  %all-gather-start.1 = ((bf16[512,2048]{1,0}, bf16[512,2048]{1,0}), (bf16[2048,2048]{1,0}, \
/*index=1*/bf16[2048,2048]{1,0})) all-gather-start(%x, %y), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, \
dimensions={0}, use_global_device_ids=true, backend_config={"collective_backend_config":{"is_sync":false}}
  %pallas_call.3 = f32[32,128]{1,0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", \
operand_layout_constraints={bf16[512,2048]{1,0}}, metadata={op_name="jit(step)/tsp/attention/pallas_call"}, \
backend_config={debug = false, grid_x = 4 : i32, ir = "ML\\EFR\\0D{\\03(\\22G[\\13 \\\\", num_stages = 3 : i32}
  %async-start = ((bf16[2048,2048]{1,0}), bf16[512,2048]{1,0}, u32[]) async-start(%z), \
async_execution_thread="parallel", calls=%async_wrapped
  %all-gather-done.1 = (bf16[2048,2048]{1,0}, bf16[2048,2048]{1,0}) all-gather-done(%all-gather-start.1)
  ROOT %async-done = bf16[512,2048]{1,0} async-done(%async-start), async_execution_thread="parallel", \
calls=%async_wrapped
}
"""

TPU = """HloModule jit_step, is_scheduled=true, num_partitions=8, frontend_attributes={arg_memory_spaces="0;0"}

FileNames
1 "layer.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=21 end_line=21 column=2 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%region_12 (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[]{:T(256)} parameter(0), metadata={op_name="while/body/tsp/mlp/gradient/reduce_scatter"}
  %b = bf16[]{:T(256)} parameter(1)
  ROOT %add.69 = bf16[]{:T(256)} add(%a, %b)
}

%all-reduce-scatter (input: bf16[2048,2048]) -> bf16[528,2048] {
  %input = bf16[2048,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %zero = bf16[] constant(0)
  %pad.2 = bf16[2112,2048]{1,0:T(8,128)(2,1)} pad(%input, %zero), padding=0_64x0_0
  %all-reduce.5 = bf16[2112,2048]{1,0:T(8,128)(2,1)} all-reduce(%pad.2), channel_id=7, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%region_12, \
frontend_attributes={from-cross-replica-sharding="true"}, backend_config={"barrier_config":{"id":"1"}}
  %table = u32[8]{0:T(128)} constant({0, 1, 2, 3, 0, 1, 2, 3})
  %id = u32[] partition-id()
  ROOT %slice = bf16[528,2048]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.5, %id, %id), \
dynamic_slice_sizes={528,2048}
}

%start (p: bf16[512,2048]) -> (bf16[512,2048], bf16[2048,2048], u32[]) {
  %p = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[2048,2048]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=8, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="5"}, \
metadata={op_name="jit(step)/tsp/mlp/bucket/all_gather" stack_frame_id=1}
  ROOT %custom-call.1 = (bf16[512,2048]{1,0:T(8,128)(2,1)}, bf16[2048,2048]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion (q: bf16[512,2048], r: bf16[2048,2048], x.1: bf16[8,2048]) -> (bf16[8,2048], bf16[2048,2048]) {
  %q = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %r = bf16[2048,2048]{1,0:T(8,128)(2,1)} parameter(1)
  %x.1 = bf16[8,2048]{1,0:T(8,128)(2,1)S(1)} parameter(2)
  %convolution.1 = bf16[8,2048]{1,0:T(8,128)(2,1)} convolution(%x.1, %r), dim_labels=bf_io->bf
  %all-gather.2 = bf16[2048,2048]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=8, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="5"}
  ROOT %tuple.1 = (bf16[8,2048]{1,0:T(8,128)(2,1)}, bf16[2048,2048]{1,0:T(8,128)(2,1)}) \
tuple(%convolution.1, %all-gather.2)
}

%done (s: bf16[512,2048]) -> bf16[2048,2048] {
  %s = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.3 = bf16[2048,2048]{1,0:T(8,128)(2,1)} all-gather(%s), channel_id=8, \
replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="5"}
  ROOT %custom-call.3 = bf16[2048,2048]{1,0:T(8,128)(2,1)} custom-call(%s, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (w: bf16[512,2048], v: bf16[2048,2048], x: bf16[8,2048]) -> bf16[48,2048] {
  %w = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %v = bf16[2048,2048]{1,0:T(8,128)(2,1)} parameter(1)
  %x = bf16[8,2048]{1,0:T(8,128)(2,1)} parameter(2)
  %copy-start = (bf16[8,2048]{1,0:T(8,128)(2,1)S(1)}, bf16[8,2048]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%x)
  %async-collective-start = (bf16[512,2048]{1,0:T(8,128)(2,1)}, bf16[2048,2048]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
fusion(%w), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %g.0 = bf16[512,2048]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=0
  %g.1 = bf16[2048,2048]{1,0:T(8,128)(2,1)} get-tuple-element(%async-collective-start), index=1
  %copy-done = bf16[8,2048]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %fusion.1 = (bf16[8,2048]{1,0:T(8,128)(2,1)}, bf16[2048,2048]{1,0:T(8,128)(2,1)}) fusion(%g.0, %g.1, %copy-done), \
kind=kOutput, calls=%async_collective_fusion
  %async-collective-done = bf16[2048,2048]{1,0:T(8,128)(2,1)} fusion(%g.0), kind=kCustom, calls=%done
  %fusion.82 = bf16[528,2048]{1,0:T(8,128)(2,1)} fusion(%v), kind=kCustom, calls=%all-reduce-scatter, \
backend_config={"collective_algorithm_config":{"emitter":"SingleInputAllReduceScatterFusion",\
"debug":"\\n{2 2} id \\"1\\" {"}}
  %slice.2 = bf16[48,2048]{1,0:T(8,128)(2,1)} slice(%fusion.82), slice={[480:528], [0:2048]}
  %collective-permute-start = (bf16[48,2048]{1,0:T(8,128)(2,1)}, bf16[48,2048]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, \
u32[]{:S(2)}) collective-permute-start(%slice.2), channel_id=1, \
source_target_pairs={{0,1},{1,2},{2,3},{4,5},{5,6},{6,7}}
  ROOT %collective-permute-done = bf16[48,2048]{1,0:T(8,128)(2,1)} collective-permute-done(%collective-permute-start)
}
"""
