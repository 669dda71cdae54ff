"""The command line. What imports it ends in one line when it is interrupted, also before it runs."""

import sys
from types import TracebackType


def _told(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted; no result was written\n")
    else:
        sys.__excepthook__(kind, error, where)


sys.excepthook = _told
