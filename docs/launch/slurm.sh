#!/bin/bash
# Two machines of eight GPUs under SLURM, one process a GPU. JAX finds the processes from SLURM's
# variables. Five minutes before the time is up all of them get SIGTERM, save, and exit with 75,
# upon which the job queues again.
#SBATCH --job-name=diffusion-grpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

RUN=$HOME/runs/sd15 # a folder that both machines see

if [ -f "$RUN/config.yaml" ]; then
    srun diffusion-grpo train --resume "$RUN" --distributed
else
    srun diffusion-grpo train sd15 --run.save-every 5 --run.output "$RUN" \
        --grpo.microbatch 16 --distributed
fi
CODE=$?
[ $CODE -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"
exit $CODE
