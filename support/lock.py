"""One process in a folder at a time."""

import errno
import os
import weakref

from support.errors import UserError

if os.name == "posix":
    import fcntl
else:
    import msvcrt


def lock_folder(folder, name, flag, owner):
    """Keep other processes out of a folder, by a lock on the file `name` in it, until the handle that is
    returned is closed, `owner`, an object, is gone or this process ends. flag: the one that names the folder.
    UserError where another process is in it.

    It is a record lock: loader workers, which outlive a killed process by seconds, do not inherit that. Of
    two owners in one process the first that goes takes the lock of both along.
    """
    try:
        handle = (folder / name).open("a")
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written: {error.strerror}") from None
    try:
        if os.name == "posix":
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        handle.close()
        raise UserError(
            f"{folder}: another process runs in this folder; stop it, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # file systems without locks
            raise
    weakref.finalize(owner, handle.close)
    return handle
