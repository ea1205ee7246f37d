"""The plan's arithmetic on made-up programs and numbers; its errors; one real compilation."""

import importlib
import importlib.util
import math
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import pytest

from vdm import build
from vdm.nn.attention import softmax_attention
from vdm.nn.convolution import conv3
from vdm.planning import chips, costs, fit, hlo, plan, programs
from vdm.planning.flops import matmuls
from vdm.system import parallel

# Two devices; a loop of 32 whose body gathers, and takes and replaces slices of stacked arrays, in
# fusions or in fusions of fusions.
PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%takes (stack: bf16[32,100], i: s32[]) -> bf16[100] {
  %stack = STACK parameter(0)
  %i = INDEX parameter(1)
  %view = STACK bitcast(%stack)
  %slice = bf16[1,100]{1,0:T(8,128)(2,1)} dynamic-slice(%view, %i), dynamic_slice_sizes={1,100}
  ROOT %flat = bf16[100]{0:T(256)} bitcast(%slice)
}

%replaces (stack.1: bf16[32,100], x: bf16[100], i.1: s32[]) -> bf16[32,100] {
  %stack.1 = STACK parameter(0)
  %x = bf16[100]{0:T(256)} parameter(1)
  %i.1 = INDEX parameter(2)
  %row = bf16[1,100]{1,0:T(8,128)(2,1)} bitcast(%x)
  ROOT %new = STACK dynamic-update-slice(%stack.1, %row, %i.1)
}

%outer_takes (stack.4: bf16[32,100], i.4: s32[]) -> bf16[100] {
  %stack.4 = STACK parameter(0)
  %i.4 = INDEX parameter(1)
  ROOT %inner = bf16[100]{0:T(256)} fusion(%stack.4, %i.4), kind=kLoop, calls=%takes
}

%outer_replaces (stack.5: bf16[32,100], x.1: bf16[100], i.5: s32[]) -> bf16[32,100] {
  %stack.5 = STACK parameter(0)
  %x.1 = bf16[100]{0:T(256)} parameter(1)
  %i.5 = INDEX parameter(2)
  ROOT %inner.1 = STACK fusion(%stack.5, %x.1, %i.5), kind=kLoop, calls=%replaces
}

%body (loop: (s32[], bf16[32,100])) -> (s32[], bf16[32,100]) {
  %loop = (INDEX, STACK) parameter(0)
  %i.2 = INDEX get-tuple-element(%loop), index=0
  %stack.2 = STACK get-tuple-element(%loop), index=1
  %one = bf16[100]{0:T(256)} fusion(%stack.2, %i.2), kind=kLoop, calls=%OUTERtakes
  %whole = bf16[200]{0:T(256)S(1)} all-gather(%one), channel_id=1, replica_groups=[1,2]<=[2]
  %stack.3 = STACK fusion(%stack.2, %one, %i.2), kind=kLoop, calls=%OUTERreplaces
  ROOT %next = (INDEX, STACK) tuple(%i.2, /*index=1*/%stack.3)
}

%condition (loop.1: (s32[], bf16[32,100])) -> pred[] {
  %length = s32[]{:T(128)} constant(32)
  %loop.1 = (INDEX, STACK) parameter(0)
  %i.3 = INDEX get-tuple-element(%loop.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.3, %length), direction=LT
}

%cut (q.1: f32[50]) -> f32[20] {
  %q.1 = f32[50]{0:T(128)} parameter(0)
  ROOT %some = f32[20]{0:T(128)S(1)} slice(%q.1), slice={[0:20]}
}

