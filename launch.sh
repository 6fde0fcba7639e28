#!/usr/bin/env bash
# Sets the project up and runs it, on this machine's devices or on every node of a hostfile.
#
#   ./launch.sh [deepspeed launcher flags] [RECIPE] [recipe flags]
#
#   ./launch.sh                                        miras_tiny: one rank per GPU, two on a CPU
#   ./launch.sh --num_gpus 4 miras_tiny --steps 200    four ranks
#   ./launch.sh --hostfile hostfile miras_64k        every slot of every host
#   ./launch.sh miras_tiny --help                      the common flags of a recipe; --help-all: every one
#   ./launch.sh --setup-only                           the environment and native builds, and no run
#
# The first word that is neither a launcher flag nor its value is RECIPE; `.venv/bin/mnemos recipes` lists them.
# The launcher flags are those of `deepspeed --help`. The environment is in .venv, made from $PYTHON (python3).
# MNEMOS_BUILD=auto|require|off and TORCH_CUDA_ARCH_LIST decide which native kernels set-up builds (docs/kernels.md).
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
VENV="$ROOT/.venv"
NATIVE_REPORT="$ROOT/pipeline/_native_build.json"
PYTHON="${PYTHON:-python3}"

say() { printf 'launch.sh: %s\n' "$*" >&2; }
fail() {
  say "$*"
  exit 2
}

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; }

# Everything that decides what is installed: when it is unchanged, set-up has nothing to do. The folder counts too, because
# the commands in .venv/bin hold its path.
fingerprint() {
  "$VENV/bin/python" - "$ROOT" <<'PY'
import hashlib, importlib.metadata, os, pathlib, shutil, sys

root = pathlib.Path(sys.argv[1])
try:
    torch = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    torch = "none"
switches = [os.environ.get("MNEMOS_BUILD") or "auto", os.environ.get("TORCH_CUDA_ARCH_LIST", "")]
home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
nvcc = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
for kind, names in {"cpu": [os.environ.get("CXX") or "c++", "g++", "clang++"], "cuda": nvcc}.items():
    # A compiler that appears or changes is a reason to try again. Once there is a library, one that is gone is none.
    if any((root / "pipeline").glob(f"_native_{kind}*.so")):
        switches.append(f"{kind} built")
    else:
        found = next(filter(None, map(shutil.which, names)), None)
        switches.append(f"{kind} {found} {found and os.stat(found).st_mtime_ns}")
digest = hashlib.sha256("\n".join([str(root), sys.version, torch, *switches]).encode())
sources = sorted(path for path in (root / "kernels").rglob("*") if path.is_file() and path.suffix != ".md")
for path in [root / "setup.py", root / "pyproject.toml", root / "constraints.txt", *sources]:
    digest.update(str(path).encode() + b"\0" + path.read_bytes())
print(digest.hexdigest())
PY
}

is_set_up() {
  [[ -x "$VENV/bin/python" && -f "$VENV/.set-up" ]] && [[ "$(fingerprint)" == "$(<"$VENV/.set-up")" ]]
}

# Whether a Python has a torch that this project can use (setup.py: torch>=2.10).
has_torch() {
  "$1" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10))' 2>/dev/null
}

make_venv() {
  command -v "$PYTHON" >/dev/null || fail "$PYTHON is not installed: install Python 3.10 or newer, or name one in PYTHON"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$PYTHON is $("$PYTHON" -V 2>&1): install Python 3.10 or newer, or name one in PYTHON"

  local options=() outer=""
  if has_torch "$PYTHON"; then
    # A vendor's container brings a torch that is built for its driver and libraries: that one is used, not replaced.
    say "using the torch that $PYTHON has"
    options=(--system-site-packages)
    # The system of a virtual environment made from another one is the base Python, not that other one.
    outer="$("$PYTHON" -c 'import sys, sysconfig; print(sysconfig.get_path("purelib") if sys.prefix != sys.base_prefix else "")')"
  fi
  # What is left of a broken or moved environment goes; the lock stays.
  find "$VENV" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
  "$PYTHON" -m venv "${options[@]}" "$VENV" >&2 ||
    fail "$PYTHON -m venv failed: install the venv module (Debian, Ubuntu: apt-get install python3-venv)"
  if [[ -n "$outer" ]]; then
    echo "$outer" >"$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer_environment.pth"
  fi
}

