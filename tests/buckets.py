"""Emulated buckets on this machine, each a process of its own."""

from collections.abc import Iterator
import contextlib
from http import HTTPStatus
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
  commands = [sys.executable, __file__, str(gcs)], [f'{home}/moto_server', '-p', str(s3)]
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


def _serve_gcs(port):
  """Runs the emulator of gs:// with the conditions on generations that TensorStore relies on."""
  from gcp_storage_emulator.exceptions import NotFound
  from gcp_storage_emulator.handlers import objects
  download, insert = objects.download, objects.insert

  def generation(storage, request, name):
    try:
      return storage.get_file_obj(request.params['bucket_name'], name)['generation']
    except NotFound:
      return '0'

  def download_with_generation(request, response, storage, *args, **kwargs):
    found = generation(storage, request, request.params['object_id'])
    download(request, response, storage, *args, **kwargs)
    if found != '0':
      response['x-goog-generation'] = found

  def insert_if_matching(request, response, storage, *args, **kwargs):
    wanted = request.query.get('ifGenerationMatch')
    if wanted and wanted[0] != generation(storage, request, request.query['name'][0]):
      response.status = HTTPStatus.PRECONDITION_FAILED
      return
    insert(request, response, storage, *args, **kwargs)

  objects.download, objects.insert = download_with_generation, insert_if_matching
  from gcp_storage_emulator.server import create_server  # takes the handlers as they are now
  create_server('127.0.0.1', port, True, BUCKET).run()


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


if __name__ == '__main__':
  _serve_gcs(int(sys.argv[1]))