ENTRY %main (p: bf16[32,100], q: f32[50]) -> (bf16[32,100], f32[50]) {
  %p = STACK parameter(0)
  %q = f32[50]{0:T(128)} parameter(1)
  %zero = INDEX constant(0)
  %start = (INDEX, STACK) tuple(%zero, %p)
  %while.1 = (INDEX, STACK) while(%start), condition=%condition, body=%body
  %end = STACK get-tuple-element(%while.1), index=1
  %fetch = (f32[50]{0:T(128)S(1)}, f32[50]{0:T(128)}, u32[]{:S(2)}) copy-start(%q)
  %here = f32[50]{0:T(128)S(1)} copy-done(%fetch)
  %part = ((f32[50]{0:T(128)}), f32[20]{0:T(128)S(1)}, s32[]{:S(2)}) async-start(%q), calls=%cut
  %parted = f32[20]{0:T(128)S(1)} async-done(%part)
  %reduced = f32[50]{0:T(128)} all-reduce(%here), replica_groups=mesh['a'=2] {'a'}, to_apply=%add
  ROOT %out = (STACK, f32[50]{0:T(128)}) tuple(%end, %reduced)
}
""".replace('STACK', 'bf16[32,100]{1,0:T(8,128)(2,1)}').replace('INDEX', 's32[]{:T(128)S(6)}')


def compact(program):
  """The program as newer compilers dump it: parts of a tuple by its name, without a line each."""
  part = re.compile(r'\n  %([\w.]+) = .* get-tuple-element\(%([\w.]+)\), index=(\d+)')
  while found := part.search(program):
    head, _, rest = program.partition(found[0])
    body, end, others = rest.partition('\n}')
    body = re.sub(rf'%{re.escape(found[1])}(?![\w.])', f'%{found[2]}#{found[3]}', body)
    program = head + body + end + others
  return program


@pytest.mark.parametrize('written', [str, compact])
@pytest.mark.parametrize('outer', ['', 'outer_'])
def test_traffic_multiplies_loops_and_counts_slices_and_hbm_alone(outer, written):
  program = written(PROGRAM.replace('OUTER', outer))
  assert ('#' in program) == (written is compact)
  computations, entry = hlo.parse(program)
  assert entry == 'main'
  times = hlo.runs(computations, entry)
  assert times['body'] == times[f'{outer}replaces'] == 32
  assert times['add'] == times['condition'] == 0
  traffic = hlo.traffic(program, num_devices=2)
  # a row taken and written, gathered (what is made stays on the chip), read and put back
  in_loop = (200 + 200) + 200 + (200 + 200)
  # fetched from HBM, a part of it too, and reduced into it
  assert traffic.bytes == 32 * in_loop + 200 + 80 + 200
  assert traffic.collectives == {'all-gather': (32, 32 * 400 / 2), 'all-reduce': (1, 200.0)}


# Two devices gather an array while a fusion doubles another; the arrays pass through the fusion.
ASYNCHRONOUS = """HloModule jit_step, is_scheduled=true

