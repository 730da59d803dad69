"""One thread, here and in the processes that tests start: networks as tiny as theirs are slower with two."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
