"""The launch scripts, with stand-ins for Python, Slurm and gcloud; manifests name what exists."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from xmodal import config as configs
from xmodal import main
from xmodal.serve import __main__ as serve_command

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / 'launch'
MANIFESTS = sorted((LAUNCH / 'gke').glob('*.yaml'))

# Writes its arguments and GPUs to a file named after the process, then does what ACT says.
PYTHON = r'''#!/usr/bin/env bash
number=0
for argument; do [[ $argument != --process_id=* ]] || number="${argument#*=}"; done
start="$(ls "$RECORD" | grep -c "^$number\.")"
echo "GPUS=${CUDA_VISIBLE_DEVICES-} $*" > "$RECORD/$number.$start"
echo "output of $number"
await() {  # until a signal; each is written down
  trap 'echo TERM >> "$RECORD/signals.$number"; kill $!; exit 75' TERM
  trap 'echo INT >> "$RECORD/signals.$number"; kill $!; exit 75' INT
  sleep 60 >/dev/null 2>&1 &
  touch "$RECORD/waits.$number"
  wait
}
eval "$ACT"
'''

SRUN = r'''#!/usr/bin/env bash
echo "$@" > "$RECORD/srun"
eval "$ACT"
'''

# A TPU of two workers, which are folders.
GCLOUD = r'''#!/usr/bin/env bash
[ "$1 $2 $3 $5" = "compute tpus tpu-vm --zone=here" ] || exit 2
verb="$4"
shift 5
if [ "$verb" = scp ]; then name="${2%:}"; else name="$1"; fi
[ "$name" = pod ] || exit 2
[ "$verb" = describe ] || echo "$verb" >> "$RECORD/calls"
case "$verb" in
  describe) cat "$RECORD/state" 2>/dev/null || { echo "NOT_FOUND: $name" >&2; exit 1; } ;;
  create)
    echo "${@:2}" > "$RECORD/created"
    echo READY > "$RECORD/state"
    mkdir -p "$RECORD"/worker{0,1} ;;
  delete) rm -r "$RECORD/state" "$RECORD"/worker{0,1} ;;
  scp) for worker in 0 1; do cp "$1" "$RECORD/worker$worker/"; done ;;
  ssh)
    pids=()
    for worker in 0 1; do
      (cd "$RECORD/worker$worker" && HOME="$PWD" WORKER="$worker" exec bash -c "${3#--command=}") &
      pids+=($!)
    done
    code=0
    for pid in "${pids[@]}"; do
      wait "$pid"; one=$?
      [ "$code" != 0 ] || code=$one
    done
    exit "$code" ;;
esac
'''


class Machine:
  """Programs that stand in for others; `folder` is what they write to."""

  def __init__(self, folder):
    self.folder, self.bin = folder / 'record', folder / 'programs'
    for made in (self.folder, self.bin, folder / 'venv' / 'bin'):
      made.mkdir(parents=True)
    for stamp in ('installed', 'installed-tpu'):
      shutil.copy(ROOT / 'setup.py', folder / 'venv' / stamp)
    self.program('../venv/bin/python', PYTHON)
    self.program('nvidia-smi', '#!/bin/sh\n')  # no GPU
    (self.bin / 'python3').symlink_to(sys.executable)
    self.environment = {
        'PATH': f'{self.bin}:{os.environ["PATH"]}', 'HOME': str(folder), 'RECORD': str(self.folder),
        'VENV': str(folder / 'venv'), 'PYTHON': sys.executable, 'ACT': '', 'TMPDIR': str(folder)}

  def program(self, name, text):
    (self.bin / name).write_text(text)
    (self.bin / name).chmod(0o755)

  def start(self, script, *arguments, **variables):
    return subprocess.Popen(
        [str(LAUNCH / script), *arguments], env={**self.environment, **variables},
        cwd=self.folder.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

  def run(self, script, *arguments, **variables):
    """(exit code, stdout, stderr)"""
    process = self.start(script, *arguments, **variables)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err

  def read(self, name):
    return (self.folder / name).read_text()

  def wait_for(self, *names):
    deadline = time.monotonic() + 30
    while not all((self.folder / name).exists() for name in names):
      assert time.monotonic() < deadline, os.listdir(self.folder)
      time.sleep(0.02)


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


@pytest.mark.parametrize('path', sorted(LAUNCH.glob('*.sh')), ids=lambda path: path.name)
def test_scripts_are_bash(path):
  subprocess.run(['bash', '-n', path], check=True)
  if shutil.which('shellcheck'):
    subprocess.run(['shellcheck', '-s', 'bash', '-x', '-P', 'SCRIPTDIR', '-S', 'warning', path],
                   check=True)


def test_one_process_has_no_coordinator(machine):
  code, out, _ = machine.run('local.sh', '--config', 'vqa', '--workdir', 'my run')
  assert code == 0 and out == 'output of 0\n'
  assert machine.read('0.0') == 'GPUS= -P -m xmodal.main --config vqa --workdir my run\n'


def test_processes_share_gpus_and_a_coordinator(machine):
  machine.program('nvidia-smi', '#!/bin/sh\nprintf "0\\n1\\n2\\n3\\n"\n')
  code, out, err = machine.run('local.sh', '--processes', '2', '--config', 'vqa')
  assert (code, out, err) == (0, 'output of 0\n', '')
  lines = [re.fullmatch(r'GPUS=(\S*) -P -m xmodal.main --config vqa --coordinator=localhost:(\d+) '
                        r'--num_processes=2 --process_id=(\d)\n', machine.read(f'{number}.0'))
           for number in range(2)]
  assert [line[1] for line in lines] == ['0,1', '2,3']
  assert lines[0][2] == lines[1][2]
  code, _, err = machine.run('local.sh', '--processes=3')
  assert code == 2 and '4 GPUs do not divide among 3 processes' in err
  code, _, err = machine.run('local.sh', '--processes=3', CUDA_VISIBLE_DEVICES='5,6,7')
  assert code == 0 and machine.read('2.0').startswith('GPUS=7 ')


@pytest.mark.parametrize('count', ['', '0', '-1', 'two'])
def test_a_wrong_number_of_processes(machine, count):
  code, out, err = machine.run('local.sh', '--processes', count)
  assert code == 2 and 'wanted a whole number from 1' in err and not out


@pytest.mark.parametrize('act, code, shown', [
    ('[ $number = 0 ] || exit 3', 3, True),  # 0 had finished
    ('[ $number = 0 ] && exit 75; kill -KILL $$', 75, True),  # 0 noticed that another died
    ('[ $number = 1 ] && exit 3; await', 3, True),  # 0 noticed nothing
    ('trap "" TERM; [ $number = 1 ] && exit 3; exec sleep 60', 3, True),
    ('exit 75', 75, False), ('[ $number = 1 ] || exit 1', 1, False)])
def test_one_failure_ends_all(machine, act, code, shown):
  ended, out, err = machine.run('local.sh', '--processes', '2', '--config', 'vqa', ACT=act,
                                GRACE='1')
  assert ended == code and out == 'output of 0\n' and 'Killed' not in err
  assert ('process 1 ended with' in err and '[1] output of 1' in err) == shown


@pytest.mark.parametrize('number, name', [(signal.SIGTERM, 'TERM'), (signal.SIGINT, 'INT')])
def test_signals_reach_each_process_once(machine, number, name):
  process = machine.start('local.sh', '--processes', '2', '--config', 'vqa', ACT='await')
  machine.wait_for('waits.0', 'waits.1')
  os.killpg(process.pid, number)  # as a terminal does at Ctrl-C
  process.communicate(timeout=30)
  assert process.returncode == 75
  assert machine.read('signals.0') == machine.read('signals.1') == f'{name}\n'


@pytest.fixture
def slurm(machine):
  machine.program('srun', SRUN)
  machine.program('scontrol', '#!/bin/sh\necho "$@" > "$RECORD/scontrol"\n')
  machine.program('scancel', '#!/bin/sh\ntouch "$RECORD/scancel"\n')
  machine.environment |= {'SLURM_SUBMIT_DIR': str(ROOT), 'SLURM_JOB_ID': '7'}
  return machine


@pytest.mark.parametrize('ended, restarts, requeued', [
    (0, 0, False), (75, 0, True), (75, 99, True), (1, 0, False), (2, 0, False), (137, 0, True),
    (134, 2, False)])
def test_slurm_requeues_what_can_go_on(slurm, ended, restarts, requeued):
  code, _, _ = slurm.run('slurm.sh', '--config', 'vqa', ACT=f'exit {ended}', MAX_RESTARTS='2',
                         SLURM_RESTART_COUNT=str(restarts))
  assert code == ended and (slurm.folder / 'scontrol').exists() == requeued
  if requeued:
    assert slurm.read('scontrol') == 'requeue 7\n'


def test_a_cancelled_job_saves_and_is_not_requeued(slurm):
  process = slurm.start('slurm.sh', '--config', 'vqa', ACT=(
      'touch "$RECORD/runs"; while [ ! -e "$RECORD/scancel" ]; do sleep 0.05; done; exit 75'))
  slurm.wait_for('runs')
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=30)
  assert process.returncode == 75 and not (slurm.folder / 'scontrol').exists()


def test_commands_of_tasks(slurm, tmp_path):
  slurm.run('slurm.sh', '--config', 'vqa', SLURM_CPUS_PER_TASK='4')
  program = '-P -m xmodal.main --multihost --config vqa\n'
  assert slurm.read('srun') == f'--cpus-per-task=4 {tmp_path}/venv/bin/python {program}'
  slurm.run('slurm.sh', '--config', 'vqa', CONTAINER='image.sif', MOUNTS='/data')
  assert slurm.read('srun') == (f'apptainer exec --nv --bind {ROOT},{tmp_path},/data '
                                f'--pwd {tmp_path} image.sif python3 {program}')
  slurm.run('slurm.sh', '--config', 'vqa', CONTAINER='nvcr.io#nvidia/jax', MOUNTS='/data,/scratch')
  mounts = ','.join(f'{folder}:{folder}' for folder in (ROOT, tmp_path, '/data', '/scratch'))
  assert slurm.read('srun') == (f'--container-image=nvcr.io#nvidia/jax --container-mounts={mounts} '
                                f'--container-workdir={tmp_path} python3 {program}')


def test_slurm_elsewhere(slurm, tmp_path):
  code, _, err = slurm.run('slurm.sh', SLURM_SUBMIT_DIR=str(tmp_path))
  assert code == 2 and 'REPOSITORY=DIR' in err
  assert slurm.run('slurm.sh', SLURM_SUBMIT_DIR=str(tmp_path), REPOSITORY=str(ROOT))[0] == 0


@pytest.fixture
def pod(machine):
  machine.program('gcloud', GCLOUD)
  machine.environment |= {'ZONE': 'here', 'PAUSE': '0', 'CREATE': '--accelerator-type=v5litepod-8'}
  # Workers are told apart by their numbers, as processes are.
  machine.program('../venv/bin/python', PYTHON.replace('number=0', 'number=$WORKER', 1))
  return machine


def test_a_pod_runs_until_it_has_finished(pod):
  code, _, err = pod.run('tpu_vm.sh', 'pod', '--config', 'vqa', '--workdir', '/mnt/my run', ACT=(
      'case $start in 0) echo PREEMPTED > "$RECORD/state"; exit 255 ;; 1) exit 75 ;; esac'))
  assert code == 0, err
  assert pod.read('created') == '--accelerator-type=v5litepod-8\n'
  attempt = ['scp', 'ssh', 'ssh', 'ssh']  # copy, install, end what runs, run
  assert pod.read('calls').split() == ['create', *attempt, 'delete', 'create', *attempt, *attempt]
  for worker in range(2):
    assert pod.read(f'{worker}.2') == (
        'GPUS= -P -m xmodal.main --multihost --config vqa --workdir /mnt/my run\n')


@pytest.mark.parametrize('ended, starts', [(2, 1), (1, 2)])
def test_a_pod_whose_run_fails(pod, ended, starts):
  code, _, _ = pod.run('tpu_vm.sh', 'pod', '--config', 'vqa', ACT=f'exit {ended}', MAX_RESTARTS='1')
  assert code == ended and len(list(pod.folder.glob('0.*'))) == starts


def test_a_pod_is_stopped(pod):
  process = pod.start('tpu_vm.sh', 'pod', '--config', 'vqa', ACT='await')
  pod.wait_for('waits.0', 'waits.1')
  os.killpg(process.pid, signal.SIGINT)
  out, err = process.communicate(timeout=30)
  assert process.returncode == 75, err
  assert pod.read('signals.0').split()[0] == pod.read('signals.1').split()[0] == 'TERM'


def test_a_pod_that_is_not_there(pod):
  code, _, err = pod.run('tpu_vm.sh', 'pod', CREATE='')
  assert code == 2 and 'no TPU pod in here' in err
  code, _, err = pod.run('tpu_vm.sh', 'pod', ZONE='')
  assert code == 2 and 'ZONE=ZONE' in err


@pytest.mark.parametrize('step, message, ended', [
    ('describe', 'ERROR: PERMISSION_DENIED: Cloud TPU API is disabled', 2),
    ('describe', 'ERROR: run: gcloud auth login', 2),
    ('describe', 'ERROR: no route to host', 0),
    ('create', 'ERROR: INVALID_ARGUMENT: no accelerator of this type', 2),
    ('create', 'ERROR: RESOURCE_EXHAUSTED: there is no more capacity', 0)])
def test_a_pod_is_tried_again_only_where_that_may_help(pod, step, message, ended):
  pod.program('gcloud.that_works', GCLOUD)
  pod.program('gcloud', f"""#!/bin/sh