%starts (p.1: f32[50]) -> (f32[50], f32[100], u32[]) {
  %p.1 = f32[50]{0:T(128)} parameter(0)
  %gather.1 = f32[100]{0:T(128)} all-gather(%p.1), channel_id=1, replica_groups=[1,2]<=[2]
  ROOT %call.1 = STARTED custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%doubles (q.1: f32[20], p.2: f32[50], r.2: f32[100], f.2: u32[]) -> (f32[20], f32[50], f32[100]) {
  %q.1 = f32[20]{0:T(128)} parameter(0)
  %p.2 = f32[50]{0:T(128)} parameter(1)
  %r.2 = f32[100]{0:T(128)} parameter(2)
  %two = f32[20]{0:T(128)} add(%q.1, %q.1)
  ROOT %all = (f32[20]{0:T(128)}, f32[50]{0:T(128)}, f32[100]{0:T(128)}) tuple(%two, %p.2, %r.2)
}

%ends (p.3: f32[50], r.3: f32[100]) -> f32[100] {
  %p.3 = f32[50]{0:T(128)} parameter(0)
  %r.3 = f32[100]{0:T(128)} parameter(1)
  %gather.3 = f32[100]{0:T(128)} all-gather(%p.3), channel_id=1, replica_groups=[1,2]<=[2]
  ROOT %call.3 = f32[100]{0:T(128)} custom-call(%p.3, %r.3, %gather.3), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[50], q: f32[20]) -> (f32[20], f32[100]) {
  %p = f32[50]{0:T(128)} parameter(0)
  %q = f32[20]{0:T(128)} parameter(1)
  %start = STARTED fusion(%p), kind=kCustom, calls=%starts
  %p.4 = f32[50]{0:T(128)} get-tuple-element(%start), index=0
  %r.4 = f32[100]{0:T(128)} get-tuple-element(%start), index=1
  %both = (f32[20]{0:T(128)}, f32[50]{0:T(128)}, f32[100]{0:T(128)}) fusion(%q, %p.4, %r.4), \
kind=kOutput, calls=%doubles
  %doubled = f32[20]{0:T(128)} get-tuple-element(%both), index=0
  %p.5 = f32[50]{0:T(128)} get-tuple-element(%both), index=1
  %r.5 = f32[100]{0:T(128)} get-tuple-element(%both), index=2
  %end = f32[100]{0:T(128)} fusion(%p.5, %r.5), kind=kCustom, calls=%ends
  ROOT %out = (f32[20]{0:T(128)}, f32[100]{0:T(128)}) tuple(%doubled, %end)
}
""".replace('STARTED', '(f32[50]{0:T(128)}, f32[100]{0:T(128)}, u32[]{:S(2)})')


@pytest.mark.parametrize('written', [str, compact])
def test_a_collective_beside_a_computation_is_counted_once(written):
  traffic = hlo.traffic(written(ASYNCHRONOUS), num_devices=2)
  gathered, doubled = 200 + 400, 80 + 80
  assert traffic.bytes == gathered + doubled
  assert traffic.collectives == {'all-gather': (1, 400 / 2)}


@pytest.mark.parametrize(
  'fetch', ['slice-start(%q), slice={[0:20]}', 'async-start(%q), calls=%cut']
)
def test_a_slice_that_is_fetched_is_read_in_either_form(fetch):
  program = PROGRAM.replace('async-start(%q), calls=%cut', fetch).replace('OUTER', '')
  assert hlo.traffic(program, 2).bytes == hlo.traffic(PROGRAM.replace('OUTER', ''), 2).bytes


def test_parts_of_a_tuple_of_tuples():
  shape = '((f32[3,5]{1,0:T(8,128)(2,1)}, s32[]), /*index=1*/u8[2]{0:S(1)}, pred[])'
  inner = '(f32[3,5]{1,0:T(8,128)(2,1)}, s32[])'
  assert [part.strip() for part in hlo._parts(shape)] == [inner, 'u8[2]{0:S(1)}', 'pred[]']


def test_a_tuple_of_thousands_is_read_in_seconds():
  # split once per part, it would take minutes
  n = 6000
  shape = ', '.join([f'f32[{n}]{{0:T(128)}}'] * n)
  lines = [f'  %x{i} = f32[{n}]{{0:T(128)}} negate(%loop#{i})' for i in range(n)]
  head = f'ENTRY %main (p: ({shape})) -> f32[] {{\n  %loop = ({shape}) parameter(0)\n'
  start = time.perf_counter()
  moved = hlo.traffic(head + '\n'.join(lines) + '\n}\n', 1).bytes
  assert time.perf_counter() - start < 20
  assert moved == n * 2 * 4 * n


@pytest.mark.parametrize(
  'shape, size',
  [
    ('f32[8,128]{1,0:T(8,128)}', 4096),
    ('f32[]', 4),
    ('(bf16[3,5]{1,0}, /*index=1*/pred[7]{0}, u8[2]{0:S(1)})', 37),
    ('s4[8]{0}', 4),
    ('f8e4m3fn[8]{0}', 8),
    ('token[]', 0),
  ],
)
def test_bytes_of_shapes(shape, size):
  assert hlo.shape_bytes(shape) == size


@pytest.mark.parametrize(
  'kind, sent',
  [
    ('all-reduce', 2 * 400 * 3 / 4),
    ('all-gather', 400 * 3 / 4),
    ('reduce-scatter', 400 * 3),
    ('all-to-all', 400 * 3 / 4),
    ('collective-permute', 400),
  ],
)
def test_sent_bytes(kind, sent):
  assert hlo.sent_bytes(kind, 'f32[100]{0:T(128)S(1)}', 4) == sent
  assert hlo.sent_bytes(kind, 'f32[100]', 1) == (400 if kind == 'collective-permute' else 0)


def test_group_sizes_in_every_notation():
  assert hlo.group_size('replica_groups={{0,1,2,3},{4,5,6,7}}, x', 8) == 4
  assert hlo.group_size('replica_groups=[4,2]<=[2,4]T(1,0)', 8) == 2
  assert hlo.group_size("replica_groups=mesh['a'=4,'b'=2,'c'=3] {'a','c'}", 24) == 12
  assert hlo.group_size('replica_groups={}', 8) == 8


def test_matmuls_of_loops_choices_and_convolutions():
  def of(f, *shapes, platform='tpu'):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return matmuls(jax.make_jaxpr(f)(*args).jaxpr, platform)

  product = of(jnp.matmul, (2, 3), (3, 5))
  assert product == (2 * 2 * 3 * 5, 4 * (6 + 15 + 10))
  looped = of(lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, None, 7)[0], (2, 3), (3, 3))
  assert looped.flops == 7 * 2 * 2 * 3 * 3

  def by_platform(x, w):
    twice = lambda x, w: x @ w @ w
    return jax.lax.platform_dependent(x, w, cpu=twice, default=jnp.matmul)

  assert of(by_platform, (2, 3), (3, 3)).flops == 36
  assert of(by_platform, (2, 3), (3, 3), platform='cpu').flops == 72

  def either(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

  assert of(either, (2, 3), (3, 3)).flops == 72

  def convolution(x, kernel):
    layout = ('NHWC', 'HWIO', 'NHWC')
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=layout)

  assert of(convolution, (2, 8, 8, 3), (3, 3, 3, 5)).flops == 2 * 2 * 64 * 5 * 27
  for num_axes in (1, 2, 3):
    for padding in ('zero', 'periodic'):
      count = of(
        lambda *args, padding=padding: conv3(*args, padding),
        (2, *[8] * num_axes, 3),
        (*[3] * num_axes, 3, 5),
      )
      assert count.flops == 2 * 2 * 8**num_axes * 5 * 3 ** (num_axes + 1)


def test_matmuls_of_a_kernel_on_a_mesh():
  """A kernel's grid, and the devices that each run it on their part."""
  device = jax.sharding.AbstractDevice(device_kind='TPU v5 lite', num_cores=1, platform='tpu')
  mesh = parallel.abstract_mesh(4, 2, device)
  batch, size, heads, width = 16, 2048, 3, 128
  x = jax.ShapeDtypeStruct((batch, size, heads, width), jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(mesh):
    jaxpr = jax.make_jaxpr(lambda *args: softmax_attention(*args))(x, x, x).jaxpr
  flops = matmuls(jaxpr, 'tpu').flops
  assert flops == 2 * 2 * batch * heads * size**2 * width


def test_chips_are_sane():
  for chip in (*chips.TPUS.values(), *chips.GPUS.values()):
    assert 1e14 < chip.float32_flops <= chip.bfloat16_flops < 1e16
    assert 1e10 < chip.hbm_bytes < 2e11 and 5e11 < chip.hbm_bandwidth < 1e13
    assert 1e11 < chip.link_bandwidth < chip.hbm_bandwidth
    assert chips.of_kind(chip.kind) is chip
  assert chips.of_kind('cpu') is None


def test_roofline_names_what_binds():
  chip = chips.TPUS['v5e']
  cost = costs.Cost(chip.bfloat16_flops, 2 * chip.hbm_bandwidth, {'all-reduce': (1, 0.0)})
  times = costs.roofline(chip, 'bfloat16', cost)
  assert times == {'arithmetic': 1, 'HBM': 2, 'links': 0}
  cost = cost._replace(
    collectives={'a': (1, chip.link_bandwidth), 'b': (3, 2 * chip.link_bandwidth)}
  )
  assert costs.roofline(chip, 'bfloat16', cost)['links'] == 3


def test_gradients_are_exchanged_by_replicas_and_shards():
  mesh = parallel.abstract_mesh
  assert costs.gradient_exchange(100, mesh(1, 1)) == {}
  assert costs.gradient_exchange(100, mesh(4, 1)) == {'all-reduce': (1, 150)}
  sharded = costs.gradient_exchange(100, mesh(2, 4))
  assert sharded == {'all-gather': (2, 600), 'reduce-scatter': (1, 300), 'all-reduce': (1, 100)}


def test_what_the_compiler_says_of_too_large_a_program():
  text = 'Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded'
  assert programs.exceeded(text) == (20.5 * 2**30, 15.75 * 2**30)
  text = 'the total memory required for HLO temporaries (54.47G) exceeds available HBM (15.75G).'
  assert programs.exceeded(text) == (54.47 * 2**30, 15.75 * 2**30)
  with pytest.raises(RuntimeError, match='something else'):
    programs.exceeded('something else')


@pytest.mark.parametrize('first, expected', [(8, 64), (64, 64), (1024, 64)])
def test_largest_batch_is_found_from_either_side(first, expected):
  chip = chips.TPUS['v5e']._replace(hbm_bytes=1000)
  tried = []

  def cost_of(size):
    tried.append(size)
    return costs.Cost(0, memory=100 + 10 * size)

  best, number = fit.largest_batch(cost_of, first, 8, 100, chip, 4)
  assert best == (expected, 100 + 10 * expected) and number == len(tried) <= 3


def test_what_fits_a_gpu_is_what_jax_takes_of_it(monkeypatch):
  for name in chips.SHARE:
    monkeypatch.delenv(name, raising=False)
  gpu, tpu = chips.GPUS['h100'], chips.TPUS['v5e']
  assert (gpu.room, tpu.room) == (60e9, 16 * 2**30)
  assert fit.fits(costs.Cost(0, memory=60e9), gpu) and not fit.fits(costs.Cost(0, memory=61e9), gpu)
  for name in chips.SHARE:
    monkeypatch.setenv(name, '.9')
    assert (gpu.room, tpu.room) == (72e9, 16 * 2**30)
    assert fit.fits(costs.Cost(0, memory=61e9), gpu)
    monkeypatch.delenv(name)


def test_largest_batch_keeps_to_its_budget_and_may_find_none():
  chip = chips.TPUS['v5e']._replace(hbm_bytes=1000)
  never = lambda size: costs.Cost(0, memory=1001)
  assert fit.largest_batch(never, 64, 8, 900, chip, 2) == (None, 2)
  assert fit.largest_batch(never, 64, 8, 900, chip, 9) == (None, 4)  # 64, 32, 16, 8


def digits(**leaves):
  config = importlib.import_module('vdm.configs.digits').get_config('debug')
  with config.unlocked():
    config.update_from_flattened_dict(leaves)
  return config


def test_auto_is_what_it_means_on_the_target():
  config = digits()
  for platform, dtype, scan in (('cpu', 'float32', 'off'), ('tpu', 'bfloat16', 'on')):
    resolved = build.for_platform(config.model, platform)
    assert (resolved.dtype, resolved.scan_blocks) == (dtype, scan)
  assert config.model.dtype == config.model.scan_blocks == 'auto'
  fixed = digits(**{'model.dtype': 'float32', 'model.scan_blocks': 'off'})
  kept = build.for_platform(fixed.model, 'tpu')
  assert (kept.dtype, kept.scan_blocks) == ('float32', 'off')


@pytest.mark.parametrize(
  'topology, leaves, message',
  [
    ('v5e', {}, r'--topology=v5e must be v4, v5e, .* try v5e:2x4 or h100:8'),
    ('b200:8', {}, '--topology=b200:8 must be'),
    ('h100:2x4', {}, '--topology=h100:2x4 must be'),
    ('h100:3', {}, r'train.batch_size=8 must be divisible by the 3 devices; try 6 or 9'),
    ('v5e:4x4', {}, r'train.batch_size=8 must be divisible by the 16 devices; try 16'),
    ('h100:8', {'parallel.fsdp': 3}, 'parallel.fsdp=3 must be a divisor of the 8 devices'),
    ('h100:8', {'parallel.mode': 'pmap'}, "parallel.mode='pmap' must be 'jit' for a plan"),
  ],
)
def test_errors_are_one_line_with_a_remedy(topology, leaves, message):
  with pytest.raises(ValueError, match=message) as error:
    plan.run(digits(**leaves), topology, 0)
  assert '\n' not in str(error.value)


@pytest.mark.slow
def test_a_plan_of_devices_that_are_not_here_joins_no_job():
  job = ('--coordinator=localhost:0', '--num_processes=2', '--process_id=0')  # which never begins
  command = [sys.executable, '-m', 'vdm.main', '--config=configs/digits.py:debug', '--mode=plan']
  command += ['--topology=h100:8', '--plan_search=0', *job]
  root = pathlib.Path(__file__).parents[1]
  done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=250)
  assert done.returncode == 0 and 'digits_debug on h100:8' in done.stdout


def test_a_missing_compiler_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(
    ValueError, match=r"v5e:2x2 needs XLA's TPU compiler; pip install 'vdm-jax\[tpu\]'"
  ):
    plan.run(digits(), 'v5e:2x2', 0)


def cells_of(text, label):
  (line,) = (line for line in text.splitlines() if line.startswith(f'| {label} '))
  return [cell.strip() for cell in line.split('|')[2:-1]]


@pytest.mark.slow
def test_plan_for_gpus_writes_nothing(capsys, tmp_path, monkeypatch, rank_promotion_allowed):
  monkeypatch.chdir(tmp_path)
  assert plan.run(digits(), 'h100:8', 2) == 0
  text = capsys.readouterr().out
  assert list(tmp_path.iterdir()) == []
  assert cells_of(text, 'images of a call, on all devices') == ['8', '8', '8']
  train, evaluation, sample = (float(c.split()[0]) for c in cells_of(text, 'FLOPs'))
  assert train > sample > 0 and evaluation == pytest.approx(2 * sample, rel=1e-2)  # two draws
  assert '4 calls' in cells_of(text, 'all of it')[0]
  assert cells_of(text, 'all-reduce: number, sent')[0].startswith('1, ')
  assert text.count('Largest batch found to fit with model.remat=') == 2
  lengths = {len(line) for line in text.splitlines() if line.startswith('|')}
  assert len(lengths) == 1


def test_what_does_not_fit_says_what_to_change(monkeypatch, capsys, rank_promotion_allowed):
  small = chips.GPUS['h100']._replace(hbm_bytes=1000)
  monkeypatch.setitem(chips.GPUS, 'h100', small)
  assert plan.run(digits(**{'train.batch_size': 32}), 'h100:8', 0) == 1
  *_, skipped, line = capsys.readouterr().out.splitlines()
  assert skipped.startswith('--plan_search=0')
  for remedy in ('parallel.fsdp=8', 'model.remat=True'):
    assert f'--config.{remedy}' in line
  assert 'batch' not in line  # not one image would fit


@pytest.mark.parametrize('excess, microbatches, batch_size', [(1.5, 2, 32), (3.4, 4, 16)])
def test_advice_divides_the_batch_by_enough(excess, microbatches, batch_size):
  config = digits(**{'train.batch_size': 64})
  where = costs.target('h100:8', 1)
  cost = costs.Cost(0, memory=excess * where.chip.room)
  line = fit.advice(config.train, config.model, cost, where, state_bytes=0)
  assert f'--config.train.microbatches={microbatches},' in line
  assert f'--config.train.batch_size={batch_size},' in line


def test_advice_on_what_reads_a_run_divides_its_own_batch():
  where = costs.target('h100:8', 1)
  cost = costs.Cost(0, memory=3.4 * where.chip.room)
  of = lambda name, images: costs.Step(name, None, (), images, 1, 1)
  line = fit.advice_on_reading(of('sample', 64), cost, where)
  assert line.startswith('sampling takes ') and ' try --config.sample.batch_size=16, more' in line
  line = fit.advice_on_reading(of('eval', 16), cost, where)  # fewer than one per device
  assert line.startswith('evaluation takes ') and ' try more devices, or larger ones.' in line


@pytest.mark.parametrize('page', [', page 0', ''])  # libtpu 0.0.52 has pages, 0.0.42 has not
def test_memory_is_that_of_the_buffers_in_hbm(page):
  buffers = """BufferAssignment:
allocation 0: size 512, page 0, thread-local:
allocation 1: size 100, page 0, parameter 3, shape |f32[25]| at ShapeIndex {}, maybe-live-out:
 value: <108 x.1 @0> (size=100,offset=0): f32[25]{0:T(128)}
allocation 2: size 20, page 0, parameter 0, shape |f32[5]| at ShapeIndex {}:
allocation 3: size 3, page 0, output shape is |(f32[25], f32[])|, maybe-live-out:
allocation 4: size 4, page 0, maybe-live-out:
allocation 5: size 512, page 0, constant:
allocation 6: size 1000, page 0, preallocated-temp:
 value: <113 copy-start.1{0} @1> (size=1000,offset=0): f32[250]{0:T(128)}
allocation 7: size 5000, color 1, page 0, preallocated-temp:
"""
  assert programs.assigned(buffers.replace(', page 0', page)) == (1000, 1127)
  with pytest.raises(RuntimeError, match='a way that is not known; plans have been made with'):
    programs.assigned(buffers.replace('allocation', 'buffer'))


class Lowered:
  """Stands for a step whose compilation writes what XLA does, or fails, or never ends."""

  def __init__(self, *behaviour):
    self.behaviour = behaviour

  def compile(self, options):
    folder = pathlib.Path(options['xla_dump_to'])
    for part in self.behaviour:
      if part == 'dumps':
        for pattern in (programs.MEMORY, programs.TEXT, programs.LAST):
          buffers = 'allocation 0: size 7, page 0, parameter 0, shape'
          text = buffers if pattern == programs.MEMORY else 'text'
          (folder / pattern.replace('*', 'module_0000')).write_text(text)
      elif part == 'hangs':
        time.sleep(600)
      elif part == 'dies':
        os.kill(os.getpid(), signal.SIGKILL)
      else:
        raise jax.errors.JaxRuntimeError(part)


def test_a_compilation_is_ended_once_the_program_is_written():
  start = time.monotonic()
  assert programs.optimised(Lowered, 'dumps', 'hangs') == programs.Program('text', 0, 7)
  assert time.monotonic() - start < 300
  assert not multiprocessing.active_children()


def test_a_compilation_ends_where_its_plan_fails():
  with pytest.raises(KeyError), programs.compilers() as pool:
    pool.submit(programs.optimised, Lowered, 'hangs')
    while not multiprocessing.active_children():
      time.sleep(0.1)
    raise KeyError
  deadline = time.monotonic() + 60
  while multiprocessing.active_children():
    assert time.monotonic() < deadline
    time.sleep(0.1)


@pytest.mark.skipif(sys.platform != 'linux', reason='children are counted in /proc')
def test_a_compilation_ends_with_the_process_that_asked(tmp_path):
  # the other process holds the pipe open for as long as it runs
  program = tmp_path / 'asks.py'
  program.write_text(
    'from tests.test_plan import Lowered\n'
    'from vdm.planning import programs\n'
    "if __name__ == '__main__':\n"
    "  programs.optimised(Lowered, 'hangs')\n"
  )
  here = str(pathlib.Path(__file__).parents[1])
  env = os.environ | {'PYTHONPATH': os.pathsep.join([here, os.environ.get('PYTHONPATH', '')])}
  asking = subprocess.Popen([sys.executable, program], env=env, stdout=subprocess.PIPE)
  children = pathlib.Path(f'/proc/{asking.pid}/task/{asking.pid}/children')
  deadline = time.monotonic() + 120
  while len(children.read_text().split()) < 2:  # the tracker of resources, and the compilation
    assert asking.poll() is None and time.monotonic() < deadline
    time.sleep(0.1)
  time.sleep(20)  # until it hangs
  asking.kill()
  asking.communicate(timeout=60)


def test_a_compilation_that_fails_says_why():
  used = programs.optimised(Lowered, 'Used 20.5G of 15.75G hbm')
  assert (used.memory, used.limit) == (20.5 * 2**30, 15.75 * 2**30)
  with pytest.raises(RuntimeError, match='something else'):
    programs.optimised(Lowered, 'something else')
  with pytest.raises(RuntimeError, match=r'status -9 before .* want of memory on this machine'):
    programs.optimised(Lowered, 'dies')
  with pytest.raises(RuntimeError, match='has written no program; plans have been made with'):
    programs.optimised(Lowered)


def elsewhere(function, *args):
  """Calls a function in a new process: one with libtpu crashes when another test profiles it."""
  with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:
    return pool.submit(function, *args).result()


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason="libtpu is XLA's TPU compiler")
@pytest.mark.slow
def test_compiles_for_a_slice_that_is_not_here(tmp_path):
  elsewhere(compile_for_a_slice, tmp_path)


