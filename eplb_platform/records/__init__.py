"""Records: the files that go in and out, one module for each format.

Every format is checked when it is read and when it is written, and written atomically. What cannot be
read or written is a RecordError: one line with the file, the place in it, and what was expected.
"""

from __future__ import annotations

from eplb_platform.records.fault import Fault as Fault
from eplb_platform.records.fault import RecordError as RecordError

__all__ = ["Fault", "RecordError"]
