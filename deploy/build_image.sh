#!/bin/sh
# Build the image with docker, podman or buildah, whichever is installed and works.
#
#   deploy/build_image.sh                                    # the image nanovllm
#   deploy/build_image.sh -t nanovllm-ray --build-arg EXTRAS=ray
#   BUILDER='buildah build --isolation chroot' deploy/build_image.sh    # inside a container
#
# The arguments are those of `docker build`, without the folder.
set -eu
cd "$(dirname "$0")/.."
if [ -z "${BUILDER:-}" ]; then
    if docker version > /dev/null 2>&1; then  # a client without its server cannot build
        BUILDER='docker build'
    elif podman info > /dev/null 2>&1; then
        BUILDER='podman build --format docker'
    elif buildah version > /dev/null 2>&1; then
        BUILDER='buildah build --format docker'
    else
        echo 'build_image.sh: needs docker with a running server, podman or buildah' >&2
        exit 1
    fi
fi
case " $* " in
*" -t "* | *" --tag "*) ;;
*) set -- -t nanovllm "$@" ;;
esac
echo "build_image.sh: $BUILDER $*" >&2
# shellcheck disable=SC2086 - a builder is a command with options
exec $BUILDER "$@" .
