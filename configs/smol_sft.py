"""SmolLM2-135M-Instruct learns to solve GSM8K's problems, by LoRA: the train split but its last 500."""

name = "smol-sft"
model = "HuggingFaceTB/SmolLM2-135M-Instruct"
data = "gsm8k"
hypothesis = "A real model of 135M parameters learns to solve a few percent of GSM8K."

lora_r = 32
lora_dropout = 0.0
epochs = 1.0
batch_size = 4
grad_accum_steps = 2
context_length = 512
learning_rate = 5e-4
warmup_steps = 20
eval_every = 100
save_every = 100
