"""SST-2: is a review good or bad? GPT-2 with LoRA, as published 91 to 92 %.

67,349 phrases for training, about 20 tokens each with the question; reported on GLUE's 872 validation
sentences, since its test labels are not public.
"""

task = "sst2"
model = "gpt2"
lora_r = 16
hypothesis = "LoRA on GPT-2 comes near what full fine-tuning reaches, about 91 %."

epochs = 3.0
batch_size = 32
learning_rate = 3e-4
warmup_steps = 200
eval_every = 1000
save_every = 1000
eval_examples = 0
