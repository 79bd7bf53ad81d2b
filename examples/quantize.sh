#!/bin/sh
# Smaller weights on top of a smaller model:  sh examples/quantize.sh RUN DATA
# Needs pip install 'minipuzzle[quantize]'. Each command says what it lost: loss, KL and agreement before and after.
set -eu
RUN=${1:-runs/mine}
DATA=${2:-stdlib}

# FP8 weights and cache: the checkpoint that vLLM, SGLang and TensorRT-LLM load
minipuzzle quantize "$RUN" --precision fp8 --kv-precision fp8 --data "$DATA" -o "$RUN-fp8"

# 4 bits cost more: first train the rounded weights against the model itself
minipuzzle quantize "$RUN" --precision nvfp4 --distill 10M --data "$DATA" -o "$RUN-nvfp4"

# For llama.cpp
minipuzzle quantize "$RUN" --gguf q4_k_m --data "$DATA" -o "$RUN-gguf"
