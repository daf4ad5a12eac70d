#!/bin/sh
# Sets up the virtual environment that `make demo` and `make test` share; make calls it when it is missing or stale.
#
#   .ci/setup_venv.sh VENV [EXTRAS]      for example: .ci/setup_venv.sh .venv dev
#
# Three stages: the environment, torch, and the package (editable) with what it needs. Each can be repeated.
# torch has a stage of its own because the plain Linux wheel is a CUDA build of several gigabytes: a machine without an
# NVIDIA GPU gets a CPU build, or an error, and never that one.
set -eu
cd "$(dirname "$0")/.."

venv=$1
extras=${2:-}
python=$venv/bin/python
log=$venv/setup.log

say() { printf 'set-up: %s\n' "$*"; }
die() { printf 'set-up: error: %s\n' "$*" >&2; exit 1; }
install() { "$python" -m pip install -qq --disable-pip-version-check --no-input "$@" </dev/null; }

# -- the environment --

host=${PYTHON:-python3}
"$host" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  die "$host has to be Python 3.10 or newer (set PYTHON=...)"
if ! "$python" -m pip --version >/dev/null 2>&1; then
  say "creating $venv with $("$host" --version)"
  "$host" -m venv "$venv" || die "$host -m venv failed; Debian and Ubuntu have it in the package python3-venv"
fi
: >"$log"

# -- torch --

torch_version=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)
[ -n "$torch_version" ] || die "constraints.txt has no line torch==VERSION"

# Whatever build of that version is there already, it stays.
has_torch() {
  "$python" -c 'import sys, importlib.metadata as m; sys.exit(m.version("torch").split("+")[0] != sys.argv[1])' \
    "$torch_version" 2>/dev/null
}
has_gpu() { command -v nvidia-smi && nvidia-smi; } >/dev/null 2>&1

# uv knows PyTorch's own indexes: "cpu" is their CPU build, "auto" the build that suits the driver of this machine.
uv_torch() {
  install uv && "$venv/bin/uv" pip install --quiet --python "$python" --torch-backend="$1" "torch==$torch_version"
} >>"$log" 2>&1
# pip's configured indexes and links. A local version such as +cpu can't match a CUDA build.
pip_torch() { install "torch==$torch_version$1"; } >>"$log" 2>&1

if ! has_torch; then
  if [ "$(uname -s)" != Linux ]; then
    say "installing torch $torch_version"
    pip_torch ""
  elif has_gpu; then
    say "installing torch $torch_version for this machine's NVIDIA GPU"
    uv_torch auto || pip_torch ""
  else
    say "installing torch $torch_version, CPU build"
    pip_torch "+cpu" || uv_torch cpu
  fi || {
    cat "$log" >&2
    die "no way to install torch $torch_version worked (above: why); install it into $venv by hand, then repeat this"
  }
fi

# -- the package --

say "installing baft-kernels${extras:+ with its $extras tools}"
# No build isolation: the build uses the torch above, and nothing is downloaded twice.
install -c constraints.txt setuptools ninja &&
  install -c constraints.txt --no-build-isolation -e ".${extras:+[$extras]}" ||
  die "installing the package failed (above: why)"
