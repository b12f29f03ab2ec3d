#!/bin/bash
# sandbox.sh FILE: the image that containerd starts a pod's sandbox from, as a docker archive: busybox, asleep.
set -euo pipefail
D=$(mktemp -d)
mkdir "$D/root"
cp "$(command -v busybox)" "$D/root/busybox"
tar -C "$D/root" --owner=0 --group=0 --numeric-owner --mtime=@0 -cf "$D/layer.tar" busybox
id=$(sha256sum <"$D/layer.tar" | cut -d' ' -f1)
echo '{"architecture":"amd64","os":"linux","config":{"Entrypoint":["/busybox","sleep","2147483647"]},"rootfs":{"type":"layers","diff_ids":["sha256:'"$id"'"]}}' >"$D/config.json"
echo '[{"Config":"config.json","RepoTags":["ovenbird.local/sandbox:1"],"Layers":["layer.tar"]}]' >"$D/manifest.json"
tar -C "$D" -cf "$1" config.json layer.tar manifest.json
rm -rf "$D"
