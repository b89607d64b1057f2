#!/bin/sh
# The whole story of PLAN.md for each of SEEDS, into RUNS; run it again after a stop.
set -eu
SEEDS=${SEEDS:-0 1 2} RUNS=${RUNS:-runs/robot-sim} MODE=${MODE:---fast}
ROBOT=sim/Lift-pixels64
mkdir -p "$RUNS"
DATA="--data.demonstrations $RUNS/demos.hdf5 --data.image-keys image.agentview image.robot0_eye_in_hand --data.chunk 4"
SIZE="--policy.encoder.crop 58 --pretraining.batch-size 64 --pretraining.steps 4000"
test -f "$RUNS/demos.hdf5" || postbc demos collect --task Lift --num 10 --operators better --images --image-size 64 --output "$RUNS/demos.hdf5"
postbc pretrain $DATA $SIZE --seeds $SEEDS --pretraining.method bc --output "$RUNS/bc" --resume
postbc posterior fit $DATA --seeds $SEEDS --encoder "$RUNS/bc" --ensemble.ensemble-size 20 --ensemble.steps 2000 --output "$RUNS/posterior" --resume
postbc pretrain $DATA $SIZE --seeds $SEEDS --posterior "$RUNS/posterior" --output "$RUNS/postbc" --resume
for method in ${METHODS:-bc postbc}; do
  postbc robot rollout --policy "$RUNS/$method" --seeds $SEEDS --robot $ROBOT --episodes 100 --horizon 150 $MODE \
    --label simulator --wrong-labels 0.05 --output "$RUNS/rollouts-$method" --resume
  postbc evaluate --policy "$RUNS/$method" --seeds $SEEDS --episodes 100 --horizon 150 --videos 0 --output "$RUNS/evaluation/$method" --resume
  postbc finetune best-of-n --policy "$RUNS/$method" --seeds $SEEDS --rollouts "$RUNS/rollouts-$method" --best-of-n.samples 4 \
    --best-of-n.eval-episodes 0 --iql.steps 20000 --iql.expectile 0.7 --iql.discount 0.97 --output "$RUNS/n4-$method" --resume
  for n in 4 16; do
    test $n = 4 && samples= || samples="--samples $n"
    postbc evaluate --policy "$RUNS/n4-$method" $samples --seeds $SEEDS --episodes 100 --horizon 150 --videos 0 \
      --output "$RUNS/evaluation/n$n-$method" --resume
  done
done
for seed in $SEEDS; do
  postbc robot compare "$RUNS/n4-postbc/seed_$seed" "$RUNS/n4-bc/seed_$seed" --robot $ROBOT --episodes 40 --horizon 150 --seed "$seed" $MODE \
    --label simulator --output "$RUNS/comparison/seed_$seed" --resume
done
case " $SEEDS " in *" 0 "*)  # in real time, for the table of lateness: nothing else should run
  for rate in 20 5; do
    postbc robot rollout --policy "$RUNS/bc" --seeds 0 --robot $ROBOT --episodes 10 --horizon 150 --rate $rate --label simulator \
      --output "$RUNS/real-time-$rate" --resume
  done ;;
esac
