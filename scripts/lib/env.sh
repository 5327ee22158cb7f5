# shellcheck shell=bash
# The project's Python environment, for the scripts beside this folder. Source it, then:
#
#   sparsespec_environment model|test|bench    # creates or updates it; sets PYTHON
#
# SPARSESPEC_VENV    where it is (default: .venv in the repository)
# SPARSESPEC_PYTHON  which Python makes it (default: the first of python3, python3.12, .11, .10, .13 that fits)

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
VENV="${SPARSESPEC_VENV:-$REPOSITORY/.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
# measured: 9 GB installed, plus one unpacked wheel while it is copied
NEEDED_GB=12

say() { printf '%s\n' "==> $*" >&2; }

# die REASON ADVICE...
die() {
    printf '%s\n' "error: $1" >&2
    shift
    [ $# -eq 0 ] || printf '       %s\n' "$@" >&2
    exit 1
}

_fitting_python() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

_find_python() {
    local candidate
    if [ -n "${SPARSESPEC_PYTHON:-}" ]; then
        _fitting_python "$SPARSESPEC_PYTHON" || die "SPARSESPEC_PYTHON is $SPARSESPEC_PYTHON; it must be a Python 3.10 to 3.13."
        printf '%s' "$SPARSESPEC_PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.10 python3.13; do
        if command -v "$candidate" >/dev/null && _fitting_python "$candidate"; then
            printf '%s' "$candidate"
            return
        fi
    done
    if command -v python3 >/dev/null; then
        die "python3 is $(python3 --version 2>&1); SGLang needs Python 3.10 to 3.13." \
            "Install one of them, or name it: SPARSESPEC_PYTHON=/path/to/python3.12 $0"
    fi
    die "there is no python3 on PATH." "Install Python 3.10 to 3.13 (Debian, Ubuntu: apt install python3 python3-venv)."
}

_check_disk() {
    local folder free_kb
    folder="$(dirname "$VENV")"
    while [ ! -d "$folder" ]; do folder="$(dirname "$folder")"; done
    free_kb="$(df -Pk "$folder" | awk 'NR == 2 { print $4 }')"
    [ "$((free_kb / 1000000))" -ge "$NEEDED_GB" ] ||
        die "$folder has $((free_kb / 1000000)) GB free; SGLang, torch and their CUDA libraries need $NEEDED_GB GB." \
            "Free some space, or name a folder on another disk: SPARSESPEC_VENV=/big/disk/venv $0"
}

_create_venv() {
    local python
    # in an assignment, so that a failure inside ends the script
    python="$(_find_python)"
    _check_disk
    say "creating $VENV with $("$python" --version 2>&1)"
    mkdir -p "$(dirname "$VENV")"
    if "$python" -m venv "$VENV" >/dev/null 2>&1; then
        return
    fi
    rm -rf "$VENV"
    if command -v uv >/dev/null && uv venv --quiet --seed --python "$(command -v "$python")" "$VENV"; then
        return
    fi
    # show the reason this time
    "$python" -m venv "$VENV" >&2 || true
    rm -rf "$VENV"
    die "$python cannot create a virtual environment." \
        "Most often its venv module is missing (Debian, Ubuntu: apt install python3-venv)."
}

# what the environment was installed from: same key, nothing to do
_environment_key() {
    "$VENV/bin/python" - "$REPOSITORY" "$1" <<'EOF'
import hashlib, pathlib, sys

repository, extra = sys.argv[1:]
pyproject = pathlib.Path(repository, "pyproject.toml").read_bytes()
print(hashlib.sha256(b"\0".join([pyproject, repository.encode(), extra.encode(), sys.version.encode()])).hexdigest())
EOF
}

# the plugin is found the way SGLang finds it
_entry_point_registered() {
    "$VENV/bin/python" -c '
import importlib.metadata, sys
sys.exit("sparsespec" not in {e.name for e in importlib.metadata.entry_points(group="sglang.srt.plugins")})' 2>/dev/null
}

_install() {
    local requirement="$1"
    local -a uv=()
    if command -v uv >/dev/null; then
        uv=(uv)
    elif "$VENV/bin/python" -m uv --version >/dev/null 2>&1 ||
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv; then
        uv=("$VENV/bin/python" -m uv)
    else
        say "uv cannot be installed; going on with pip"
    fi
    if [ ${#uv[@]} -gt 0 ]; then
        say "installing $requirement with uv (the first time 3 to 5 GB: SGLang, torch, CUDA libraries)"
        # as pip does; where Python may not write bytecode, every start of a server would compile SGLang again: a minute
        (cd "$REPOSITORY" && "${uv[@]}" pip install --python "$VENV/bin/python" --compile-bytecode --editable "$requirement") &&
            return
        say "uv did not succeed; trying pip, which takes some minutes"
    else
        say "installing $requirement with pip (the first time 3 to 5 GB; some minutes)"
    fi
    (cd "$REPOSITORY" && "$VENV/bin/python" -m pip install --disable-pip-version-check --editable "$requirement") && return
    _check_disk
    die "the packages could not be installed; the reason is above." \
        "A machine without a network needs a package mirror: set PIP_INDEX_URL, or UV_INDEX_URL for uv." \
        "Nothing is lost: run $0 again to go on."
}

sparsespec_environment() {
    local extra="$1" stamp key
    if ! "$VENV/bin/python" -c '' 2>/dev/null; then
        if [ -e "$VENV" ] && [ ! -e "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
            die "$VENV exists and is not a virtual environment." "Set SPARSESPEC_VENV to another folder."
        fi
        rm -rf "$VENV"
        _create_venv
    fi
    # shellcheck disable=SC2034  # for the script that sources this file
    PYTHON="$VENV/bin/python"
    stamp="$VENV/.sparsespec-$extra"
    key="$(_environment_key "$extra")"
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ] && _entry_point_registered; then
        say "environment $VENV is up to date"
        return
    fi
    _install ".[$extra]"
    _entry_point_registered ||
        die "SGLang would not find the plugin: no entry point sparsespec in the group sglang.srt.plugins." \
            "Remove $VENV and run $0 again."
    printf '%s\n' "$key" >"$stamp"
    say "environment $VENV is ready"
}
