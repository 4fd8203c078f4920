#!/usr/bin/env bash
# What a GPU machine is asked once: tests/benchmarks/cuda.sh OUT, about seven minutes on an H100.
# Each part has a time limit of its own; what a part measured before it lies in OUT.
set -u
out=${1:?the folder for the results}
here=$(dirname "$0")
room=$(mktemp -d)
mkdir -p "$out"
export HF_HUB_OFFLINE=1 COLUMNS=100 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python3}

part() { # seconds, then a command
    local limit=$1 begun=$SECONDS
    shift
    timeout "$limit" "$@" 2>&1
    echo "== exit $? after $((SECONDS - begun)) s: $*"
}

part 30 "$python" -m lorafit env
part 60 "$python" -m lorafit train --preset ffn --layers high -o "$room/demo"
part 60 "$python" -m lorafit train --preset ffn --layers high --dtype float32 --max-steps 8 -q -o "$room/gpu"
part 60 "$python" -m lorafit train --preset ffn --layers high --dtype float32 --max-steps 8 -q -o "$room/cpu" --device cpu
grep -h '"stepped"' "$room"/[gc]pu/events.jsonl | cut -c1-70
for contenders in "ffn-high lorafit,lorafit-no-cache,lorafit-compiled,peft-trainer,trl-best,trl-default" \
    "all-all lorafit,lorafit-compiled,peft-trainer"; do
    part 180 "$python" "$here/throughput.py" --output "$out/throughput-cuda.jsonl" --folder "$room/models" \
        --rounds 1 --cells gpu --cell-name "1b-${contenders% *}" --contenders "${contenders#* }"
done
for plan in "ffn high" "all all"; do
    set -- $plan
    part 60 "$python" -m lorafit train "$room/models/1b" --data "$here/../../lorafit/demo/train.jsonl" --preset "$1" \
        --layers "$2" --batch-size 64 --max-steps 40 -o "$room/1b-$1-$2" --holdout 0.05
done
part 60 "$python" "$here/cuda_steps.py" "$room/models"
part 90 "$python" "$here/throughput.py" --output "$out/throughput-cuda.jsonl" --folder "$room/models" --rounds 1 \
    --cells gpu --cell-name 3b-ffn-high --contenders lorafit,peft-trainer
part 30 "$python" -m lorafit eval "$room/demo" --rows 0 --samples 1
part 40 "$python" -m lorafit merge "$room/demo" -o "$room/merged"
part 200 "$python" "$here/prediction.py" --output "$out/prediction-cuda.jsonl"
