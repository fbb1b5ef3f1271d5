"""Emulated buckets on this machine, each a process of its own."""

from collections.abc import Iterator
import contextlib
import os
import socket
import subprocess
import sys
import time

BUCKET = 'bucket'


@contextlib.contextmanager
def emulated() -> Iterator[dict[str, str]]:
  """Starts emulators of gs:// and s3://, each with a bucket named BUCKET.

  Yields the environment variables with which programs find them.
  """
  gcs, s3 = _free_port(), _free_port()
  home = os.path.dirname(sys.executable)
  commands = ([f'{home}/gcp-storage-emulator', 'start', '--port', str(gcs), '--in-memory',
               '--default-bucket', BUCKET], [f'{home}/moto_server', '-p', str(s3)])
  environment = {
      'STORAGE_EMULATOR_HOST': f'http://127.0.0.1:{gcs}',
      'TENSORSTORE_GCS_HTTP_URL': f'http://127.0.0.1:{gcs}',
      # Otherwise gcsfs looks for the credentials of a real bucket, for seconds.
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false', 'NO_GCE_CHECK': 'true',
      'AWS_ENDPOINT_URL': f'http://127.0.0.1:{s3}', 'AWS_ACCESS_KEY_ID': 'key',
      'AWS_SECRET_ACCESS_KEY': 'secret', 'AWS_DEFAULT_REGION': 'us-east-1'}
  processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for command in commands]
  try:
    for port in (gcs, s3):
      _wait(port)
    before = dict(os.environ)
    os.environ.update(environment)
    try:
      import boto3
      boto3.client('s3').create_bucket(Bucket=BUCKET)
      yield environment
    finally:
      os.environ.clear()
      os.environ.update(before)
  finally:
    for process in processes:
      process.kill()
      process.wait()


def _free_port():
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def _wait(port):
  for _ in range(600):
    try:
      socket.create_connection(('127.0.0.1', port)).close()
      return
    except OSError:
      time.sleep(0.1)
  raise TimeoutError(f'no emulator on port {port}')
