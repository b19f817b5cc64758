#!/bin/bash
# Train on a Slurm cluster, and go on after preemption and time limits until the run is finished.
#
#   sbatch --nodes=4 --gres=gpu:8 --time=4:00:00 deploy/slurm.sh small mesh.data=32 --out runs/NAME
#
# The arguments are those of `mukv train`. One process per node uses all its devices; the processes
# find each other through Slurm. --out must be on a file system that all nodes share. MUKV is the
# command to start (default: mukv).
#SBATCH --job-name=mukv
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
# Three minutes before the time limit the batch shell gets USR1: time to save a checkpoint.
#SBATCH --signal=B:USR1@180
set -uo pipefail

stopping=no
stop() {
  stopping=yes
  # mukv saves a checkpoint at SIGTERM and leaves with status 0.
  scancel --signal=TERM "$SLURM_JOB_ID.0"
}
trap stop USR1

srun --kill-on-bad-exit=1 "${MUKV:-mukv}" train "$@" --distributed auto &
step=$!
# A trapped signal interrupts `wait` while the step still runs.
while
  wait "$step"
  status=$?
  kill -0 "$step" 2>/dev/null
do :; done

if [ "$stopping" = yes ] && [ "$status" -eq 0 ]; then
  # The same command goes on from the checkpoint. Slurm itself requeues jobs that it preempts.
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
