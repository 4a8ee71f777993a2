#!/usr/bin/env bash
# Makes .venv and installs this project into it: scripts/setup.sh demo|test. Does nothing if that is done.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
demo) extras=sweep,tensorboard ;; # plots, and what README shows next: a sweep, the curves of a run
test) extras=dev ;;
*) echo "usage: scripts/setup.sh demo|test" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: Python >= 3.10 is needed; got $("$python" --version 2>&1 || true); set PYTHON=/path/to/python3" >&2
    exit 1
fi

# What is installed is written down with the files that decide it, so that a change installs again.
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -c1-16)
installed=.venv/installed-$extras
[ -f "$installed" ] && [ "$(cat "$installed")" = "$wanted" ] && exit 0

debian() { # install Debian packages if this is Debian and we may
    command -v apt-get >/dev/null || return 1
    echo "installing $* with apt-get" >&2
    if [ "$(id -u)" = 0 ]; then sudo=; else sudo="sudo -n"; fi
    $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "$@" >&2
}

if [ ! -x .venv/bin/pip ]; then
    rm -rf .venv
    if ! "$python" -m venv .venv >/dev/null 2>&1; then # Debian keeps venv in a package of its own
        rm -rf .venv
        debian python3-venv || { echo "error: python3 -m venv does not work; apt-get install python3-venv" >&2; exit 1; }
        "$python" -m venv .venv
    fi
fi

echo "installing into .venv (once; a few minutes)" >&2
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
pip install -q --no-compile -c constraints.txt -e ".[$extras]"
if [ "$extras" = dev ]; then
    # What our vision tower and scores are compared with; their own dependencies (torchvision, lmdb) are not used.
    pip install -q --no-compile --no-deps cn-clip==1.6.0 pycocoevalcap==1.2
fi
# pip compiles one file after another, this on every core, without the half that nothing here imports;
# files that are no Python 3 are templates of others.
unused='/(transformers/models/(?!_|auto|bert|chinese_clip|clip|dinov2|gemma|llama|llava|qwen|siglip)'
unused+='|modelscope/(models|pipelines|preprocessors|trainers|msdatasets|metrics|exporters)/'
unused+='|ray/(rllib|serve|tune|train|data|llm)/|sympy/(physics|stats|geometry)/|(debugpy|pip|tests|testing)/)'
.venv/bin/python -m compileall -q -j 0 -x "$unused" .venv/lib llava_core extract train infer llava_align \
    >/dev/null 2>&1 || true
if ! .venv/bin/python -c 'import sys; from llava_core.report.fonts import chinese_font; sys.exit(not chinese_font(9))'; then
    debian fonts-wqy-microhei || echo "no Chinese font: the demo's contact sheet will go without words" >&2
fi
if [ "$extras" = dev ] && ! command -v chromium google-chrome >/dev/null; then
    debian --no-install-recommends chromium || echo "no Chromium: tests of pages in a browser are skipped" >&2
fi
if [ "$extras" = dev ] && ! command -v tmux >/dev/null; then
    debian tmux || echo "no tmux: the test of the chat in a terminal is skipped" >&2
fi
echo "$wanted" >"$installed"
