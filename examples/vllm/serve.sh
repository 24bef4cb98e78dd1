#!/bin/sh
# Serve the demo's tiny model over HTTP on a CPU, on two ranks that rearrange their experts while they serve.
#   examples/vllm/serve.sh [options of vllm serve]      later options win, for example --port 8001
# Needs vLLM and eplb_platform in the environment of $PYTHON (python by default).
set -eu
here=$(dirname "$0")
python=${PYTHON:-python}
model=${MODEL:-eplb-demo-model}
[ -n "${MODEL:-}" ] || "$python" "$here/demo_model.py" "$model" > /dev/null

# What vLLM needs on few CPU cores: one thread for each rank, pinned to none, and a small KV cache.
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "$(dirname "$("$python" -c 'import sys; print(sys.executable)')")/vllm" serve "$model" \
  --served-model-name tiny --dtype float32 --max-model-len 512 --max-num-seqs 8 \
  --tensor-parallel-size 2 --enable-expert-parallel --shutdown-timeout 10 \
  --additional-config '{"eplb_config": {
      "dynamic_eplb": true,
      "num_redundant_experts": 16,
      "expert_heat_collection_interval": 64,
      "algorithm_execution_interval": 8
    }}' "$@"
