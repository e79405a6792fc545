"""Imported first by every command: a quarter off the time until it begins, and a quiet Ctrl-C.

Python searches for garbage whenever 700 more objects live, and of the millions that imports leave,
none is garbage. When the work begins it searches again, among all but these.

Until then a Ctrl-C ends the command as it ends others, and not with a traceback of the imports.
"""

import atexit
import gc
import signal

gc.disable()
atexit.register(gc.unfreeze)  # at the end all is freed, or libraries complain of leaks
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as after nohup
    signal.signal(signal.SIGINT, signal.SIG_DFL)
