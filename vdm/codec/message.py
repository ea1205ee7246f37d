"""The message: a stack of 32-bit words, and the ANS coder (constriction) that works at its top."""

import importlib.util
import math
from collections.abc import Callable

import numpy as np

from vdm.system import files

LEAST = 2  # words that the coder's state takes; without them nothing can be popped
ESCAPE = 2**16  # what lies outside a window is coded as two digits to this base
ENDS = 'the message ends before its images do'


def require_coder():
  """Raises ValueError if constriction is missing, an extra."""
  if importlib.util.find_spec('constriction') is None:
    raise ValueError("the codec needs constriction; pip install 'vdm-jax[codec]'.")


def keystream(*key: int, count: int) -> np.ndarray:
  """Returns `count` words of pseudo-random bits, uint32; more begin with the same ones."""
  # RandomState, since its stream is frozen by numpy: files must outlive this environment.
  return np.random.RandomState(key).randint(0, 2**32, count, np.uint32)


class Message:
  """Holds a stack of words, of which a coder has those on top.

  The sender's stack has no bottom: below what it has written lie pseudo-random words that the
  receiver knows. A receiver has what it was given (`put_below`).

  Attributes:
    base: position of the coder's deepest word; the sender begins at 0, above pseudo-random words.
  """

  def __init__(self, initial: Callable[[int], np.ndarray] | None = None):
    """Makes an empty stack.

    Args:
      initial: count -> the words below the sender's stack, from the top down; None: a receiver.
    """
    require_coder()
    from constriction import stream

    self._models, self._make = stream.model, stream.stack.AnsCoder
    self._initial, self._stored = initial, np.zeros(0, np.uint32)
    self._coder, self.base = self._make(), 0
    if initial is not None:
      self.reach(LEAST)

  @property
  def bits(self) -> float:
    """Returns the length in bits above position 0; the coder's state counts by its logarithm."""
    position, state = self._coder.pos()
    return 32 * (self.base + position) + math.log2(max(state, 1))

  def words(self) -> np.ndarray:
    """Returns all words that are held, from the deepest to the top."""
    return np.concatenate([self._stored, self._coder.get_compressed()])

  def put_below(self, words: np.ndarray):
    """Puts words below those of the coder, for it to use."""
    self._coder = self._make(np.concatenate([words, self._coder.get_compressed()]))
    self.base -= len(words)

  def reach(self, count: int):
    """Gives the coder at least `count` words, and not more than it lacks.

    Raises:
      Damaged: a receiver has not as many.
    """
    missing = count - self._coder.num_words()
    if missing <= 0:
      return
    taken, split = self._stored[:0], len(self._stored) - missing
    self._stored, taken = self._stored[: max(split, 0)], self._stored[max(split, 0) :]
    if split < 0:
      if self._initial is None:
        raise files.Damaged(ENDS)
      deepest = self.base - len(taken)  # at most 0: this is where pseudo-random words begin
      fresh = self._initial(-split - deepest)[-deepest:]
      taken = np.concatenate([fresh[::-1], taken])
    self.put_below(taken)

  def settle(self):
    """Leaves the coder its least number of words, so that copies of them are cheap."""
    words = self._coder.get_compressed()
    kept = max(len(words) - LEAST, 0)
    self._stored = np.concatenate([self._stored, words[:kept]])
    self._coder = self._make(words[kept:])
    self.base += kept

  def whiten(self, stream: np.ndarray):
    """Turns over the bits of the top words, below the topmost, that are set in `stream`.

    The same call undoes it. The topmost word has the coder's mark of where the message ends.
    """
    self.reach(len(stream) + 1)
    words = self._coder.get_compressed()
    words[-len(stream) - 1 : -1] ^= stream
    self._coder = self._make(words)

  def pop(self, window: int, means: np.ndarray, stds: np.ndarray) -> np.ndarray:
    """Pops whole numbers in -window .. window, each by its normal distribution; [N] int32."""
    symbols = self._coder.decode(self._models.QuantizedGaussian(-window, window), means, stds)
    if self._coder.num_words() < LEAST:
      raise files.Damaged(ENDS)
    return symbols

  def push(self, symbols: np.ndarray, window: int, means: np.ndarray, stds: np.ndarray):
    """Pushes what `pop` pops.

    Raises:
      Damaged: a number lies outside the window.
    """
    if np.abs(symbols).max(initial=0) > window:
      raise files.Damaged('a latent lies where none was drawn')
    model = self._models.QuantizedGaussian(-window, window)
    self._coder.encode_reverse(symbols.astype(np.int32), model, means, stds)

  def pop_any(self, window: int, means: np.ndarray, stds: np.ndarray) -> np.ndarray:
    """Pops whole numbers [N] int64 that `push_any` pushed."""
    symbols = self.pop(window + 1, means, stds).astype(np.int64)
    outside = np.flatnonzero(np.abs(symbols) > window)
    if outside.size:
      digits = self._coder.decode(self._models.Uniform(ESCAPE), 2 * outside.size).astype(np.int64)
      beyond = digits[::2] * ESCAPE + digits[1::2]
      symbols[outside] += np.sign(symbols[outside]) * beyond
    return symbols

  def push_any(self, symbols: np.ndarray, window: int, means: np.ndarray, stds: np.ndarray):
    """Pushes whole numbers [N]; those outside the window, which are rare, at greater length."""
    edge = window + 1
    inside = np.clip(symbols, -edge, edge)
    beyond = np.abs(symbols - inside)[np.abs(inside) == edge]
    if beyond.size:
      if beyond.max() >= ESCAPE**2:
        raise FloatingPointError('a latent is billions of cells from where the network expects it')
      digits = np.stack([beyond // ESCAPE, beyond % ESCAPE], axis=1).reshape(-1)
      self._coder.encode_reverse(digits.astype(np.int32), self._models.Uniform(ESCAPE))
    self.push(inside, edge, means, stds)

  def pop_values(self, probabilities: np.ndarray) -> np.ndarray:
    """Pops values 0 .. K - 1, each by its row of probabilities float32 [N K]."""
    return self._coder.decode(self._models.Categorical(perfect=False), probabilities)

  def push_values(self, values: np.ndarray, probabilities: np.ndarray):
    """Pushes what `pop_values` pops."""
    model = self._models.Categorical(perfect=False)
    self._coder.encode_reverse(values.astype(np.int32), model, probabilities)
