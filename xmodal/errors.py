"""How commands end: user errors and full disks with one line, defects with a traceback."""

from collections.abc import Callable, Iterable
import difflib
import errno
import os
import sys


class UserError(ValueError):
  """An error that the user can fix.

  The message states in one line the thing, the value found, the value wanted and
  the way out. Commands print it after 'error: ' and exit with code 2; any other
  exception is a defect and keeps its traceback.
  """


_FULL = (errno.ENOSPC, errno.EDQUOT)
_FAILS = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO)  # a bad disk, or NFS that went away
# Errors that the user can fix: rights, names, and limits of the file system or the user.
_FIXABLE = (*_FULL, *_FAILS, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR,
             errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP,
             errno.EFBIG, errno.EMFILE, errno.ENFILE)


def command(run: Callable[[], int | None], where: str) -> int:
  """Runs a command, and prints one line for an error that the user can fix.

  Args:
    run: does the work; returns the exit code, None for 0.
    where: see one_line.

  Returns:
    The exit code: that of run, 2 for a user error, 130 after Ctrl-C.
  """
  prepare_environment()
  try:
    return run() or 0
  except KeyboardInterrupt:
    return 130
  except Exception as error:
    if line := one_line(error, where):
      return fail(line)
    raise


def fail(line: str) -> int:
  """Prints an error on one line, even if it contains line breaks; returns the exit code 2."""
  print('error: ' + ' '.join(line.splitlines()), file=sys.stderr)
  # On a full disk, libraries that fail to write at exit would print long messages.
  sys.unraisablehook = lambda *_: None
  return 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
  """' (did you mean NAME?)' with the known name most similar to a word, or ''."""
  near = difflib.get_close_matches(word, known, 1)
  return f' (did you mean {near[0]!r}?)' if near else ''


def one_line(error: Exception, where: str) -> str:
  """The message for an error that the user can fix; '' for a defect.

  Args:
    error: the exception.
    where: file or folder that the command writes to, used if the exception names none.
  """
  if isinstance(error, UserError):
    return str(error)
  if device_is_full(error):
    return (f'no memory left on the device ({str(error).splitlines()[0][:160]}): lower '
            'config.train.batch_size (or eval_batch_size), raise config.train.accumulation, set '
            'config.model.remat=full, or request less at once')
  if not isinstance(error, OSError):
    return ''
  name = error.filename
  if error.errno in _FULL and name is None:
    name = where
  if error.errno not in _FIXABLE or name is None or _is_own_file(error):
    return ''
  return f'{name}: {error.strerror}; fix that and run the same command again'


def _is_own_file(error):
  """Whether a file of the program's own installation is missing."""
  places = (os.path.dirname(__file__), sys.prefix)
  return error.errno == errno.ENOENT and str(error.filename).startswith(places)


def disk_is_full(error: BaseException | None) -> bool:
  """Whether an error means that a file could not be written for lack of space or quota.

  Libraries put the system's message into errors of other types; other messages, such as
  RESOURCE_EXHAUSTED from a GPU without memory, do not concern a disk.
  """
  return bool(_system_reason(error, _FULL))


def disk_failure(error: BaseException | None) -> str:
  """The system's message in an error, as of disk_is_full, of a disk that fails; '' in others."""
  return _system_reason(error, _FAILS)


def _system_reason(error, numbers):
  while error is not None:
    if isinstance(error, OSError) and error.errno in numbers:
      return os.strerror(error.errno)
    if isinstance(error, (OSError, ValueError)) or type(error) is Exception:
      for number in numbers:
        if os.strerror(number) in str(error):
          return os.strerror(number)
    error = error.__cause__ or error.__context__
  return ''


def device_is_full(error: BaseException) -> bool:
  """Whether XLA could not allocate memory on a device, or a program needs more than it has."""
  jax = sys.modules.get('jax')  # without the import there are no JAX errors
  return (jax is not None and isinstance(error, jax.errors.JaxRuntimeError)
          and 'RESOURCE_EXHAUSTED' in str(error))


def peer_is_gone(error: BaseException) -> bool:
  """Whether an error of a collective, a JaxRuntimeError or ValueError, says that another process
  of the run died."""
  return (isinstance(error, RuntimeError | ValueError) and not device_is_full(error)
          and any(name in str(error) for name in ('Gloo', 'NCCL', 'nccl'))
          and any(word in str(error).lower() for word in (
              'connection reset', 'closed by peer', 'connection closed', 'broken pipe',
              'remote process exited', 'remote error')))


def fixable_reason(error: OSError) -> str:
  """The system's message for an error that the user can fix; '' for others."""
  return error.strerror or '' if error.errno in _FIXABLE else ''


def prepare_environment() -> None:
  """Repairs the environment of a starting program: closed streams (`2>&-`), no home folder."""
  _open_streams()
  if not os.path.isabs(os.path.expanduser('~')):
    os.environ['HOME'] = os.devnull  # otherwise libraries would create a folder named ~


def _open_streams():
  # Otherwise the next opened file would take the number of a closed stream, and receive the output
  # that libraries print there.
  for number, name in enumerate(('stdin', 'stdout', 'stderr')):
    try:
      os.fstat(number)
    except OSError:
      descriptor = os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
      if descriptor != number:
        os.dup2(descriptor, number)
        os.close(descriptor)
    if getattr(sys, name) is None:
      setattr(sys, name, open(os.devnull, 'w' if number else 'r', encoding='utf-8'))
  for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, 'reconfigure'):  # for characters that the terminal's encoding lacks
      stream.reconfigure(errors='backslashreplace')
