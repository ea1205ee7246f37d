"""Every leaf a run can have, with its meaning. Other configs start from this one.

A block with a `name` is built by calling the factory of that name with the other leaves as keyword
arguments (`schedule` from `vdm.diffusion.schedules.SCHEDULES`, `weighting` from
`vdm.diffusion.weightings.WEIGHTINGS`, `model` from `vdm.nn.NETWORKS`; in `sample`, `sampler`,
`grid` and `threshold`), so a leaf that a factory does not know is refused.
"""

import math

from ml_collections import ConfigDict

SMALL_NETWORKS = dict(
  vdm_unet=dict(width=16, num_blocks=1),
  mlp=dict(width=16, num_blocks=1),
  adm_unet=dict(
    width=16, num_blocks=1, channel_multipliers=(1, 2), attention_resolutions=(), head_width=16
  ),
  uvit=dict(
    widths=(16, 16),
    num_blocks=1,
    transformer_width=32,
    transformer_depth=2,
    head_width=16,
    conditioning_width=16,
  ),
  dit=dict(width=32, num_blocks=2, head_width=16, conditioning_width=16),
)


def get_config(arg=''):
  """The complete configuration; `arg` is what follows the colon in `--config=FILE:arg`."""
  config = ConfigDict()
  config.name = 'default'  # the workdir is runs/<name> unless --workdir is given
  config.seed = 0

  config.data = ConfigDict(
    dict(
      # 'digits' (embedded); 'folder' of pictures, 'arrays' in a file, or 'huggingface', all at
      # `path`; 'gaussian_field' (synthetic); or a TFDS image set: 'imagenet_resized/64x64'
      name='digits',
      path='',
      dir='',  # TFDS data_dir; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets
      train_split='train',  # or a part of files and rows in their order, such as '[:90%]'
      eval_split='test',
      eval_share=0.1,  # of examples that are in 'test' where the data itself has no such split
      cache=True,  # of `folder`: keep the pictures decoded, in ~/.cache/vdm/pictures
      ignore='',  # with as_found=True: of 'label,vector,condition,mask' what is not to be used
      # What the data must be. The run stops when what was loaded differs; with as_found=True these
      # leaves, down to `masked`, are taken from the data instead, once, and kept with the run.
      as_found=False,
      train_images=1437,
      eval_images=360,
      image_shape=(8, 8, 1),  # one, two or three spatial axes, and channels
      num_values=17,  # values are integers 0 .. num_values - 1; 0: they are real
      num_classes=10,  # 0: the data has no labels
      embedding_size=0,  # of a vector on which the network is conditioned; 0: none
      condition_shape=(),  # of a field on which it is: spatial axes and channels; (): none
      masked=False,  # each example has a mask of the dimensions that count
      # Condition and mask made of the image: 'low_resolution', block means of condition_shape, or
      # 'inpainting', its middle given the rest; '': those that are stored, if any. Or coefficients
      # of the Haar transform at `level`, 1 the finest, as real values, after uniform noise where
      # pixels are integers 0 .. dequantize - 1: 'haar_details' given 'haar_coarse', or that itself.
      derive='',
      level=1,
      dequantize=0,
      # Mean and standard deviation per channel of real values, of conditions and of vectors, with
      # which the network sees them; (): measured over the training split, and kept with the run.
      shift=(),
      scale=(),
      condition_shift=(),
      condition_scale=(),
      vector_shift=(),
      vector_scale=(),
      # `gaussian_field`, periodic: P(k) ~ (cutoff^2 + k^2)^(exponent / 2), of variance std^2. The
      # condition, if condition_shape is not (), is blurred, subsampled and noisy.
      gaussian_field=dict(
        exponent=-3.0, std=1.0, mean=0.0, cutoff=0.0, blur=1.0, noise_std=0.5, subsample=1
      ),
      resize=False,  # scale images of any size to cover image_shape, and crop the middle
      num_bits=0,  # 5: keep the 5 highest bits of 8-bit pixels, with num_values=32; 0: all bits
      flip=False,  # random horizontal flips in training
      rotate=False,  # random quarter turns in half of training's images; needs augmentation_flag
    )
  )
  config.model = ConfigDict(
    dict(
      name='vdm_unet',
      output='eps',  # what the network predicts: see vdm.diffusion.heads.HEADS
      width=32,
      num_blocks=2,  # ResNet blocks on the way in; one more on the way out
      attention=False,  # attention in every block, not only in the middle
      padding='zero',  # of convolutions: 'zero' or 'periodic', or one per axis, 'zero,periodic'
      num_heads=1,
      fourier_exponents=(3, 4),  # sin and cos of 2 pi 2^n z for each n; 6, 7 for 8-bit data
      dropout=0.1,
      norm_groups=0,  # of channels in every norm; 0: 32, but at least four channels in each
      class_conditional=False,
      # The network sees (log_snr_max - log_snr) / (log_snr_max - log_snr_min) by the end points as
      # they are learned, 'live', or as they are written below, 'configured' (the public VDM code).
      condition_on='live',
      augmentation_flag=False,  # the network is told which images flip or rotate has changed
      scan_blocks='auto',  # equal blocks in a loop: 'on', 'off'; auto: on, but off on CPU
      remat=False,  # compute activations again in the gradient: less memory, a third more FLOPs
      dtype='auto',  # of activations: 'float32', 'bfloat16'; auto: bfloat16 on TPU and GPU
    )
  )
  # p(u | z_0): 'discrete' for integers, in bits/dim; 'normal' for real values, in nats/dim, and
  # 'censored' for those in [low, high] that are often a bound; both with learned_std or without.
  config.decoder = ConfigDict(dict(name='discrete', learned_std=False, low=0.0, high=1.0))
  # Beside the names of SCHEDULES: 'adaptive' (VDM++), and 'learned_multivariate' and, of the class,
  # vector or field, 'learned_conditional'; their leaf `per`, in a config file, is 'channel' or
  # 'dimension', the default.
  config.schedule = ConfigDict(dict(name='learned_endpoints', log_snr_min=-5.0, log_snr_max=8.0))
  # image_size=128, beside the name, moves any weighting from 64 x 64: `weightings.shifted`
  config.weighting = ConfigDict(dict(name='elbo'))

  config.optimizer = ConfigDict(
    dict(
      kind='adamw',  # or 'muon': for the kernels, with Adam for all else
      moments='float32',  # of the first moments: or 'bfloat16', a quarter less of Adam's state
      learning_rate=2e-4,
      warmup_steps=100,
      decay='constant',  # after the warm-up: or 'cosine' or 'linear', to zero at num_steps
      b1=0.9,
      b2=0.99,
      eps=1e-8,
      weight_decay=0.01,  # on kernels only: never on schedule, biases, norms or embeddings
      schedule_rate=1.0,  # a learned schedule's learning rate over the network's; 10 for short runs
      clip_norm=0.0,  # global norm of the gradient; 0: no clipping
    )
  )
  config.ema = ConfigDict(
    dict(
      halflife_images=500_000,  # decay per step is 0.5 ** (batch_size / halflife_images)
      rampup_ratio=0.05,  # half-life at most this fraction of the images seen; 0: no ramp
      extra_halflives_images=(),  # further averages, called halflife_<images>
      power_stds=(),  # power-function averages of these lengths (EDM2), called std_<length>
      snapshot_every_steps=0,  # stores those, for --mode=reconstruct; 0: never
      reconstruct_std=0.1,  # the length that --mode=reconstruct makes of them
    )
  )
  config.train = ConfigDict(
    dict(
      batch_size=128,  # over all devices, hosts and microbatches
      num_steps=1000,
      num_timesteps=0,  # T of the discrete-time loss; 0: continuous time
      # the weight of the second-order loss, which fits the divergence that the ODE's likelihood is
      # made of; 0: none. i-DODE has 0.1, in a stage of its own (start_from); 2.7 times the time
      second_order=0.0,
      start_from='',  # workdir of a run, or a released model, whose averages this run starts from
      microbatches=1,  # gradients are accumulated over this many parts of the batch
      # where a loss or gradient is not finite: 'stop', or 'skip' the step, which then changes
      # nothing, at most most_skipped times in a row
      on_nan='stop',
      most_skipped=10,
      label_dropout=0.0,  # share of examples without conditions, for classifier-free guidance: 0.1
      log_every_steps=100,
      eval_every_steps=500,
    )
  )
  config.eval = ConfigDict(
    dict(
      batch_size=128,
      draws=4,  # of (t, eps) per image; two or more give a standard error
      num_timesteps=0,  # T of the evaluated bound; 0: continuous time
      max_images=0,  # evaluate this many images only; 0: the whole split
      seed=0,
      params='raw,ema',  # which parameters and averages (config.ema); the last ranks checkpoints
      # Of the bound: the model's own schedule, or a fixed one by its name between its end points.
      schedule=dict(name='schedule'),
      augmented_elbo=False,  # --mode=eval: the weighted loss as bounds of data with noise, by level
      # --mode=eval of real values, or given fields: samples beside the first examples, spectrum,
      # histogram, and with conditions the coverage of intervals; 0 examples: none.
      fields=dict(num_examples=256, samples_per_example=16),
      fid=False,  # --mode=eval: scores fid.num_images samples, by config.sample and config.fid
      likelihood='elbo',  # of --mode=eval: 'elbo', 'ode', or 'elbo,ode' for both; training: elbo
      # The exact likelihood by the probability-flow ODE: see vdm.diffusion.ode. A solve per draw,
      # in float32 whatever model.dtype is.
      ode=dict(
        params='ema',  # 'raw', 'ema' or another average
        rtol=1e-4,  # of a step: relative to the log-determinant per dimension and to z ...
        atol=1e-4,  # ... and absolute; smaller is dearer
        max_steps=1000,  # an image that needs more stops the evaluation
        trace='hutchinson',  # 'hutchinson': unbiased; 'exact': as many products as dimensions
        probe='rademacher',  # Hutchinson's: 'rademacher' or 'gaussian'
        num_probes=1,  # an image
        dequantization='truncated_normal',  # or 'uniform'
        importance_samples=1,  # draws of it; 1: the plain bound, more tighten it, a solve each
      ),
    )
  )
  # --mode=likelihood: every example's own, as a table; seed, batches, images, parameters, T, and
  # whether by the bound or the ODE are those of config.eval.
  config.likelihood = ConfigDict(
    dict(
      draws=64,  # of each example: times in as many strata, or solves of the ODE
      maps=16,  # the first examples, of which the diffusion term is drawn by pixel; 0: none
      intervals=1,  # equal parts of the range of log-SNR that a map is split into
      conditions='given',  # or 'none': as if nothing were known, which train.label_dropout teaches
    )
  )
  # A second data set, scored with the same noise: the AUROC of the two, and histograms.
  config.likelihood.against = ConfigDict(
    dict(
      name='',  # as config.data.name; '': none
      path='',  # as config.data.path
      dir='',  # as config.data.dir, and that one if ''
      split='test',  # or a range such as '[:1000]'
    )
  )
  config.sample = ConfigDict(
    dict(
      num_images=64,  # of --mode=sample
      preview_images=64,  # of them in the picture, which training, too, draws at each evaluation
      batch_size=64,  # the last one is cut; --mode=sample writes each as a shard
      format='npz',  # of shards: 'npz', integers and labels; 'png', a folder of files 0 .. 255
      num_steps=250,
      denoise_last=False,  # the last of num_steps returns x_hat, EDM's step to noise level zero
      params='ema',  # 'raw', 'ema' or another average
      label=-1,  # class to draw, for a class-conditional model; -1: by the rule
      embeddings='',  # file of np.save, [N, E], taken in turn; '': those of the evaluation split
      label_rule='balanced',  # 'balanced': each in turn; 'uniform': from the image's own key
      seed=0,
    )
  )
  # 'ancestral', 'ddim', 'heun' (two network evaluations a step), 'dpmpp_2m', 'dpmpp_2m_sde' (with
  # noise) or 'deis': docs/samplers.md has their errors. Each takes its own arguments,
  # the last three none; another one's that is not at its default is refused.
  config.sample.sampler = ConfigDict(
    dict(
      name='ancestral',
      variance=0.0,  # ancestral: 0 that of q(z_s | z_t, x), 1 that of q(z_t | z_s); or between
      eta=0.0,  # ddim: 0 deterministic, 1 ancestral
      s_churn=0.0,  # heun: noise added in all, where the level, exp(-log_snr / 2), is in
      s_min=0.0,  # [s_min, s_max]; 0: deterministic
      s_max=1e9,
      s_noise=1.0,
    )
  )
  # Levels of the steps: the model's own schedule, or a fixed one by its name, between the
  # model's end points. Other limits, as in dict(name='edm_sample', sigma_min=0.002, sigma_max=80.0,
  # rho=7.0) or dict(name='cosine', log_snr_max=10.0), go into a config file.
  config.sample.grid = ConfigDict(dict(name='schedule'))
  config.sample.guidance = ConfigDict(
    dict(
      kind='none',  # 'classifier_free' (needs train.label_dropout), or 'auto' (another model)
      weight=1.0,  # guide + weight (own - guide): 1 is no guidance
      log_snr_min=-100.0,  # guided between these levels only
      log_snr_max=100.0,
      checkpoint='',  # auto: workdir of the guiding run, a smaller or shorter one
    )
  )
  config.sample.threshold = ConfigDict(
    dict(
      name='none',  # of x_hat: 'static' clips to [-1, 1], 'dynamic' to a percentile of |x_hat|
      percentile=0.995,
    )
  )
  # Fréchet distance and its relatives, between samples and real images: see vdm/fid.
  config.fid = ConfigDict(
    dict(
      # 'classifier', trained on this data set (FD-classifier, which is no FID); 'inception' (FID;
      # its weights are yours to fetch: python -m vdm.fid convert); or package.module.function
      features='classifier',
      weights='',  # NPZ of `convert`, or where the classifier is kept; '': in ~/.cache/vdm
      reference='',  # NPZ of `python -m vdm.fid stats`, ADM's or EDM's, or images; '': all of train
      num_images=50_000,  # that --mode=eval scores; published numbers use 50 000
      train_every_steps=0,  # training scores samples too, a multiple of its eval_every_steps ...
      train_images=2000,  # ... so many; 0 steps: never
      batch_size=256,  # over all devices and hosts
      halves=20,  # random halves that 95 % intervals are made of; 0: no intervals
      allow_few=False,  # fewer images than features: a singular covariance, for tests only
      replicate_grey=False,  # grey images into Inception as three equal channels
    )
  )
  config.checkpoint = ConfigDict(
    dict(
      every_steps=500,
      keep=2,  # newest checkpoints kept, besides the one with the best bits/dim
    )
  )
  config.parallel = ConfigDict(
    dict(
      mode='jit',  # 'jit' over a mesh, or 'pmap'
      fsdp=1,  # devices that share one copy of the parameters (jit only)
      optimize=True,  # False: XLA compiles in two thirds of the time, what it makes runs slower
    )
  )
  config.profile = ConfigDict(
    dict(
      first_step=10,  # of the steps that are traced, for XProf and TensorBoard, in workdir/profile
      num_steps=0,  # 0: none
    )
  )
  if arg == 'debug':
    debug(config)
  return config.lock()


