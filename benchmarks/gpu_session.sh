#!/usr/bin/env bash
# Half an hour with one GPU on a bare machine that nothing can be downloaded to, in three calls of ten minutes at most.
#   benchmarks/gpu_session.sh prepare   here: the packages that are missing there, into .gpu/site.tar.xz (57 MB)
#   benchmarks/gpu_session.sh first     there: versions, bits, messages, tests/gpu
#   benchmarks/gpu_session.sh second    there: copies, the predictor alone, the host alone
#   benchmarks/gpu_session.sh third     there: whole jobs against the floor, on the GPU and on the CPUs
# The machine needs Python 3.12 with cupy, numpy, pandas, pyarrow, numba, pytest and a C compiler. Each step has a limit
# of its own, and writes what it has to $OUT (default: .gpu/results) as it goes. If `bits` finds a row that is folded and
# differs, stop there: nothing else counts.
set -uo pipefail
cd "$(dirname "$0")/.."
home=$PWD/.gpu
OUT=${OUT:-$home/results}
PYTHON=${PYTHON:-python3}
mkdir -p "$home" "$OUT"
# Their wheels, without what such a machine has: 64 MiB may be sent at a time, the repository included.
packages=('xgboost>=3.4,<3.5' 'dask==2026.7.1' 'distributed==2026.7.1' 'dask-cuda>=26.10,<26.11'
    'rapids-dask-dependency>=26.10,<26.11' zict tblib locket partd tornado pydantic pydantic-core annotated-types
    typing-inspection cronsim tzdata)

prepare() {
    rm -rf "$home/wheels" "$home/site"
    mkdir -p "$home/wheels" "$home/site"
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.12 \
        --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --dest "$home/wheels" "${packages[@]}"
    # pydantic asks for one version of its core.
    local wanted
    wanted=$(unzip -p "$home"/wheels/pydantic-[0-9]*.whl '*.dist-info/METADATA' |
        sed -n 's/^Requires-Dist: pydantic-core==//p')
    if ! ls "$home"/wheels/pydantic_core-"$wanted"-* >/dev/null 2>&1; then
        rm -f "$home"/wheels/pydantic_core-*
        "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
            --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
            --dest "$home/wheels" "pydantic-core==$wanted"
    fi
    local wheel
    for wheel in "$home"/wheels/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$home/site"; done
    tar --create --directory "$home/site" . | xz --threads=0 --x86 --lzma2=preset=6 >"$home/site.tar.xz"
    rm -rf "$home/wheels" "$home/site"
    local sent
    sent=$(($(git ls-files -z --cached --others --exclude-standard | xargs -0 du -cb | tail -1 | cut -f1) +
        $(stat -c %s "$home/site.tar.xz")))
    echo "to send: $sent bytes of 67108864, with .gpu/site.tar.xz"
    [ "$sent" -lt 67108864 ]
}

unpack() {
    if [ ! -e "$home/site/.done" ]; then
        mkdir -p "$home/site"
        xz --decompress --stdout "$home/site.tar.xz" | tar --extract --directory "$home/site" && touch "$home/site/.done"
    fi
    export PYTHONPATH=$PWD:$home/site PYTHONUNBUFFERED=1
    "$PYTHON" build_support/native.py
}

step() { # SECONDS NAME COMMAND...
    local limit=$1 name=$2 begin=$SECONDS status=0
    shift 2
    echo "== $name: $*" | tee -a "$OUT/session.log"
    timeout --kill-after=10 "$limit" "$@" >>"$OUT/session.log" 2>&1 || status=$?
    echo "== $name: $((SECONDS - begin)) s, status $status" | tee -a "$OUT/session.log"
}

bench() { # SECONDS PART OPTIONS...
    local limit=$1 part=$2
    shift 2
    step "$limit" "$part" "$PYTHON" -m benchmarks.gpu "$part" --out "$OUT" "$@"
}

case ${1:-} in
prepare) prepare ;;
first)
    unpack
    step 20 nvidia-smi nvidia-smi
    bench 60 facts
    bench 180 bits --rows 1000000
    bench 120 messages
    step 200 tests "$PYTHON" -m pytest -q -p no:cacheprovider tests/gpu
    ;;
second)
    unpack
    bench 280 device --repeat 5
    bench 280 host --rows 5000000 --repeat 3 --threads 1,4,8,16
    ;;
third)
    unpack
    bench 570 jobs --rows "${ROWS:-10000000}" --repeat "${REPEAT:-2}" --threads 4,8,16
    ;;
*)
    sed -n '2,9p' "$0"
    exit 2
    ;;
esac
