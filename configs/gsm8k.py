"""GSM8K: grade-school word problems with worked solutions. GPT-2, all weights, learns a few percent of them.

The last 500 problems of the train split serve as validation; report on the test split with eval.py.
"""

task = "gsm8k"
model = "gpt2"
hypothesis = "GPT-2 learns the form of a solution, and a few percent of the answers."

epochs = 3.0
batch_size = 8
grad_accum_steps = 4
context_length = 512
learning_rate = 5e-5
warmup_steps = 50
eval_every = 200
save_every = 200