def compile_for_a_slice(folder):
  where, config = costs.target('v5e:2x2', 1), digits()
  config.model = build.for_platform(config.model, where.platform)
  step, of = next(plan.steps(config, where.mesh)), (config, 'v5e:2x2', 'train')
  cost = costs.cost(step, where, lambda: programs.optimised(plan.lowered, *of))
  assert cost.limit is None and 0 < cost.temporaries < cost.memory < where.chip.hbm_bytes
  assert cost.traffic > 0 and math.isfinite(cost.flops)
  assert cost.collectives['all-reduce'][1] > 0
  whole = costs.cost(step, where, lambda: programs.compiled(plan.lowered(*of)))
  assert whole._replace(seconds=None, accessed=None) == cost
  assert whole.seconds > 0 and whole.accessed > 0
  # what JAX says of the same program, where parts of tuples have lines of their own
  text = programs._compile(plan.lowered(*of), folder).as_text()
  assert cost.traffic == pytest.approx(hlo.traffic(text, 4).bytes, rel=1e-3)


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason="libtpu is XLA's TPU compiler")
@pytest.mark.slow
def test_the_compiler_says_nothing_of_the_cloud_that_it_is_not_in():
  code = "from vdm.planning import costs; print(len(costs.tpu_devices('v5e:2x4')))"
  env = {k: v for k, v in os.environ.items() if not k.startswith(('TPU_', 'ALLOW_', 'XLA_'))}
  done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
  assert done.stdout.strip() == '8' and 'TPU_' not in done.stderr and 'Failed' not in done.stderr


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason="libtpu is XLA's TPU compiler")
@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v4:2x2x2', 'v5e:2x4', 'v5p:2x2x2', 'v6e:2x4'])
def test_a_slice_has_as_many_devices_as_chips(topology):
  assert elsewhere(count_devices, topology) == 8


def count_devices(topology):
  return len(costs.tpu_devices(topology))
