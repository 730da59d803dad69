"""Where a run writes what it says: log lines beside a progress bar, log.txt, TensorBoard's events."""

import logging
import sys
import threading
from functools import partial
from types import ModuleType

from tqdm import tqdm

from support.command import FULL_DISK, silence


class NoWriter:
    """TensorBoard's writer of a rank that writes nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class FileHandler(logging.FileHandler):
    """A full disk ends the run, with one line, where logging would print a traceback and go on. What is not
    UTF-8 in a file's name is written with backslashes.
    """

    def __init__(self, path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")

    def handleError(self, record):
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            error.filename = self.baseFilename
        raise error


class TqdmHandler(logging.Handler):
    """Prints log lines without breaking a progress bar. Their reader may leave, or the disk that they go to
    may be full: the log file has them all.
    """

    def emit(self, record):
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            silence(sys.stdout)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise


def open_writer(folder, purge_step):
    """TensorBoard's writer of a run's folder, which hides older events from step `purge_step` on, if any."""
    # As in TensorBoard's own build without TensorFlow. Where that is installed, its import takes seconds, it
    # writes to the terminal, and its errors, such as that of a full disk, are no OSError.
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=purge_step)


def open_log(log, folder):
    """Have a logger write to the screen, and to log.txt in a run's folder; returns what ends that."""
    log.setLevel(logging.INFO)
    log.handlers = [TqdmHandler(), FileHandler(folder / "log.txt")]
    for handler in log.handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    before, opened = threading.excepthook, log.handlers
    threading.excepthook = partial(_leave_to_main, folder, before)

    def close():
        threading.excepthook = before
        log.handlers = [logging.NullHandler()]
        for handler in opened:
            handler.close()

    return close


def _leave_to_main(folder, before, caught):
    """What stops TensorBoard's thread, as a full disk does, is left to the main one, which raises it. Other
    threads' exceptions go to the hook that was there before.
    """
    if type(caught.thread).__module__.startswith("tensorboard.") and isinstance(caught.exc_value, OSError):
        caught.exc_value.filename = str(folder / "events.out.tfevents")
    else:
        before(caught)
