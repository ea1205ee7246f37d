"""How far a long job is."""

import logging

import pytest

from vdm.system import progress


def test_a_line_when_it_is_due_and_at_the_end(monkeypatch, caplog):
  clock = iter([0.0, 5.0, 15.0, 24.0, 26.0, 37.0])  # five seconds of it are compilation
  monkeypatch.setattr(progress.time, 'monotonic', lambda: next(clock))
  tell = progress.Progress('compress', 'levels')
  with caplog.at_level(logging.INFO):
    for done in (1, 11, 20, 22, 1001):
      tell(done, 1001, 'well')
  assert [record.getMessage() for record in caplog.records] == [
    'compress: 11 of 1,001 levels, well, 1 levels/s, 16:30 left',
    'compress: 22 of 1,001 levels, well, 1 levels/s, 16:19 left',
    'compress: 1,001 of 1,001 levels, well, 31.2 levels/s',
  ]


def test_a_short_job_says_nothing_and_one_part_has_no_speed(caplog):
  with caplog.at_level(logging.INFO):
    progress.Progress('', 'images')(8, 8)
    progress.Progress('', 'images', every=0)(8, 8)
  assert caplog.messages == ['8 of 8 images']


@pytest.mark.parametrize('seconds, text', [(5, '0:05'), (65.4, '1:05'), (3723, '1:02:03')])
def test_durations(seconds, text):
  assert progress.duration(seconds) == text