venv_works() {
  # A folder that was moved has commands that start with the path it used to have.
  "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && grep -qsF "$VENV/bin/python" "$VENV/bin/pip"
}

install_packages() {
  # A container's own pip constraints are about its own environment; a user scheme has no place in a virtual environment.
  local pip=(env -u PIP_CONSTRAINT -u PIP_TARGET PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
    "$VENV/bin/python" -m pip install --quiet)
  local constraints="$ROOT/constraints.txt" given
  # The version of a torch that the environment sees but does not own.
  given="$("$VENV/bin/python" -c 'import sys, torch
print("" if torch.__file__.startswith(sys.prefix + "/") else torch.__version__)' 2>/dev/null || true)"
  if [[ -n "$given" ]]; then
    sed "s/^torch==.*/torch==$given/" "$ROOT/constraints.txt" >"$VENV/constraints.txt"
    constraints="$VENV/constraints.txt"
  fi

  # torch comes first and the rest is built without isolation: DeepSpeed and the kernels compile against this very torch.
  say "installing torch ${given:-$(sed -n 's/^torch==//p' "$constraints")} and build tools"
  "${pip[@]}" -c "$constraints" torch setuptools wheel ninja packaging
  say "installing DeepSpeed, transformers and the rest"
  local warning failed="" started="$VENV/.installing"
  : >"$started"
  "${pip[@]}" --no-build-isolation -c "$constraints" -e "${ROOT}[dev]" || failed=yes
  warning="$(native_warning)"
  if [[ -n "$failed" ]]; then
    # Only a report that is newer than the start of pip is of this build.
    [[ "${MNEMOS_BUILD:-}" == require && -n "$warning" && "$NATIVE_REPORT" -nt "$started" ]] && fail "MNEMOS_BUILD=require: $warning"
    fail "pip failed: its error is above"
  fi
  [[ -z "$warning" ]] || say "warning: $warning"
}

# What the native build has to say: pip shows nothing of a build that succeeds.
native_warning() {
  "$VENV/bin/python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["warning"] or "")' \
    "$NATIVE_REPORT" 2>/dev/null || true
}

setup_environment() {
  case "${MNEMOS_BUILD:-auto}" in
    auto | require | off) ;;
    *) fail "MNEMOS_BUILD is '$MNEMOS_BUILD': give auto, require or off" ;;
  esac
  is_set_up && return
  mkdir -p "$VENV"
  (
    # Two starts at once must not install over each other.
    if command -v flock >/dev/null; then
      flock 9
      is_set_up && exit
    fi
    say "setting up $VENV (some minutes the first time)"
    venv_works || make_venv
    install_packages
    fingerprint >"$VENV/.set-up"
    say "set-up is complete"
  ) 9>"$VENV/.lock"
}

if [[ "${1:-}" == --help || "${1:-}" == -h ]]; then
  usage
  exit
fi

# Native builds look for ninja on the PATH, and DeepSpeed's launcher for its own commands.
export PATH="$VENV/bin:$PATH"
setup_environment
for word in "$@"; do
  if [[ "$word" == --setup-only ]]; then
    exit
  fi
done

# Splits launcher flags from recipe flags, checks both, and stays beside
# `deepspeed LAUNCHER-FLAGS --module pipeline train RECIPE RECIPE-FLAGS`: signals reach the ranks, and its exit code the
# caller.
exec "$VENV/bin/python" -m pipeline.launch "$@"
