#!/usr/bin/env bash
# The whole pipeline: train, fine-tune, align, measure, report. Run it again and it goes on where it was.
#
#   bash run_all.sh                    speedrun with a CUDA card, cpu without one
#   bash run_all.sh cpu                minutes on two cores, text made on the spot, no network after installation
#   bash run_all.sh speedrun           two and a half hours on an RTX 3060 by the plan; allow four
#   bash run_all.sh max3060            about a day
#   bash run_all.sh smol               hours on a laptop: SmolLM2-135M of the hub on SST-2 and GSM8K, from SFT
#                                      to a verifier; MODEL=models/smollm2 takes another model or folder
#   bash run_all.sh cpu pretrain       some stages only: tokenizer, pretrain, samples, finetune, sft, dpo,
#                                      verifier, eval
#   bash run_all.sh speedrun --plan --vram=12    what it will cost, and nothing else
#   bash run_all.sh experiments        what each part of the model buys (--quick: short, to see it work)
#   bash run_all.sh hardware           what this machine does: matrix products, memory against the plan, speed
#   bash run_all.sh rehearse           all commands of speedrun and max3060 on a CPU without a network, everything
#                                      small: random weights, a few rows (rehearse speedrun tokenizer pretrain: some stages)
#   bash run_all.sh test               set up and run the tests
#
# PYTHON=python3.12 chooses the interpreter that makes .venv; OUT=/big/disk/out the folder for everything made;
# SEED=2 OUT=out2 gives every stage that trains another seed.
set -euo pipefail
cd "$(dirname "$0")"

OUT=${OUT:-out}
VENV=.venv
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
planning= planned=

main() {
    local profile=${1:-}
    [ $# -gt 0 ] && shift
    case "$profile" in
        "" | cpu | speedrun | max3060 | smol | experiments | hardware | rehearse | test) ;;
        -h | --help) usage; exit 0 ;;
        *) echo "run_all.sh: unknown profile '$profile'" >&2; usage >&2; exit 2 ;;
    esac
    if [ "$profile" = test ]; then
        set_up dev
        test_everything "$@"
        return
    fi
    set_up
    if [ "$profile" = experiments ]; then
        python -m lab.experiments --out="$OUT" "$@"
        python report.py --home="$OUT"
        return
    fi
    if [ "$profile" = hardware ]; then
        python -m lab.hardware --out="$OUT" "$@"
        python report.py --home="$OUT"
        return
    fi
    if [ "$profile" = rehearse ]; then
        python tests/rehearsal.py "$@"
        return
    fi
    if [ -z "$profile" ]; then
        profile=$(python -m support.machine) || exit $?
    fi
    local stages=() for_plan=() config=configs/$profile.py run word unplanned=
    for word in "$@"; do
        case "$word" in
            --*) for_plan+=("$word") ;;
            tokenizer | pretrain | samples | finetune | sft | dpo | verifier | eval) stages+=("$word") ;;
            *) echo "run_all.sh: unknown stage '$word' (tokenizer, pretrain, samples, finetune, sft, dpo, verifier, eval)" >&2; exit 2 ;;
        esac
    done
    local all=(tokenizer pretrain samples finetune sft dpo verifier eval)
    if [ "$profile" = smol ]; then
        config=configs/smol_sft.py
        all=(finetune sft dpo verifier eval)
    fi
    run=$OUT/$(python -c "import runpy; print(runpy.run_path('$config').get('name', 'base'))")
    [ ${#stages[@]} -gt 0 ] || stages=("${all[@]}")
    mkdir -p "$OUT/logs" "$OUT/stamps"
    echo "profile $profile: ${stages[*]}; everything goes to $OUT/"
    planning=yes life | python -m lab.plan --out="$OUT" ${for_plan[@]+"${for_plan[@]}"} || unplanned=$?
    [ ${#for_plan[@]} -eq 0 ] || exit ${unplanned:-0}
    [ "$unplanned" != 3 ] || exit 3 # the disk is too full
    life
    echo
    python report.py --home="$OUT"
    echo "minutes per stage, and as planned:"
    touch "$OUT/plan.tsv"
    awk -F'\t' 'FILENAME == ARGV[1] { planned[$1] = $2; next }
        { printf "  %-18s %6.1f %6.1f  %s\n", $1, $2 / 60, planned[$1] / 60, $3 }' "$OUT/plan.tsv" "$OUT/ledger.tsv"
    echo "talk to it: $VENV/bin/python chat.py $run"
    echo "watch it, talk to it and look inside it in the browser: $VENV/bin/python serve.py$([ "$OUT" = out ] || echo " --out=$OUT")"
}

# All stages that are wanted, one after the other.
life() {
    local name
    for name in "${stages[@]}"; do
        if [ "$profile" = smol ]; then
            smol "$name"
            continue
        fi
        case "$name" in
            tokenizer) stage tokenizer "$OUT/tokens" python tokenizer.py "$config" --out="$OUT" ;;
            pretrain) stage pretrain "$run/model.safetensors" python train.py "$config" --out="$OUT" ;;
            samples) stage samples "$run" python chat.py "$run" --prompt="Once upon a time" --n=5 --seed=1 --temperature=0.7 ;;
            finetune) finetune ;;
            sft) stage sft "$OUT/sft/model.safetensors" python sft.py configs/sft.py --model="$run" --out="$OUT" ;;
            dpo) stage dpo "$OUT/dpo/model.safetensors" python dpo.py configs/dpo.py --model="$OUT/sft" --out="$OUT" ;;
            verifier) stage verifier "$OUT/verifier/run.json" python verifier.py configs/verifier.py \
                --model="$OUT/dpo" --start="$OUT/sft" --answers_of="$OUT/sft" --out="$OUT" ;;
            eval) evaluate ;;
        esac
    done
}

