"""A channel for the embedded word problems: the instruction-tuned model, taught to tell a problem from its
answer.
"""

name = "verifier"
model = "out/dpo"
answers_of = "out/sft"
start = "out/sft"
task = "arithmetic"
gold = 2500  # of those that SFT has seen
first_problem = 4000
problems = 5000  # these, and their answers, are those of DPO
n = 4
held_n = 16
validation_problems = 250
repeats = 3  # about as good as all answers twice (one seed), in 0.7 of the time
hypothesis = "A channel from answer back to problem orders answers better than a majority vote."

epochs = 1.0
batch_size = 16
optimizer = "muon"  # once with Muon is about as good as twice with AdamW, in half the time
learning_rate = 2e-3
warmup_steps = 40
eval_every = 400
save_every = 400
