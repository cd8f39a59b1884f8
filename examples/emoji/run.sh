#!/bin/bash
# The demonstration of docs/emoji.md from its first step to its last: pictures, base model, CLIP, two fine-tunings, sheet.
#   bash examples/emoji/run.sh      in the folder of the checkout, with rlfusion, npm and about fifty minutes of one core
set -euo pipefail
export OMP_NUM_THREADS=1
TIMEFORMAT='%U CPU seconds'

npm pack emoji-datasource-twitter@16.0.0
python examples/emoji/pictures.py emoji-datasource-twitter-16.0.0.tgz --out emoji.npz
time rlfusion pretrain --data emoji.npz --name emoji \
  --model.net "UNet(width=16, multipliers=(1,2,4), depth=1, attention=(2,))" --train.steps 5500 --train.batch 32 \
  --train.lr 2e-3 --train.ema "Constant(decay=0.998)" --train.augment "Augment(flip=0.5)" --train.label_noise 0.5 \
  --chain.steps 10 --evaluation.samples 600
time rlfusion train-clip --data emoji.npz --name emoji-words --steps 600
time rlfusion finetune --base runs/emoji --pretrain.data emoji.npz --name emoji-clip --reward clip_score \
  --reward_options "{clip_score: {model: runs/emoji-words}}" --agent nft --agent.lr 5e-4 --updates 32 \
  --rollout.prompts 12 --rollout.samples_per_prompt 10 --monitor.samples 120 --evaluation.samples 600
time rlfusion evaluate --checkpoint runs/emoji-clip/best --against runs/emoji --data emoji.npz --reward clip_score \
  --reward_options "{clip_score: {model: runs/emoji-words}}" --evaluation.samples 600
time rlfusion finetune --base runs/emoji --pretrain.data emoji.npz --name emoji-colourful \
  --reward examples/emoji/colourful.py:colourful --agent ddpo --agent.lr 1e-4 --agent.step_weight noise \
  --agent.clip_per_dim true --agent.step_fraction 0.5 --agent.epochs 1 --agent.kl_loss 0 --updates 20 \
  --rollout.prompts 12 --rollout.samples_per_prompt 10 --monitor.samples 120 --evaluation.samples 600
time rlfusion evaluate --checkpoint runs/emoji-colourful/best --against runs/emoji --data emoji.npz \
  --reward examples/emoji/colourful.py:colourful --evaluation.samples 600
python examples/emoji/grid.py --out emoji.png "before=runs/emoji" "after clip_score=runs/emoji-clip/best" \
  "after colourful=runs/emoji-colourful/best" --each 5
