#!/usr/bin/env bash
# Builds .venv with the pinned versions, and installs the system libraries that FFCV compiles
# against where they are missing. For Debian and Ubuntu; elsewhere it says what it needs.
set -euo pipefail
cd "$(dirname "$0")"

UV_VERSION=0.13.9
needed=(g++ pkg-config libopencv-dev libturbojpeg0-dev libjpeg-dev libtbb12 python3-dev python3-venv ca-certificates)
wanted=(dataset-fashion-mnist)   # without it torchvision downloads the data set

fail() { echo "setup: $*" >&2; exit 1; }
installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q 'ok installed'; }

if command -v apt-get >/dev/null; then
  missing=()
  for package in "${needed[@]}" "${wanted[@]}"; do installed "$package" || missing+=("$package"); done
  if ((${#missing[@]})); then
    as_root=()
    if (($(id -u))); then
      command -v sudo >/dev/null || fail "needs root or sudo to run: apt-get install ${missing[*]}"
      as_root=(sudo)
    fi
    echo "setup: installing ${missing[*]}"
    "${as_root[@]}" apt-get update -qq
    if [[ " ${missing[*]} " == *" ${wanted[*]} "* ]] && ! apt-cache show "${wanted[@]}" >/dev/null 2>&1; then
      missing=("${missing[@]/${wanted[*]}/}")
    fi
    # shellcheck disable=SC2068
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends ${missing[@]} >/dev/null
  fi
elif ! { command -v g++ && pkg-config --exists opencv4 libturbojpeg libjpeg; } >/dev/null 2>&1; then
  fail "this is not Debian or Ubuntu: install g++, pkg-config and the headers of OpenCV 4 and \
libjpeg-turbo yourself, then run it again"
fi

uv=$(command -v uv || true)
if [[ -z $uv ]]; then
  uv=.cache/uv/bin/uv
  [[ -x $uv ]] || { python3 -m venv .cache/uv && .cache/uv/bin/pip install -q "uv==$UV_VERSION"; }
fi
[[ -x .venv/bin/python ]] || "$uv" venv -q --python '>=3.11,<3.14' .venv
echo "setup: installing the pinned packages into .venv"
# Compiled once here, and not in every process where Python may not write beside its modules.
"$uv" pip install -q --compile-bytecode --python .venv/bin/python -r requirements.txt
"$uv" pip install -q --python .venv/bin/python --no-deps --editable .
.venv/bin/python -c "import evit.data.ffcv.decode, ffcv.libffcv, torchvision.ops" ||
  fail "FFCV, torchvision or evit.data do not import"
touch .venv/.ready
