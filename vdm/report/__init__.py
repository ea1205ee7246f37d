"""One HTML page of a run, or of several side by side.

vdm.report.write(['runs/digits'], 'digits.html')
"""

from vdm.report.page import write

ORDER = ('markup', 'run', 'curves', 'parts', 'page', '__init__', '__main__')
__all__ = ('ORDER', 'write')
