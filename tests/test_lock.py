"""One job per workdir, and no lock that outlives its job."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from vdm.workdir import lock

HOLDER = (
  'import sys, time\n'
  'from vdm.workdir import lock\n'
  'with lock.hold(sys.argv[1]):\n'
  '  print("held", flush=True)\n'
  '  time.sleep(600)\n'
)


@pytest.fixture
def holder(tmp_path):
  """A process that holds the lock of a workdir."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == 'held\n'
  yield process
  process.kill()
  process.communicate()


def test_a_second_job_is_refused_and_told_of_the_first(holder, tmp_path):
  message = (
    rf'^--workdir={tmp_path} is being written by process {holder.pid} of .* since 2.*; choose'
  )
  with pytest.raises(ValueError, match=message) as error, lock.hold(tmp_path):
    pass
  assert '\n' not in str(error.value)
  holder.kill()
  holder.wait()
  with lock.hold(tmp_path):  # whatever ended it
    assert json.loads((tmp_path / lock.FILE).read_text())['pid'] == os.getpid()
  assert not (tmp_path / lock.FILE).exists()


def test_of_jobs_that_start_at_once_one_has_the_workdir(tmp_path, monkeypatch):
  together, read = threading.Barrier(8), lock._read
  waiting = threading.local()

  def read_together(path):
    found = read(path)
    if not hasattr(waiting, 'over'):
      waiting.over = True
      together.wait()  # all have seen that there is no lock
    return found

  monkeypatch.setattr(lock, '_read', read_together)
  ended = []

  def claim():
    try:
      lock._claim(tmp_path / lock.FILE, lock._own(), tmp_path)
      ended.append('held')
    except ValueError as error:
      ended.append(str(error).partition('is being')[0])

  threads = [threading.Thread(target=claim) for _ in range(8)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(ended) == sorted(['held', *[f'--workdir={tmp_path} '] * 7])


@pytest.mark.parametrize('content', ['', '{', '[]', '{"pid": 1}', 'null'])
def test_a_damaged_lock_keeps_nobody_out(content, tmp_path):
  (tmp_path / lock.FILE).write_text(content)
  with lock.hold(tmp_path):
    pass


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path):
  own = lock._own() | {'pid': os.getppid(), 'started': 'long ago'}
  (tmp_path / lock.FILE).write_text(json.dumps(own))
  with lock.hold(tmp_path):
    pass


@pytest.mark.parametrize('alive', [True, False])
@pytest.mark.parametrize('other', [{'host': 'elsewhere'}, {'space': 'elsewhere', 'pid': 2**30}])
def test_another_host_or_container_is_watched_for_signs_of_life(
  other, alive, tmp_path, monkeypatch
):
  monkeypatch.setattr(lock, 'BEAT_SECONDS', 0.05)
  if alive:  # a machine with other work may hear a sign of life late
    monkeypatch.setattr(lock, 'SILENT_BEATS', 200)
  path, ended = tmp_path / lock.FILE, threading.Event()
  theirs = lock._own() | other
  path.write_text(json.dumps(theirs))
  os.utime(path, (1, 1))
  beating = threading.Thread(target=lock._beat, args=(path, theirs, ended, []))
  if alive:
    beating.start()
  try:
    if alive:
      with pytest.raises(ValueError, match=f'of {theirs["host"]} since'), lock.hold(tmp_path):
        pass
    else:
      with lock.hold(tmp_path):
        time.sleep(0.2)
        assert path.stat().st_mtime > 1
  finally:
    ended.set()
    if alive:
      beating.join()


def test_a_lock_that_another_job_has_taken_gets_no_sign_of_life(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(lock, 'BEAT_SECONDS', 0.01)
  path, own = tmp_path / lock.FILE, lock._own()
  path.write_text(json.dumps(lock._own() | {'host': 'elsewhere'}))
  os.utime(path, (1, 1))
  lock._beat(path, own, threading.Event(), [])  # which ends by itself
  assert path.stat().st_mtime == 1 and 'is now of process' in caplog.text


def test_a_job_that_has_lost_its_lock_is_to_write_no_more(tmp_path, monkeypatch):
  monkeypatch.setattr(lock, 'BEAT_SECONDS', 0.01)
  path = tmp_path / lock.FILE
  theirs = lock._own() | {'host': 'elsewhere'}
  with lock.hold(tmp_path) as check:
    check()
    path.write_text(json.dumps(theirs))
    with pytest.raises(ValueError, match=r'is now of process .* of elsewhere, which had no sign'):
      for _ in range(500):
        check()
        time.sleep(0.01)
  assert json.loads(path.read_text()) == theirs


def test_a_storage_that_fails_in_words_of_its_own_ends_no_sign_of_life(tmp_path, monkeypatch):
  class Unavailable(Exception):
    pass

  answers = iter([Unavailable('try again')])

  def utime(path, real=os.utime):
    for error in answers:
      raise error
    real(path)

  monkeypatch.setattr(lock, 'BEAT_SECONDS', 0.01)
  with lock.hold(tmp_path):
    path = tmp_path / lock.FILE
    os.utime(path, (1, 1))
    monkeypatch.setattr(os, 'utime', utime)
    deadline = time.monotonic() + 20
    while path.stat().st_mtime == 1 and time.monotonic() < deadline:
      time.sleep(0.01)
    assert path.stat().st_mtime > 1 and next(answers, None) is None


def test_of_two_that_claim_at_once_where_nothing_excludes_it_one_holds(tmp_path, monkeypatch):
  """As on gs://, where the last one to write stays."""
  monkeypatch.setattr(lock, '_is_remote', lambda path: True)
  monkeypatch.setattr(lock, 'SETTLE_SECONDS', 0.2)
  both = threading.Barrier(2)
  writes = threading.Lock()

  def write_if(condition, path, text):
    good = condition()
    if good:
      both.wait(timeout=60)
      with writes:
        part = path.with_suffix('.part')
        part.write_text(text)
        part.replace(path)
      both.wait(timeout=60)  # each has written
    return good

  monkeypatch.setattr(lock.files, 'write_if', write_if)
  path, ended = lock.epath.Path(tmp_path) / lock.FILE, []

  def claim(number):
    try:
      lock._claim(path, lock._own() | {'token': str(number)}, tmp_path)
      ended.append('held')
    except ValueError:
      ended.append('refused')

  threads = [threading.Thread(target=claim, args=(i,)) for i in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sorted(ended) == ['held', 'refused']


def test_an_older_lock_is_one_too(tmp_path, monkeypatch):
  """It does not say which container it is of."""
  monkeypatch.setattr(lock, 'BEAT_SECONDS', 0.05)
  monkeypatch.setattr(lock, 'SILENT_BEATS', 200)
  path, own = tmp_path / lock.FILE, lock._own()
  del own['space']
  path.write_text(json.dumps(own))
  ended = threading.Event()
  beating = threading.Thread(target=lock._beat, args=(path, own, ended, []))
  beating.start()
  try:
    with pytest.raises(ValueError, match='is being written by'), lock.hold(tmp_path):
      pass
  finally:
    ended.set()
    beating.join()
