#!/usr/bin/env bash
# Make an ARM Python with the project's test packages, which QEMU emulates: FOLDER/bin/python.
#
#   scripts/arm_python.sh .arm                        # half a minute, 1 GB, once
#   .arm/bin/python -m pytest tests/model/kernels     # from the project's folder
#   ARM_CPU=cortex-a72 .arm/bin/python -m nanovllm env
#
# Needs Debian on x86-64, a Python with pip (PYTHON, or python3) and the network, but not root: all
# packages are unpacked below FOLDER. The emulated Python is that of the system's release. ARM_CPU
# is a CPU of QEMU: max, the default, has every instruction, a cortex-a72 no dot products. What
# Python starts through sys.executable is emulated too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "arm_python.sh: $*" >&2
    exit 1
}

[ $# = 1 ] || fail 'give the folder to make: scripts/arm_python.sh FOLDER'
[ "$(uname -sm)" = 'Linux x86_64' ] || fail "needs Linux on x86-64; this is $(uname -sm)"
# Other systems with apt-get have packages for ARM on other servers.
grep -qx 'ID=debian' /etc/os-release || fail 'needs Debian; a container of it is enough'
mkdir -p "$1"
dir=$(cd "$1" && pwd)
stamp=$dir/.installed made=$dir/.arm-python
[ -e "$made" ] || [ -z "$(ls -A "$dir")" ] || fail "$dir is neither empty nor made by this program"
touch "$made"
[ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt scripts/arm_python.sh ] && exit
rm -rf "${dir:?}"/{amd64,arm64,apt,bin,lib,uv}

# unpack ARCHITECTURE PACKAGE...: unpack packages and all that they need in DIR/ARCHITECTURE, as if
# nothing were installed.
unpack() {
    local root=$dir/$1 state=$dir/apt/$1 deb
    local apt=(
        apt-get -qq --no-install-recommends -o "APT::Architecture=$1" -o "APT::Architectures::=$1"
        -o "Dir::State=$state" -o "Dir::State::status=$state/status" -o "Dir::Cache=$state/cache"
        -o APT::Sandbox::User=root -o APT::Update::Post-Invoke-Success::=
    )
    mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$root"
    : > "$state/status"
    "${apt[@]}" update || fail "cannot read the lists of packages for $1; is there a network?"
    "${apt[@]}" --yes --download-only install "${@:2}" || fail "cannot download the packages for $1"
    for deb in "$state"/cache/archives/*.deb; do
        dpkg-deb --extract "$deb" "$root" || fail "cannot unpack $deb"
    done
    rm -r "$state"
}

unpack arm64 python3 libgomp1 libstdc++6
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)
if [ -z "$qemu" ]; then
    unpack amd64 qemu-user-static
    qemu=$dir/amd64/usr/bin/qemu-aarch64-static
fi

# A virtual environment whose python is a script that names itself as the program.
version=$(cd "$dir/arm64/usr/bin" && ls python3.[0-9]*[0-9])
mkdir -p "$dir/bin" "$dir/lib/$version/site-packages"
printf 'home = %s\n' "$dir/arm64/usr/bin" > "$dir/pyvenv.cfg"
cat > "$dir/bin/python" << END
#!/bin/sh
export NANOVLLM_CACHE_DIR="\${NANOVLLM_CACHE_DIR:-$dir/kernels}"
exec $qemu -cpu "\${ARM_CPU:-max}" -L $dir/arm64 -0 $dir/bin/python \
    $dir/arm64/usr/bin/$version "\$@"
END
chmod +x "$dir/bin/python"
"$dir/bin/python" -c 'import platform; assert platform.machine() == "aarch64"' ||
    fail "$qemu cannot run $version"
# uv runs here, not emulated, and takes the packages of the Python that it is given.
"${PYTHON:-python3}" -m pip install --quiet --disable-pip-version-check --target "$dir/uv" uv ||
    fail 'cannot install uv'
"$dir/uv/bin/uv" pip install --quiet --python "$dir/bin/python" -r pyproject.toml --extra test ||
    fail 'cannot install the packages'
pwd > "$dir/lib/$version/site-packages/nanovllm.pth"
touch "$stamp"
