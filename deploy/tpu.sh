#!/bin/bash
# Train on a TPU VM, and go on after preemption until the run is finished.
#
#   deploy/tpu.sh NAME ZONE TYPE small mesh.data=4 --out gs://BUCKET/runs/NAME
#
# Runs on any machine with gcloud. NAME, ZONE and TYPE are those of the TPU VM, a single host such
# as v5p-8; it is made as a spot VM if it is missing, and made again after each preemption. The other
# arguments are those of `mukv train`. --out must outlive the VM: the address of an object store.
# SOURCE is what pip installs on the VM (default: mukv[gs,tpu]); IMAGE the VM's software version.
set -uo pipefail

name=$1 zone=$2 type=$3
shift 3
vm() { gcloud compute tpus tpu-vm "$1" "$name" --zone="$zone" "${@:2}"; }
state() { vm describe --format='value(state)' 2>/dev/null || echo MISSING; }

command="mukv train $(printf '%q ' "$@")"
install="python3 -m pip install --quiet --user $(printf '%q' "${SOURCE:-mukv[gs,tpu]}")"
while true; do
  case "$(state)" in
    READY) ;;
    MISSING) vm create --accelerator-type="$type" --version="${IMAGE:-tpu-ubuntu2204-base}" --spot ;;
    PREEMPTED | TERMINATED | STOPPED | FAILED) vm delete --quiet && continue ;;
  esac
  # The same command goes on from the last checkpoint in the store.
  vm ssh --command="$install && PATH=\$HOME/.local/bin:\$PATH $command"
  status=$?
  # A VM that is taken away stops the training by SIGTERM, with status 0, or ends the connection (255);
  # its state changes some seconds later. Any other end is that of the training.
  sleep "${PAUSE:-30}"
  if [ "$(state)" = READY ] && [ "$status" -ne 255 ]; then
    exit "$status"
  fi
done
