"""Serves a trained model over HTTP, with a web page.

  xmodal serve --checkpoint DIR
  xmodal serve --checkpoint DIR --host 0.0.0.0 --port 80 --api_key KEY

The page is at /, the routes are in xmodal/serve/README.md. The server is ready when /readyz says
so. SIGTERM and Ctrl-C stop it: it accepts nothing new and answers what it has. Needs
pip install 'xmodal[serve]'. Exit codes: 0; 2 for a mistake, which one line names.
"""

import argparse
from collections.abc import Callable
import dataclasses
import ipaddress
import logging
import os
import signal
import socket
import sys

from xmodal import errors, paths
from xmodal.errors import UserError
from xmodal.serve.limits import Limits

_GRACE = 30  # seconds in which running requests may finish after a signal
_BACKLOG = 512


def main(argv=None, open_engine: Callable | None = None) -> int:
  """Runs a command line; returns its exit code, see above.

  Args:
    argv: the arguments; None: those of the process.
    open_engine: what loads the model; None: engine.open_engine.
  """
  parser = argparse.ArgumentParser(prog='xmodal serve', description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--checkpoint', required=True, metavar='DIR',
                      help='a workdir, WORKDIR/best, one of its checkpoints/STEP folders, or a '
                      'bundle of xmodal export')
  parser.add_argument('--host', default='127.0.0.1', help='address to listen at; 0.0.0.0: all, '
                      'which anyone in the network can use')
  parser.add_argument('--port', type=int, default=8000, help='0: any free one')
  parser.add_argument('--api_key', default=os.environ.get('XMODAL_API_KEY'), metavar='KEY',
                      help='what clients have to give as Authorization: Bearer KEY; better in the '
                      'environment as XMODAL_API_KEY, where other users do not see it')
  parser.add_argument('--wait_ms', type=float, default=5.0, help='how long a request waits for '
                      'others that are arriving, to share a batch')
  parser.add_argument('--sizes', default='', metavar='N,N,...', help='batch sizes to '
                      'compile for a run; 2,8,32 if not given. On a CPU a batch of 1 is quicker '
                      'and rounds its last bits differently from the others')
  parser.add_argument('--precision', default='', metavar='P', help='of the weights: float32, '
                      'bfloat16, int8, int8_weights or int4')
  parser.add_argument('--no_batching', action='store_true', help='answers one request at a time')
  limits = parser.add_argument_group('limits')
  for field in dataclasses.fields(Limits):
    limits.add_argument(f'--{field.name}', type=field.type, default=field.default,
                        help=f'{field.default:,}' if field.type is int else f'{field.default:g}')
  args = parser.parse_args(argv)
  return errors.command(lambda: _serve(args, open_engine), '')


def _serve(args, open_engine) -> int:
  try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401
    import uvicorn
  except ImportError as error:
    raise UserError(f"{error.name} is not installed: pip install 'xmodal[serve]'") from None
  from xmodal.serve import engine as engines
  from xmodal.serve.app import Server
  from xmodal.serve.protocol import limited

  checkpoint = paths.resolved(args.checkpoint, '--checkpoint')
  limits = _limits(args)
  sizes = _sizes(args.sizes) if args.sizes else ()
  if args.api_key is not None and args.api_key != (args.api_key.strip() or None):
    raise UserError('--api_key or XMODAL_API_KEY is empty or has spaces at its ends: wanted a key, '
                    'or neither of them')
  if args.wait_ms < 0:
    raise UserError(f'--wait_ms={args.wait_ms:g}: wanted 0 or more')
  bound = _bound(args.host, args.port)
  engine = (open_engine or engines.open_engine)(checkpoint, sizes, args.precision)
  server = Server(engine, limits, key=args.api_key, only_local=_is_loopback(bound),
                  wait_seconds=args.wait_ms / 1e3, batching=not args.no_batching)
  logging.basicConfig(level=logging.WARNING, format='%(levelname)s %(name)s: %(message)s')
  logging.getLogger('uvicorn.error').setLevel(logging.ERROR)  # it warns of each damaged request
  # uvicorn raises a signal again once it has stopped: that shall not end the process differently.
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: None)
  host, port = bound.getsockname()[:2]
  if args.api_key is None and not _is_loopback(bound):
    print(f'warning: without --api_key anyone who reaches {args.host} can use the model',
          file=sys.stderr)
  print(f'http://{f"[{host}]" if ":" in host else host}:{port}/ serves {", ".join(engine.tasks)}; '
        'ready when /readyz says so', flush=True)
  uvicorn.Server(uvicorn.Config(
      server.app, http=limited(limits), ws='none', log_config=None, access_log=False,
      h11_max_incomplete_event_size=limits.header_bytes, server_header=False, lifespan='on',
      backlog=_BACKLOG, timeout_graceful_shutdown=_GRACE)).run(sockets=[bound])
  return 0


def _limits(args):
  limits = Limits(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Limits)})
  for name, value in dataclasses.asdict(limits).items():
    if not value > 0:
      raise UserError(f'--{name}={value:g}: wanted a number above 0')
  return limits


def _sizes(text):
  try:
    sizes = sorted({int(part) for part in text.split(',')})
  except ValueError:
    sizes = []
  if not sizes or sizes[0] < 1 or sizes[-1] > 32:
    raise UserError(f'--sizes={text}: wanted whole numbers from 1 to 32, such as 2,8,32')
  return sizes


def _is_loopback(bound):
  return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def _bound(host, port):
  """A socket at an address, taken before the model is loaded."""
  if not 0 <= port < 65536:
    raise UserError(f'--port={port}: wanted 0 to 65535')
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    bound.listen(_BACKLOG)  # connections wait until the model is loaded
    return bound
  except OSError as error:
    reason = error.strerror or error
    raise UserError(f'--host {host} --port {port}: {reason}; give another') from None


if __name__ == '__main__':
  sys.exit(main())
