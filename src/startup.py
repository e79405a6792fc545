"""Imported first by every command: a quarter off the time until it begins.

Python searches for garbage whenever 700 more objects live, and of the millions that imports leave,
none is garbage. When the work begins it searches again, among all but these.
"""

import atexit
import gc

gc.disable()
atexit.register(gc.unfreeze)  # at the end all is freed, or libraries complain of leaks
