"""The door for Python: a model, its data and its devices as one object, without files or flags.

exp = vdm.Experiment('digits', {'train.num_steps': 100})
state = exp.init()
for state, metrics in exp.fit(state, steps=100): ...
exp.bits_per_dim(state).value
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from vdm import build, data
from vdm.build import by_hand
from vdm.build.state import TrainState, named_params
from vdm.diffusion.gaussian import Denoiser, Schedule
from vdm.diffusion.samplers import Sampler
from vdm.errors import require
from vdm.evaluation import likelihood, ode
from vdm.evaluation.bound import BitsPerDim, make_evaluator
from vdm.evaluation.likelihood import LogProb
from vdm.evaluation.study import batches
from vdm.sampling.draw import make_draw, make_guidance
from vdm.sampling.labels import conditions_of
from vdm.system import files, hosts, parallel, runners
from vdm.system.stopping import Stopped
from vdm.training import loop
from vdm.training.step import make_train_step
from vdm.workdir import checkpoint, config_file, lock
from vdm.workdir.load import check_start, first_state, read_run


class Experiment:
  """Holds a model of a config, with its data and the devices at hand.

  Nothing is written but by `save` and `train`. States are values: methods take one and return one.

  Attributes:
    config: the whole config, locked.
    model: the model as pure functions of parameters.
    mesh: the devices.
  """

  def __init__(
    self,
    config: str | os.PathLike | ConfigDict,
    overrides: Mapping[str, Any] | None = None,
    workdir: str | os.PathLike | None = None,
  ):
    """Builds the model.

    Args:
      config: the name of a packaged config such as 'digits' or 'digits:debug', a config file, or a
        ConfigDict, which is copied.
      overrides: values by the names of their leaves, {'train.num_steps': 100}.
      workdir: of a run with this config, if any; what it has found in its data is not looked for
        again.

    Raises:
      ValueError: there is no such config or leaf, or a value cannot be used.
    """
    self.config = config_file.settled(config_file.read_config(config, overrides or {}), workdir)
    self.model = build.model(self.config)
    build.check_devices(self.config, jax.device_count())
    self.mesh = parallel.make_mesh(self.config.parallel.fsdp)
    self._sources: dict[str, data.Source] = {}
    self._evaluators: dict[FrozenConfigDict, Callable[..., BitsPerDim]] = {}
    self._steps: dict[tuple, Callable] = {}

  def source(self, split: str = 'train') -> data.Source:
    """Returns a split of the config's data, 'train' or 'eval'."""
    if split not in self._sources:
      source = data.load(self.config.data, split)
      self._sources[split] = build.within_bounds(self.config.decoder, source)
    return self._sources[split]

  def init(self) -> TrainState:
    """Returns the state before the first step, by config.seed and config.train.start_from."""
    start_from = self.config.train.start_from
    if start_from:
      check_start(start_from, config_file.flat(config_file.plain(self.config)))
    return first_state(start_from, build.init_state(self.config, self.model), self.mesh)

  def fit(
    self, state: TrainState, steps: int | None = None, source: data.Source | None = None
  ) -> Iterator[tuple[TrainState, dict[str, jax.Array]]]:
    """Trains in this process and without files; yields the state and metrics after each step.

    Reading a metric waits for its step; the loop itself does not. The step is compiled once, by the
    first call.

    Args:
      state: to go on from; it stays usable.
      steps: to be taken; None: up to config.train.num_steps.
      source: of the batches; None: the training split.
    """
    config, start = self.config, int(state.step)
    steps = config.train.num_steps - start if steps is None else steps
    require(steps >= 0, 'steps', steps, 'zero or more', 'raise config.train.num_steps')
    runner, source = self._runner, self._source('train' if source is None else source)
    batches = loop.train_batches(source, config.train.batch_size, config.seed, start)
    placed = parallel.prefetch(batches, runner.put_batch)
    for _ in range(steps):
      state, metrics = runner.step(state, next(placed))
      yield state, metrics.scalars

  def bits_per_dim(
    self,
    state: TrainState,
    params: str = 'ema',
    split: str | data.Source = 'eval',
    **settings: Any,
  ) -> BitsPerDim:
    """Returns the variational bound, with `.value`, `.stderr` and `.terms`, in `.unit`.

    That is bits/dim, or for continuous data nats/dim, of the density per unit of the data. It is
    compiled once for each choice of settings.

    Args:
      state: of this experiment.
      params: 'raw', 'ema' or another average.
      split: 'train', 'eval', or images (`data.of_arrays`).
      **settings: leaves of config.eval to change, such as draws=4, max_images=100, seed=1.
    """
    chosen, source = self._changed('eval', settings), self._source(split)
    key = FrozenConfigDict(chosen)
    if key not in self._evaluators:
      self._evaluators[key] = make_evaluator(self.model, self.mesh, chosen)
    num_images = data.num_eval_images(source, chosen.max_images)
    return self._evaluators[key](named_params(state, params), batches(source, chosen), num_images)

  def log_prob(
    self,
    state: TrainState,
    images: np.ndarray,
    draws: int = 8,
    seed: int = 0,
    label: np.ndarray | None = None,
    vector: np.ndarray | None = None,
    condition: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    bound: str = 'elbo',
    params: str = 'ema',
    **settings: Any,
  ) -> LogProb:
    """Returns a lower bound on log p(x) of each image, in nats, with its standard error.

    Args:
      state: of this experiment.
      images: [N *spatial C], in the data's units.
      draws: estimates of each image: of the bound at times in as many strata, or solves of the ODE.
      seed: of the draws.
      label: classes [N], for a model by class. Of these three, None is what stands for none, for a
        model that learned it (config.train.label_dropout).
      vector: conditions [N E].
      condition: fields [N *spatial' Cc].
      mask: [N *spatial 1], nonzero in the dimensions that count; None: all.
      bound: 'elbo', the variational bound, or 'ode', the probability-flow ODE.
      params: as in `bits_per_dim`.
      **settings: leaves of config.eval.ode to change, such as trace='exact', or
        importance_samples=64, which tightens the bound that dequantisation leaves.
    """
    require(bound in ('elbo', 'ode'), 'bound', bound, "'elbo' or 'ode'", 'choose one')
    rule, remedy = "left out for the bound 'elbo'", "they are of bound='ode'"
    require(bound == 'ode' or not settings, 'settings', [*settings], rule, remedy)
    require(draws > 0, 'draws', draws, 'positive', 'give 1 or more')
    how, solver = self._changed('eval', dict(max_images=0)), self._changed('eval.ode', settings)
    if bound == 'ode':
      build.check_ode(self.model.decoder, solver.dequantization, 'bound', bound)
    told: dict[str, Any] = dict(label=label, vector=vector, condition=condition, mask=mask)
    given = self._given(len(images), **told)
    values = self.config.data.num_values
    images = by_hand.images_of(self.model, values, images, given.get('valid'))
    source = data.of_arrays(images, 'log_prob', **given)
    weights = named_params(state, params)
    placed = (parallel.to_devices(self.mesh, batch) for batch in batches(source, how))
    if bound == 'elbo':
      step = self._once(likelihood.jit_step, draws, how.num_timesteps)
      return likelihood.nats_of([parallel.on_host(step(weights, b, seed)) for b in placed])
    solve = ode.OdeSettings(**solver)
    return ode.nats_of(self._once(ode.jit_step, solve), weights, placed, solve, draws, seed)

  def log_prob_given(
    self,
    state: TrainState,
    images: np.ndarray,
    draws: int = 64,
    seed: int = 0,
    mask: np.ndarray | None = None,
    params: str = 'ema',
  ) -> Callable[..., jax.Array]:
    """Returns a function of conditions to estimates of log p(x | conditions), [draws N] nats.

    It is called with `label`, `vector` and `condition`, one for all images or one for each, and has
    the same noise whatever they are: so its means over draws may be compared, differentiated and
    maximised, and it may be jitted and mapped. `vdm.likelihood.standard_error` is the error of
    such a mean, or of the mean of a difference.

    Args:
      state: of this experiment.
      images: [N *spatial C], in the data's units; all at once.
      draws: times and noises of each image, in strata.
      seed: of the draws.
      mask: [N *spatial 1], nonzero in the dimensions that count; None: all.
      params: as in `bits_per_dim`.
    """
    require(draws > 0, 'draws', draws, 'positive', 'give 1 or more')
    valid = self.model.takes.valid(self.model.image_shape, len(images), mask)
    return likelihood.by_condition(
      functools.partial(self.denoiser, state, params, mask=mask),
      functools.partial(self.schedule, state, params, mask=mask),
      self.model.decoder_of(named_params(state, params)),
      jnp.asarray(by_hand.images_of(self.model, self.config.data.num_values, images, valid)),
      seed,
      draws,
      self.config.eval.num_timesteps,
      None if valid is None else jnp.asarray(valid),
    )

  def sample(
    self,
    state: TrainState,
    num_images: int,
    sampler: Sampler | None = None,
    label: int | np.ndarray | None = None,
    vector: np.ndarray | None = None,
    condition: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    guidance: float | None = None,
    params: str = 'ema',
    **settings: Any,
  ) -> np.ndarray:
    """Returns images [N *spatial C] in the data's units; each depends on its number and the seed.

    Args:
      state: of this experiment.
      num_images: N.
      sampler: such as `vdm.samplers.ddim()`; None: config.sample.sampler.
      label: a class for all, or classes [N]; None: by config.sample.label_rule.
      vector: conditions [N E]. Where one of these three is given, what is not given stands for
        none, for a model that learned it (config.train.label_dropout); else all are those of the
        evaluation split.
      condition: fields [N *spatial' Cc].
      mask: [N *spatial 1], nonzero in the dimensions that count.
      guidance: weight of classifier-free guidance, 1 is none; None: config.sample.guidance.
      params: as in `bits_per_dim`.
      **settings: leaves of config.sample to change, such as num_steps=32, seed=1.
    """
    require(num_images > 0, 'num_images', num_images, 'positive', 'give 1 or more')
    made_by = sampler is None or isinstance(sampler, Sampler)
    remedy = 'a name is for config.sample.sampler'
    require(made_by, 'sampler', sampler, 'a Sampler such as vdm.samplers.ddim()', remedy)
    config = self.config.copy_and_resolve_references().unlock()
    config.sample = self._changed('sample', settings)
    if guidance is not None:
      kind = 'none' if guidance == 1 else 'classifier_free'
      config.sample.guidance.update(kind=kind, weight=float(guidance))
    build.check_sampling(config.sample, self.schedule(state, params), self.model.takes)
    told: dict[str, Any] = dict(label=label, vector=vector, condition=condition, mask=mask)
    if all(value is None for value in told.values()):
      conditions = conditions_of(config.sample, config.data, config.model.class_conditional)
    else:
      rows = self._given(num_images, **told)
      last = num_images - 1  # the last batch is filled up
      conditions = lambda index: {k: v[np.minimum(index, last)] for k, v in rows.items()}
    made = make_guidance(config.sample.guidance, config.schedule, self.model, self.mesh)
    draw = make_draw(self.model, self.mesh, config.sample, conditions, made, sampler)
    return np.concatenate(list(draw(named_params(state, params), num_images)))

  def denoiser(
    self,
    state: TrainState,
    params: str = 'ema',
    label: np.ndarray | None = None,
    vector: np.ndarray | None = None,
    condition: np.ndarray | None = None,
    mask: np.ndarray | None = None,
  ) -> Denoiser:
    """Returns (z [B ...], log_snr [B]) -> Prediction(x, eps) of a state, in the network's units.

    The log_snr is what the model's `schedule` returns, [B ...] if that is multivariate. The
    conditions are those of `log_prob`, one for each of the B examples; they may be traced.
    """
    told = self._told(label=label, vector=vector, condition=condition, mask=mask)
    self.model.takes.require_known(told)
    return self.model.denoiser(named_params(state, params), told)

  def schedule(
    self,
    state: TrainState,
    params: str = 'ema',
    label: np.ndarray | None = None,
    vector: np.ndarray | None = None,
    condition: np.ndarray | None = None,
    mask: np.ndarray | None = None,
  ) -> Schedule:
    """Returns t [B] -> log_snr [B] of a state, or [B ...] if it is multivariate.

    The conditions, as in `denoiser`, matter to `learned_conditional` alone; without any it is the
    schedule of examples of which nothing is known.
    """
    told = self._told(label=label, vector=vector, condition=condition, mask=mask)
    return self.model.schedule(named_params(state, params), told)

  def training_schedule(self, state: TrainState) -> Schedule:
    """Returns what training draws its times from: an adaptive schedule, or else `schedule`."""
    return self.model.training_schedule(state.params, state.adaptive)

  def save(self, state: TrainState, workdir: str | os.PathLike):
    """Writes a state as a checkpoint of a workdir, which all commands and `load` read.

    Raises:
      ValueError: the workdir is another run's, or holds that step already.
    """
    workdir = files.path_of(workdir)
    config_file.check_writable(workdir, 'workdir', 'choose another')
    with lock.hold(workdir):
      config_file.open_workdir(workdir, self.config)
      with checkpoint.manager(workdir, self.config.checkpoint.keep) as manager:
        saved = checkpoint.save(manager, int(state.step), state)
    rule = f'one without step {int(state.step)}'
    require(saved, 'workdir', os.fspath(workdir), rule, 'choose another, or load that step')

  def train(self, workdir: str | os.PathLike) -> TrainState:
    """Runs the whole job as the command line does, or goes on with it; returns the newest state.

    Raises:
      KeyboardInterrupt: it was stopped by a signal, and saved: the same call goes on.
    """
    try:
      stopped = loop.train(self.config, files.path_of(workdir)) != 0
    except Stopped:  # before its first step
      stopped = True
    if stopped:
      raise KeyboardInterrupt(f'{workdir} was stopped, and nothing is lost; the same call goes on.')
    return read_run(self.config, files.path_of(workdir)).state

  @functools.cached_property
  def _runner(self) -> runners.Runner:
    """Returns the train step, to be compiled when it is first taken."""
    abstract = parallel.abstract_state(self.mesh, build.init_state(self.config, self.model))
    step = make_train_step(self.config, self.model)
    return runners.jit_runner(step, self.mesh, abstract, donate=False)

  def _given(self, count: int, **told: Any) -> dict[str, np.ndarray]:
    given = self.model.takes.given(self.model.image_shape, count, **told)
    self.model.takes.require_known(told)
    return given

  def _told(self, **given: Any) -> dict[str, jax.Array]:
    """Returns conditions by the names that the model has for them, and refuses other shapes."""
    named = {name: jnp.asarray(value) for name, value in given.items() if value is not None}
    rows = next((value.shape[0] for value in named.values() if value.ndim), 1)
    self.model.takes.require_shapes(self.model.image_shape, rows, named)
    if 'label' in named and not isinstance(named['label'], jax.core.Tracer):
      self.model.takes.require_classes(np.asarray(named['label']))
    if 'mask' in named:
      named['valid'] = named.pop('mask') != 0
    return named

  def _once(self, jit_step: Callable, *settings: Hashable) -> Callable:
    """Returns jit_step(model, mesh, *settings), the same at every call: it is compiled once."""
    key = (jit_step, *settings)
    if key not in self._steps:
      self._steps[key] = jit_step(self.model, self.mesh, *settings)
    return self._steps[key]

  def _changed(self, block: str, settings: Mapping[str, Any]) -> ConfigDict:
    """Returns a block of the config with some leaves changed, to values that a config can have."""
    config = self.config.copy_and_resolve_references()
    changed = functools.reduce(lambda tree, name: tree[name], block.split('.'), config)
    for name, value in settings.items():
      known = ', '.join(changed)
      require(name in changed, name, value, f'a leaf of config.{block}', f'it has {known}')
      changed[name] = value
    build.check_config(config)
    build.check_devices(config, jax.device_count())
    return changed

  def _source(self, split: str | data.Source) -> data.Source:
    """Returns a split of the config's data, or a source of the same shapes that is given."""
    if isinstance(split, str):
      return self.source(split)
    rule, remedy = "'train', 'eval' or a vdm.data.Source", 'vdm.data.of_arrays(images) makes one'
    require(isinstance(split, data.Source), 'source', type(split).__name__, rule, remedy)
    by_hand.require_rows(self.model, cast(dict, split.fetch(np.zeros(1, np.int64))))
    fetch = by_hand.checked(self.model, self.config.data.num_values, split.fetch)
    return build.within_bounds(self.config.decoder, dataclasses.replace(split, fetch=fetch))


def use_cores():
  """Makes a CPU as many devices as it has cores, as the commands do; call it before all else.

  They are a power of two, 8 at most, which divides batches of usual sizes. It has no effect on
  accelerators, nor where JAX was told how many devices a CPU is.
  """
  hosts.use_cores(lambda count: count & (count - 1) == 0)


def load(
  workdir: str | os.PathLike,
  *,
  step: int | str | None = None,
  overrides: Mapping[str, Any] | None = None,
) -> tuple[Experiment, TrainState]:
  """Returns the experiment and a state of a run, by its own config; reads only.

  Args:
    workdir: of the run, or the folder of a released model; 'pretrained/digits' comes with the
      package.
    step: None: the newest; 'best': the lowest bits/dim; or a number.
    overrides: leaves of its config to be changed, such as {'sample.batch_size': 6} on three
      devices.

  Raises:
    ValueError: there is no such run or checkpoint, or it cannot be restored.
  """
  workdir = files.packaged_run(workdir)
  run = read_run(None, workdir, 'newest' if step is None else str(step), overrides)
  return Experiment(run.config, workdir=run.workdir), run.state