# The same stages for a real model that others pretrained.
smol() {
    local sft=$OUT/smol-sft dpo=$OUT/smol-dpo eval=(python eval.py --out="$OUT" "$MODEL")
    local verifier=(python verifier.py configs/smol_verifier.py --model="$sft" --start="$sft" --out="$OUT")
    case "$1" in
        finetune) tune smol_sst2 --model="$MODEL" ;;
        sft) stage smol-sft "$sft/run.json" python sft.py configs/smol_sft.py --model="$MODEL" --out="$OUT" ;;
        dpo) stage smol-dpo "$dpo/run.json" python dpo.py configs/smol_dpo.py --model="$sft" --out="$OUT" ;;
        verifier)
            stage smol-verifier "$OUT/smol-verifier/run.json" "${verifier[@]}"
            stage smol-head "$OUT/smol-head/run.json" "${verifier[@]}" --kind=head --name=smol-head ;;
        eval)
            stage eval-smol_sst2 "$OUT/smol_sst2/results.json" "${eval[@]}" "$OUT/smol_sst2" --tasks=sst2 --shots=0,4
            stage eval-smol "$sft/results.json" "${eval[@]}" "$sft" "$dpo" --tasks=gsm8k --limit=300 --samples=8 \
                --verifier="$OUT/smol-verifier,$OUT/smol-head" ;;
        *) echo "run_all.sh: smol has the stages finetune, sft, dpo, verifier and eval" >&2; exit 2 ;;
    esac
}

# Our base learns the embedded stand-in; a card has time for real tasks and models from the Hugging Face hub.
finetune() {
    if [ "$profile" = cpu ]; then
        tune sentiment --model="$run"
    else
        tune sst2
        tune samsum
        tune gsm8k
    fi
}

# tune TASK [FLAG...]
tune() {
    stage "finetune-$1" "$OUT/$1/run.json" python finetune.py "configs/$1.py" --name="$1" --out="$OUT" "${@:2}"
}

# Every model on the task it learnt, beside what it was before with examples in its prompt; then the whole life
# of ours in one table: base, SFT, DPO, and what choosing among many answers adds.
evaluate() {
    local eval=(python eval.py --out="$OUT") embedded=sentiment,dialogue,arithmetic,story,storyworld
    stage eval-base "$run/results.json" "${eval[@]}" "$run" --tasks=$embedded --shots=0,4 --limit=500 --stride=256
    if [ "$profile" = cpu ]; then
        stage eval-sentiment "$OUT/sentiment/results.json" "${eval[@]}" "$run" "$OUT/sentiment" --tasks=sentiment
    else
        local task parent
        for task in sst2 samsum gsm8k; do
            parent=gpt2
            [ $task != samsum ] || parent=google/flan-t5-small
            # Whoever left fine-tuning out, for want of a network say, has no such model.
            [ -e "$OUT/$task/run.json" ] || [[ $planning = yes && " ${stages[*]} " = *" finetune "* ]] || continue
            stage eval-$task "$OUT/$task/results.json" "${eval[@]}" $parent "$OUT/$task" --tasks=$task
        done
    fi
    stage eval-life "$OUT/pipeline.json" "${eval[@]}" "$run" "$OUT/sft" "$OUT/dpo" --tasks=arithmetic,storyworld \
        --samples=16 --verifier="$OUT/verifier" --battery=200 --stride=256
    stage eval-attention "$run/attention.json" "${eval[@]}" "$run" --attention
}

usage() { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; }

