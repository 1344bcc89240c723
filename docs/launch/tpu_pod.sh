#!/bin/bash
# A pod slice of 32 TPU chips, such as a v5e-32: the same command on each of its hosts, one process
# a host. JAX finds them from the metadata of Cloud TPU.
#
# bash tpu_pod.sh NAME ZONE
set -euo pipefail
NAME=$1 ZONE=$2

gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command '
RUN=/runs/sd15 # on a file system that all hosts have mounted, such as Filestore
if [ -f "$RUN/config.yaml" ]; then
    exec diffusion-grpo train --resume "$RUN" --distributed
fi
exec diffusion-grpo train sd15 --run.save-every 5 --run.output "$RUN" \
    --rollout.prompts-per-iteration 32 --rollout.microbatch 32 --grpo.microbatch 32 --distributed
'
