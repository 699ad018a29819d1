"""A channel for the embedded word problems: the instruction-tuned model, taught to tell a problem from its
answer.
"""

name = "verifier"
model = "out/dpo"
answers_of = "out/sft"
start = "out/sft"
task = "arithmetic"
gold = 3500  # those that SFT has seen
first_problem = 4000
problems = 5000  # these, and their answers, are those of DPO
n = 4
held_n = 16
validation_problems = 250
repeats = 3  # about as good as all answers twice (one seed), in 0.7 of the time
contrast = 4.0
hypothesis = "A channel from answer back to problem orders answers better than a majority vote."

epochs = 1.25
batch_size = 16
optimizer = "normuon"  # Muon had to go twice through the examples to be as good (report/alignment.md)
momentum = 0.9
learning_rate = 4e-3
warmup_steps = 40
eval_every = 400
save_every = 400
