#!/bin/sh
# PLAN.md's measurements, of what record.py wrote into DATA (Lift.hdf5, Can.hdf5, Square.hdf5), into RUNS; run it again after a stop.
set -eu
DATA=${DATA:-runs/version-difference/data} RUNS=${RUNS:-runs/version-difference} SEEDS=${SEEDS:-300 301 302}
mkdir -p "$RUNS"
for task in Lift Can Square; do
  test -f "$RUNS/own-$task.hdf5" || postbc demos collect --task $task --operators proficient --num 40 --seed 15 --output "$RUNS/own-$task.hdf5"
  test -f "$RUNS/converted-$task.hdf5" || postbc demos convert "$DATA/$task.hdf5" --allow-version-mismatch --output "$RUNS/converted-$task.hdf5"
  echo "$task, recorded with 1.5.1:" && postbc demos replay "$DATA/$task.hdf5" --allow-version-mismatch
done
for data in own converted raw; do
  file="$RUNS/$data-Lift.hdf5" train= play=
  test $data = raw && file="$DATA/Lift.hdf5" train=--data.allow-version-mismatch play=--allow-version-mismatch
  postbc pretrain --data.demonstrations "$file" $train --data.chunk 4 --pretraining.method bc --policy.hidden 256 --pretraining.steps 10000 \
    --pretraining.learning-rate 3e-4 --seeds $SEEDS --output "$RUNS/$data" --resume
  postbc evaluate --policy "$RUNS/$data" $play --environment postbc/Lift --episodes 200 --videos 0 --seeds $SEEDS --output "$RUNS/evaluation/$data" --resume
done
