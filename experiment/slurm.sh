#!/bin/bash
# Trains under Slurm for as long as it takes: two minutes before the time limit the run saves its step and ends, and the
# job goes back into the queue, from where it continues.
#
#     sbatch experiment/slurm.sh experiment/cifar/main.py --dataset CIFAR10 --data_path DIR --rate_flag
#
#SBATCH --time=04:00:00
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

log=log/slurm-$SLURM_JOB_ID # the same after a requeue
run=$(ls -d "$log"/*/ 2> /dev/null | head -n 1)
if [ -n "$run" ]; then
  set -- "$1" --resume "$run"
else
  set -- "$@" --log_path "$log"
fi
srun python "$@"
status=$?
if [ $status -eq $((128 + $(kill -l USR1))) ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
