#!/usr/bin/env bash
# Make this checkout ready to run: uv, Python 3.12 with the locked packages in .venv, a Vulkan driver SAPIEN accepts.
# Needs Python >= 3.11 and git. Changes nothing outside the checkout, except with root or password-less sudo on a Debian
# whose Python can make no environment: then it installs python3-venv. Again is free: it stops when nothing has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

main() {
    unset PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX
    local wanted
    wanted="$(cat requirements.lock pyproject.toml | sha256sum | cut -d' ' -f1) $PWD" # scripts in .venv name its folder
    in_sync && [ -e .flywheel/.driver-found ] && return

    mkdir -p .tools .flywheel
    exec 9>.tools/lock
    flock 9 # two at once: the second waits, then finds all done
    if ! in_sync; then
        install_packages
        echo "$wanted" >.venv/.in-sync
    fi
    if [ ! -e .flywheel/.driver-found ]; then
        .venv/bin/python -m data.sim.driver >&2 || fail "no Vulkan driver; the line above says what to do"
        touch .flywheel/.driver-found
    fi
    say "ready after $SECONDS s"
}

in_sync() { [ "$(cat .venv/.in-sync 2>/dev/null)" = "$wanted" ]; }

install_packages() {
    local uv quiet=()
    uv=$(find_uv) || exit 1
    # A company's own certificate authority is known to the system, not to uv.
    [ -e /etc/ssl/certs/ca-certificates.crt ] && export UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS-true}"
    [ -t 2 ] || quiet=(--quiet) # a terminal sees uv's progress bars
    rm -f .venv/.in-sync
    if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || moved; then
        rm -rf .venv
        "$uv" venv --quiet --python 3.12 .venv ||
            fail "there is no Python 3.12 and uv could not fetch one: install python3.12, or name a mirror in UV_PYTHON_INSTALL_MIRROR"
    fi
    say "installing $(grep -c == requirements.lock) packages into .venv (6 GB; minutes the first time)"
    "$uv" pip sync "${quiet[@]}" --python .venv/bin/python requirements.lock
    "$uv" pip install "${quiet[@]}" --python .venv/bin/python --no-deps --editable .
}

moved() { [ -e .venv/bin/flywheel ] && ! head -1 .venv/bin/flywheel | grep -qF "$PWD/.venv/bin/python"; }

# uv from the PATH, else a private one in .tools.
find_uv() {
    command -v uv && return
    [ -x .tools/bin/uv ] && echo "$PWD/.tools/bin/uv" && return
    say "fetching uv into .tools"
    local python
    python=$(system_python) || fail "Python >= 3.11 is needed; Debian and Ubuntu: apt-get install python3"
    if "$python" -c 'import ensurepip' 2>/dev/null && "$python" -m venv .tools >&2; then
        .tools/bin/python -m pip install --quiet --disable-pip-version-check uv >&2 && echo "$PWD/.tools/bin/uv" && return
    elif "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m pip install --quiet --disable-pip-version-check --target .tools uv >&2 && echo "$PWD/.tools/bin/uv" && return
    elif command -v apt-get >/dev/null && as_root true 2>/dev/null; then
        say "installing python3-venv by apt-get"
        as_root apt-get update -qq >&2 && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >&2 &&
            "$python" -m venv .tools >&2 && .tools/bin/python -m pip install --quiet --disable-pip-version-check uv >&2 &&
            echo "$PWD/.tools/bin/uv" && return
    else
        fail "uv is missing and this Python can make no environment: sudo apt-get install python3-venv, then again"
    fi
    fail "uv could not be installed from the package index; put a uv >= 0.9 on the PATH, then again"
}

system_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$name" && return
        fi
    done
    return 1
}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

main