if [ "$4" = {step} ] && [ ! -e "$RECORD/refused" ]; then
  touch "$RECORD/refused"
  echo '{message}' >&2
  exit 1
fi
exec "$0.that_works" "$@"
""")
  code, _, err = pod.run('tpu_vm.sh', 'pod', '--config', 'vqa', ACT='exit 0')
  assert code == ended and message in err


def test_a_pod_needs_gcloud(machine):
  (machine.bin / 'bash').symlink_to(shutil.which('bash'))
  code, _, err = machine.run('tpu_vm.sh', 'pod', ZONE='here', PATH=str(machine.bin))
  assert code == 2 and err.splitlines() == [
      'error: gcloud is not installed; see cloud.google.com/sdk']


@pytest.mark.parametrize('path', MANIFESTS, ids=lambda path: path.name)
def test_manifests_start_what_exists(path):
  jobset = yaml.safe_load(path.read_text())
  job, = jobset['spec']['replicatedJobs']
  spec = job['template']['spec']
  container, = spec['template']['spec']['containers']
  flags = dict(argument.removeprefix('--').partition('=')[::2] for argument in container['args'])
  keys = {f'config.{key}' for key, _ in configs.keys()}
  assert {flag for flag in flags if flag.startswith('config.')} <= keys
  known = set(re.findall(r'^  --(\w+): ', main._help(), re.MULTILINE))
  assert {flag for flag in flags if not flag.startswith('config.')} <= known
  assert container['command'] == ['xmodal', 'train']
  assert spec['parallelism'] == spec['completions']
  rule = spec['podFailurePolicy']['rules'][1]['onExitCodes']
  assert rule['containerName'] == container['name'] and rule['values'] == [75]
  if 'coordinator' in flags:
    name = jobset['metadata']['name']
    assert flags['coordinator'] == f'{name}-{job["name"]}-0-0.{name}:8476'
    assert int(flags['num_processes']) == spec['completions']


def test_a_bundle_answers_with_its_requirements_alone(machine):
  machine.program('of_venv', '#!/bin/sh\necho "$@" >> "$RECORD/calls"\nenv > "$RECORD/environment"')
  machine.program('my_python', '#!/bin/sh\n[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" && '
                  f'cp "{machine.bin}/of_venv" "$3/bin/python"\n')
  code, _, err = machine.run('bundle.sh', 'nothing')
  assert code == 2 and "'nothing' is no bundle" in err
  bundle = machine.folder.parent / 'my bundle'
  bundle.mkdir()
  (bundle / 'requirements.txt').write_text('jax\n')
  code, _, err = machine.run('bundle.sh', 'my bundle', '--text', 'what?', PYTHON='my_python',
                             PYTHONPATH=str(ROOT))
  assert (code, err) == (0, '')
  install, _, answer = machine.read('calls').splitlines()
  assert install.startswith('-m pip install') and install.endswith('-r my bundle/requirements.txt')
  assert answer == 'my bundle/model.py --text what?'
  assert 'PYTHONPATH' not in machine.read('environment')


def test_the_serving_manifest_runs_what_the_container_file_builds():
  deployment, service = yaml.safe_load_all((LAUNCH / 'serve' / 'kubernetes.yaml').read_text())
  spec = deployment['spec']['template']['spec']
  container, = spec['containers']
  built = (LAUNCH / 'serve' / 'Containerfile').read_text()
  entry = json.loads(re.search(r'^ENTRYPOINT (.*)$', built, re.MULTILINE)[1])
  flags = [argument.removeprefix('--').partition('=')[0]
           for argument in (*entry[2:], *container['args'])]
  help_text = subprocess.run([sys.executable, '-m', 'xmodal', 'serve', '--help'], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout
  assert entry[:2] == ['xmodal', 'serve'] and all(f'--{flag} ' in help_text for flag in flags)
  port, = container['ports']
  assert f'--port={port["containerPort"]}' in entry
  assert service['spec']['ports'][0]['targetPort'] == port['name']
  assert service['spec']['selector'] == deployment['spec']['template']['metadata']['labels']
  probes = {name: container[f'{name}Probe']['httpGet'] for name in ('liveness', 'readiness')}
  assert probes == {'liveness': {'path': '/healthz', 'port': port['name']},
                    'readiness': {'path': '/readyz', 'port': port['name']}}
  assert spec['securityContext']['runAsNonRoot']
  assert f'USER {spec["securityContext"]["runAsUser"]}\n' in built
  own = container['securityContext']
  assert own['readOnlyRootFilesystem'] and not own['allowPrivilegeEscalation']
  assert {'cpu', 'memory'} == set(container['resources']['requests'])
  mounted = {mount['name'] for mount in container['volumeMounts']}
  assert mounted == {volume['name'] for volume in spec['volumes']}
  cache = re.search(r'JAX_COMPILATION_CACHE_DIR=(\S+)', built)[1]
  assert cache in {mount['mountPath'] for mount in container['volumeMounts']}
  for source in re.findall(r'^COPY (.+) \S+$', built, re.MULTILINE):
    assert all((ROOT / name).exists() for name in source.split())
  # The grace period is longer than the server's own.
  assert spec['terminationGracePeriodSeconds'] > serve_command._GRACE
