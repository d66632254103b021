# Sourced by the scripts. It sets GOVLEDGER_ROOT and GOVLEDGER_BIN (the venv's bin) and defines:
#   setup_venv [--no-dev]   makes .venv as uv.lock says, with the tools of the tests unless told
#                           otherwise. Needs Python 3.11+ or uv; does nothing when up to date.

GOVLEDGER_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
GOVLEDGER_BIN="$GOVLEDGER_ROOT/.venv/bin"
export GOVLEDGER_ROOT GOVLEDGER_BIN

setup_venv() {
    local stamp="$GOVLEDGER_ROOT/.venv/.set-up${1:-}" uv
    # The stamp holds the path, since a venv that was moved does not work.
    if [[ -f "$stamp" && "$(<"$stamp")" == "$GOVLEDGER_ROOT" &&
        "$stamp" -nt "$GOVLEDGER_ROOT/uv.lock" &&
        "$stamp" -nt "$GOVLEDGER_ROOT/pyproject.toml" ]]; then
        return
    fi
    echo "setting up .venv (only now, and when uv.lock changes)" >&2
    if uv="$(command -v uv)"; then
        :
    else
        uv="$GOVLEDGER_BIN/uv"
        [[ -x "$uv" ]] || _bootstrap_uv
    fi
    # --inexact keeps a uv that we put into the venv ourselves.
    (
        unset VIRTUAL_ENV
        # The certificates that the machine trusts, as pip does: a proxy may have its own.
        UV_SYSTEM_CERTS="${UV_SYSTEM_CERTS:-1}" UV_PROJECT_ENVIRONMENT="$GOVLEDGER_ROOT/.venv" "$uv" sync --quiet --locked --inexact \
            --project "$GOVLEDGER_ROOT" "$@"
    )
    echo "$GOVLEDGER_ROOT" >"$stamp"
}

_bootstrap_uv() {
    local python
    for python in python3 python3.14 python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            "$python" -m venv --clear "$GOVLEDGER_ROOT/.venv"
            "$GOVLEDGER_BIN/python" -m pip install --quiet --disable-pip-version-check uv
            return
        fi
    done
    echo "govledger needs Python 3.11 or newer, or uv, on PATH" >&2
    return 1
}
