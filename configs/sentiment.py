"""The embedded stand-in for SST-2: our base learns with LoRA and a head whether a review is good or bad.

A head, because the stories that the base has read never say "bad": LoRA leaves the embeddings as they are,
and without a good one for this word --method=lm stops at 87 %.
"""

name = "sentiment"
task = "sentiment"
model = "out/base"
method = "head"
lora_r = 16
hypothesis = "LoRA and a head tell good reviews from bad ones, which the prompted base cannot."

epochs = 2.0
batch_size = 32
learning_rate = 2e-3  # a base of 0.9M bears ten times what GPT-2 does; 5e-3 learns nothing
warmup_steps = 40
eval_every = 125
save_every = 125
