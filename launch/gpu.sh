#!/usr/bin/env bash
# Checks and measures xmodal on one NVIDIA GPU, one part after the other:
#   launch/gpu.sh [attention] [steps] [tests] [torch] [data] [wait]
# It uses the `python3` of this machine, with JAX for CUDA in it (PYTHON=... for another), and only
# what the parts need: `torch` wants PyTorch, `tests` pytest and pytest-xdist.
cd -- "$(dirname -- "$0")/.." || exit
python=${PYTHON:-python3}
part() { echo "== $1 ($SECONDS s)"; }
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # several processes share the card

parts=("$@")
if (($# == 0)); then parts=(attention steps tests torch data wait); fi
for name in "${parts[@]}"; do
  part "$name"
  case $name in
    attention) "$python" -m xmodal.bench.attention ;;
    steps) "$python" -m xmodal.bench.gpu --seconds "${STEPS_SECONDS:-330}" ;;
    tests) JAX_PLATFORMS=cuda "$python" -m pytest -q -n 7 --dist load -p no:cacheprovider tests/test_gpu.py ;;
    torch) "$python" -m xmodal.bench.train_step --batch 64 --rounds 5 --steps 10 model.remat=none ;;
    data) "$python" -m xmodal.bench.data --pictures 256 --sizes 640x480 --rounds 2 --workers 1 4 8 16 ;;
    wait) "$python" -m xmodal.bench.input_wait --size base --batch 256 --steps 120 ;;
    *) echo "unknown part: $name" >&2; exit 2 ;;
  esac || echo "$name: failed"
done
part end
