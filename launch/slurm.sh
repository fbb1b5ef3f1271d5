#!/usr/bin/env bash
#SBATCH --job-name=xmodal
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
# Trains under Slurm, from the repository: sbatch [options] launch/slurm.sh [arguments of xmodal train]
#   one task a node:  sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=96 launch/slurm.sh ...
#   one task a GPU:   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 ...
# Variables:
#   REPOSITORY   folder of the repository, if sbatch is called from another
#   EXTRA        cuda, where the batch script is to install JAX for GPUs; VENV, PYTHON: as in local.sh
#   CONTAINER    image with the packages: FILE.sif runs in Apptainer, other names in Pyxis (Enroot)
#   MOUNTS       folders that the container sees beside the repository and that of the call: /data,/scratch
#   MAX_RESTARTS requeues of the job, of all kinds, after which it ends once a process is killed; 10
#
# Two minutes before its time ends, or by `scancel --signal=TERM JOB`, the run saves and ends with 75:
# the job is requeued and resumes. `scancel JOB` saves too, and ends it for good. A process that was
# killed (codes from 128) ends the others, and the job is requeued. With other codes it ends.
set -u
# sbatch runs a copy of this file in a folder of its own.
repository="$(CDPATH='' cd -- "${REPOSITORY:-${SLURM_SUBMIT_DIR:-.}}" && pwd)"
if [ ! -f "$repository/launch/environment.sh" ]; then
  echo "error: ${REPOSITORY:-$PWD} is not the repository of xmodal; call sbatch there, or name it: REPOSITORY=DIR" >&2
  exit 2
fi

container=()
interpreter=python3
task=()
case "${CONTAINER:-}" in
  '')
    # Once for all nodes, which share the folder.
    bash -c '. "$1" "$2"' _ "$repository/launch/environment.sh" "${EXTRA:-}" || exit
    interpreter="${VENV:-$repository/.venv}/bin/python" ;;
  *.sif)
    task=(apptainer exec --nv --bind "$repository,$PWD${MOUNTS:+,$MOUNTS}" --pwd "$PWD" "$CONTAINER") ;;
  *)
    mounts=''
    for folder in "$repository" "$PWD" ${MOUNTS:+${MOUNTS//,/ }}; do
      mounts="$mounts${mounts:+,}$folder:$folder"
    done
    container=("--container-image=$CONTAINER" "--container-mounts=$mounts" "--container-workdir=$PWD") ;;
esac

# Slurm signals the tasks itself. This script waits for them; it is signalled only when the job is
# cancelled, or with --batch, and then does not requeue.
cancelled=''
trap 'cancelled=1; scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null' TERM INT

# JAX takes 0.75 of a GPU's memory unless told otherwise, for the sake of other programs.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
srun ${container[@]+"${container[@]}"} ${SLURM_CPUS_PER_TASK:+"--cpus-per-task=$SLURM_CPUS_PER_TASK"} \
  ${task[@]+"${task[@]}"} "$interpreter" -P -m xmodal.main --multihost "$@" &
while wait $!; code=$?; [ "$code" -gt 128 ] && kill -0 $! 2>/dev/null; do :; done

echo "launch/slurm.sh: ended with $code, start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID"
if [ -z "$cancelled" ] && { [ "$code" = 75 ] ||
    { [ "$code" -ge 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-10}" ]; }; }; then
  echo "launch/slurm.sh: requeued, to resume"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