def debug(config):
  """Shrinks any config, in place, to four steps: what a CPU spends on them is compilation.

  So XLA optimizes little, and the steps are Adam's, which are quicker to compile than Muon's.
  Above 32 x 32 the arithmetic counts as well: 8 examples are evaluated instead of 16, and only at
  the end.
  """
  config.name += '_debug'
  if config.model.name in SMALL_NETWORKS:
    levels = len(config.model.widths) if 'widths' in config.model else 0
    config.model.update(SMALL_NETWORKS[config.model.name])
    if levels:  # no more than there were, for images of any size
      config.model.widths = config.model.widths[:levels]
  large = math.prod(config.data.image_shape[:-1]) > 32 * 32
  config.parallel.optimize = False
  config.optimizer.kind = 'adamw'
  config.train.update(
    batch_size=8, num_steps=4, log_every_steps=1, eval_every_steps=4 if large else 2
  )
  config.eval.update(batch_size=8, draws=2, max_images=8 if large else 16)
  config.eval.ode.update(rtol=1e-2, atol=1e-2)
  config.eval.fields.update(num_examples=4, samples_per_example=2)
  config.sample.update(num_images=8, batch_size=8, num_steps=4)
  config.fid.update(
    num_images=8, train_every_steps=0, train_images=8, batch_size=8, halves=2, allow_few=True
  )
  config.checkpoint.every_steps = 2