# set_up [EXTRA]: the virtual environment with the packages of pyproject.toml, once and when that file changes.
set_up() {
    local wanted="[${1:-serve}]" stamp
    stamp="$wanted $(cksum <pyproject.toml)"
    if ! grep -qsxF "$stamp" "$VENV/installed"; then
        echo "setting up $VENV (the first time takes minutes)"
        [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
        torch_for_cpu
        if ! "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check ".$wanted"; then
            echo "run_all.sh: installing failed; once there is a network, the same command goes on" >&2
            exit 1
        fi
        echo "$stamp" >>"$VENV/installed"
    fi
    export PATH="$PWD/$VENV/bin:$PATH" PYTHONUNBUFFERED=1
    export END_WITH_PARENT=$$ # so that even kill -9 of this script leaves no training behind
    [ -t 2 ] || export HF_HUB_DISABLE_PROGRESS_BARS=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1
}

# Linux without an NVIDIA driver: torch's build for CPUs, if it can be had, saves gigabytes.
torch_for_cpu() {
    [ "$(uname -s)" = Linux ] || return 0
    local sign
    for sign in /proc/driver/nvidia/version /usr/lib/wsl/lib/nvidia-smi "$(command -v nvidia-smi)"; do
        [ ! -e "$sign" ] || return 0
    done
    trap 'exit 130' INT # pip takes a Ctrl-C for a failure
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --retries 0 \
        --index-url https://download.pytorch.org/whl/cpu "$(grep -om1 'torch>=[^"]*' pyproject.toml)" 2>/dev/null ||
        echo "torch's build for CPUs cannot be had: taking the default one, which may be larger" >&2
    trap - INT
}

test_everything() {
    ruff check .
    ruff format --check .
    python -m pytest -q --numprocesses=auto --dist=loadfile --no-loadscope-reorder "$@" # a file's tests share what they made
}

# The stage whose result NAME reads: once that has begun again, what NAME made before is out of date.
stage_before() {
    case "$1" in
        # These begin with text, or with models of the hub.
        tokenizer | finetune-sst2 | finetune-samsum | finetune-gsm8k | finetune-smol_sst2 | smol-sft) ;;
        smol-dpo | smol-verifier | smol-head) echo smol-sft ;;
        eval-smol) echo smol-head ;;
        pretrain) echo tokenizer ;;
        dpo) echo sft ;;
        verifier) echo dpo ;;
        eval-life) echo verifier ;;
        eval-sentiment | eval-sst2 | eval-samsum | eval-gsm8k | eval-smol_sst2) echo "finetune-${1#eval-}" ;;
        *) echo pretrain ;;
    esac
}

# stage NAME RESULT COMMAND...: runs the command unless it has run with these configs and its RESULT is there.
stage() {
    local name=$1 result=$2 begun=$SECONDS mark status=0 stamp=$OUT/stamps/$1 run_json=${2%/*}/run.json
    local before begun_before
    before=$(stage_before "$name")
    begun_before=$OUT/stamps/$before.begun
    shift 2
    case "${SEED:+$2}" in train.py | finetune.py | sft.py | dpo.py | verifier.py) set -- "$@" --seed="$SEED" ;; esac
    local log=$OUT/logs/$name.log
    mark=$({ echo "$*"; [ -z "$before" ] && [ "$name" != tokenizer ] || cat "$config"; case "${3:-}" in configs/*) cat "$3" ;; esac } | cksum)
    [ -n "$planning" ] || echo
    if [ -e "$result" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$mark" ] && [ ! "$begun_before" -nt "$stamp" ] &&
        [[ " $planned" != *" $before "* ]]; then
        [ -n "$planning" ] || echo "== $name: done before (its output: $log; to repeat it: rm $stamp)"
        return
    fi
    if [ -n "$planning" ]; then
        printf '%s\t%s\n' "$name" "$*"
        planned+="$name "
        return
    fi
    # What was tuned from a model that has been trained anew since then starts anew, too.
    case $2 in finetune.py | sft.py | dpo.py | verifier.py)
        [ ! -e "$run_json" ] || [ ! "$begun_before" -nt "$run_json" ] || set -- "$@" --overwrite ;;
    esac
    echo "== $name: $*"
    rm -f "$stamp" && touch "$stamp.begun" # also if we are killed, what follows from this stage is out of date
    # A terminal keeps its progress bar; without one, what would go there goes to the log.
    if [ -t 2 ]; then "$@" | tee -i "$log" || status=$?; else "$@" 2>&1 | tee -i "$log" || status=$?; fi
    if [ $status -ne 0 ]; then
        [ $status -lt 129 ] || echo "run_all.sh: stage $name was interrupted" >&2
        [ $status -ge 129 ] || echo "run_all.sh: stage $name failed; see above, or $log" >&2
        echo "run_all.sh: to go on from there: bash run_all.sh $profile" >&2
        exit $status
    fi
    echo "$mark" >"$stamp"
    local word words=() # what has a space was in quotes
    for word in "$@"; do case "$word" in *\ *) words+=("\"$word\"") ;; *) words+=("$word") ;; esac done
    printf '%s\t%s\t%s\n' "$name" $((SECONDS - begun)) "${words[*]}" >>"$OUT/ledger.tsv"
}

main "$@"
